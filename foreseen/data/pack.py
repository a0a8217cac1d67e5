"""Pack pictures into shards: in parallel, atomically, going on after a kill. `publish.py` has the folder's side."""

import errno
import hashlib
import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreseen.data.duplicates import report_duplicates
from foreseen.data.manifest import Manifest, Split
from foreseen.data.parallel import count_cpus, map_in_processes
from foreseen.data.publish import Plan, begin, is_finished, lock_folder, publish, read_manifest_or_none_yet
from foreseen.data.shards import TAR_BLOCK, ShardSet
from foreseen.data.source import IMAGE_SUFFIXES, Missing, SourceSample
from foreseen.data.write_shard import ShardJob, ShardResult, write_shard
from foreseen.errors import BadInput
from foreseen.files import write_atomically
from foreseen.keys import sample_keys, subkeys

Progress = Callable[[int, int], None]

_SHARD_SAMPLES, _MAX_SHARD_SAMPLES = 1000, 1_000_000
_FACTS_BYTES = 64  # of KEY.json: the names and numbers that every picture has
_JPEG_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif"})
_LOSSLESS_SUFFIXES = IMAGE_SUFFIXES - _JPEG_SUFFIXES - {".webp"}


@dataclass(frozen=True)
class Summary:
    """What a packing did.

    Attributes:
        path, split: the set's folder and the split that is new in it.
        samples, shards, bytes: what the split holds.
        image: extension of its pictures.
        unreadable: name and reason of each picture left out; also in OUT/SPLIT.unreadable.txt.
        converted, shrunk: pictures encoded anew because of their format, and because of their size.
        duplicates: how many pictures are byte for byte those of another split, by its name, or, by the split's own, of
            an earlier one of this split; also in OUT/SPLIT.duplicates.txt.
        kept_shards: shards that an earlier, killed packing had finished.
        was_there: the split had been packed before, and nothing was done.
    """

    path: Path
    split: str
    samples: int
    shards: int
    bytes: int
    image: str
    unreadable: list[tuple[str, str]]
    converted: int
    shrunk: int
    kept_shards: int
    was_there: bool = False
    duplicates: Mapping[str, int] = field(default_factory=dict)


def pack(
    samples: Sequence[SourceSample],
    out: str | Path,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    shard_samples: int | None = None,
    shard_mb: float | None = None,
    max_side: int | None = None,
    quality: int = 90,
    seed: int = 0,
    workers: int | None = None,
    source: str | None = None,
    licence: str | None = None,
    strict: bool = False,
    overwrite: bool = False,
    keep: bool = False,
    image: str | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Pack samples into one split of the set in a folder, which is made if need be.

    The samples are shuffled by the seed and cut into shards. Bytes are kept as they are, except where a picture is
    shrunk or has another format than the set: that of all the files if they agree, else PNG where all of them are
    lossless, else JPEG.

    Args:
        samples: what to pack; read only by index, so they may be made on the fly.
        out: the set's folder. Other splits may be in it already.
        split: name of the split.
        classes: names of the labels' classes.
        shard_samples: samples in a shard; None is 1000, or no bound where there is one in megabytes.
        shard_mb: megabytes (10⁶ bytes) of a shard, by the sizes of the source files, which are known before they are
            read: shards of pictures that are shrunk come out smaller, of converted ones smaller or larger. A picture
            that is larger has a shard of its own.
        max_side: longest side in pixels; larger pictures are shrunk (Lanczos) and encoded anew. None keeps them.
        quality: JPEG or WEBP quality of shrunk pictures.
        seed: of the shuffle.
        workers: processes; None is one a CPU, 1 works in this process. The result does not depend on it. From a
            script, more than one needs the usual `if __name__ == "__main__":`.
        source, licence: kept in the manifest.
        strict: refuse the whole split if any picture is unreadable, instead of leaving those out.
        overwrite: replace the split if it exists.
        keep: leave the split alone if it exists and was packed from the same listing in the same way.
        image: format of all pictures, "jpg", "png" or "webp"; None chooses it as said above.
        progress: called now and then with the samples done and the samples in all.

    Raises:
        BadInput: an option out of bounds, no samples, the split exists, an unfinished packing of something else is in
            the way, a full disk, nothing readable, or anything unreadable with `strict`.
    """
    out, classes = Path(out), None if classes is None else tuple(classes)
    workers = count_cpus() if workers is None else workers
    _check_options(split, shard_samples, shard_mb, max_side, quality, workers)
    if shard_samples is None:
        shard_samples = _SHARD_SAMPLES if shard_mb is None else _MAX_SHARD_SAMPLES
    if len(samples) == 0:
        raise BadInput(f"there are no pictures to pack into the split {split!r} of {out}")
    plan = Plan(
        split=split,
        samples=len(samples),
        listing=_digest_listing(samples, classes),
        image=image or _choose_format(samples),
        max_side=max_side,
        quality=quality,
        shard_samples=shard_samples,
        shard_bytes=None if shard_mb is None else round(shard_mb * 1e6),
        seed=seed,
        source=source,
        licence=licence,
    )
    with lock_folder(out):
        manifest = read_manifest_or_none_yet(out)
        if (old := manifest.splits.get(split)) is not None and not overwrite:
            if keep and old.plan == asdict(plan):
                return _summarise(out, split, old, [], was_there=True)
            has = f"already has a split {split!r} of {old.samples:,} samples"
            raise BadInput(f"{out} {has}: give another --split or folder, or --overwrite")
        if classes is not None and manifest.classes not in (None, classes):
            raise BadInput(f"{out} has a split with other classes: give another folder, or the same classes")
        work = begin(out, plan, manifest)
        order, starts = _cut_shards(samples, plan)
        shards = [work / f"{split}-{shard:06d}.tar" for shard in range(len(starts) - 1)]
        kept = [shard for shard in shards if is_finished(shard)]
        try:
            results = _write_shards(samples, plan, order, starts, shards, set(kept), workers, progress)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise BadInput(f"the disk of {out} is full: make room and run the same command again, it goes on") from None
        unreadable = [(name, reason) for result in results for name, reason in result.unreadable]
        _report_unreadable(out / f"{split}.unreadable.txt", unreadable)
        if unreadable and (strict or len(unreadable) == len(samples)):
            shutil.rmtree(work)
            raise BadInput(_refusal(out, split, unreadable, len(samples)))
        entry = publish(out, work, plan, classes, shards, results)
        duplicates = report_duplicates(out / f"{split}.duplicates.txt", _open_with_others(out, split, manifest))
    return _summarise(out, split, entry, results, kept_shards=len(kept), duplicates=duplicates)


def _summarise(
    out: Path,
    split: str,
    entry: Split,
    results: Sequence[ShardResult],
    *,
    kept_shards: int = 0,
    was_there: bool = False,
    duplicates: Mapping[str, int] | None = None,
) -> Summary:
    return Summary(
        path=out,
        split=split,
        samples=entry.samples,
        shards=len(entry.shards),
        bytes=sum(shard.bytes for shard in entry.shards),
        image=entry.image,
        unreadable=[(name, reason) for result in results for name, reason in result.unreadable],
        converted=sum(result.converted for result in results),
        shrunk=sum(result.shrunk for result in results),
        kept_shards=kept_shards,
        was_there=was_there,
        duplicates=duplicates or {},
    )


def _open_with_others(out: Path, split: str, manifest: Manifest) -> list[ShardSet]:
    """The other splits of the set that can be opened, and after them the one that was packed."""
    others = []
    for name in sorted(set(manifest.splits) - {split}):
        with suppress(BadInput):  # damaged, which is no fault of this packing
            others.append(ShardSet.open(out, name))
    return [*others, ShardSet.open(out, split)]


def _check_options(
    split: str, shard_samples: int | None, shard_mb: float | None, max_side: int | None, quality: int, workers: int
) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", split):
        raise BadInput(f"--split is {split!r}, it must be of letters, digits, - and _")
    for option, value, low, high in (
        ("--shard-samples", shard_samples, 1, _MAX_SHARD_SAMPLES),
        ("--shard-size", shard_mb, 0.1, 1_000_000),
        ("--max-side", max_side, 1, 65_500),
        ("--quality", quality, 1, 100),
        ("--workers", workers, 1, 1024),
    ):
        if value is not None and not low <= value <= high:
            raise BadInput(f"{option} is {value}, it must lie in [{low}, {high}]")


def _choose_format(samples: Sequence[SourceSample]) -> str:
    """The extension that all pictures of the set will have, by the names of those that are there."""
    there = (sample.name for sample in samples if not isinstance(sample.image, Missing))
    suffixes = {os.path.splitext(name)[1].lower() for name in there} & IMAGE_SUFFIXES
    if suffixes and suffixes <= _LOSSLESS_SUFFIXES:
        return "png"
    return "webp" if suffixes == {".webp"} else "jpg"


def _digest_listing(samples: Sequence[SourceSample], classes: tuple[str, ...] | None) -> str:
    """A digest that changes when a picture is added, removed, renamed, relabelled or of another length.

    Raises:
        ValueError: the samples do not all have the same members.
    """
    digest = hashlib.blake2b(json.dumps(classes).encode(), digest_size=16)
    members = None
    for sample in samples:
        keys = (sample.meta.keys(), sample.boxes.keys(), sample.masks.keys())
        if members is not None and keys != members:
            raise ValueError(f"{sample.name} has other meta, boxes or masks than the samples before it")
        members = keys
        masks = {extension: mask.size for extension, mask in sample.masks.items()}
        facts = [sample.name, sample.image.size, sample.label, dict(sample.meta), dict(sample.boxes), masks]
        digest.update(json.dumps(facts).encode())
    return digest.hexdigest()


def _cut_shards(samples: Sequence[SourceSample], plan: Plan) -> tuple[NDArray[np.int64], list[int]]:
    """The shuffled order of the samples, [N], and where in it each shard begins, with the end as the last."""
    keys = subkeys(sample_keys(plan.seed, np.arange(len(samples))), "pack")
    order = np.argsort(keys, kind="stable")
    if plan.shard_bytes is None:
        return order, [*range(0, len(samples), plan.shard_samples), len(samples)]
    sizes = np.fromiter((_size_in_tar(sample) for sample in samples), dtype=np.int64, count=len(samples))[order]
    ends, full_at = np.cumsum(sizes), max(1, plan.shard_bytes - tarfile.RECORDSIZE)  # a tar is filled up to that
    starts = [0]
    while starts[-1] < len(samples):
        first = starts[-1]
        full = int(np.searchsorted(ends, ends[first] - sizes[first] + full_at, side="right"))
        starts.append(min(max(full, first + 1), first + plan.shard_samples))
    return order, starts


def _size_in_tar(sample: SourceSample) -> int:
    """Bytes that a sample will take, if its picture is stored as it is."""
    facts = len(json.dumps([sample.name, dict(sample.meta), dict(sample.boxes)])) + _FACTS_BYTES
    sizes = [sample.image.size, facts, *(mask.size for mask in sample.masks.values())]
    return sum(TAR_BLOCK - (-size // TAR_BLOCK) * TAR_BLOCK for size in sizes)


def _write_shards(
    samples: Sequence[SourceSample],
    plan: Plan,
    order: NDArray[np.int64],
    starts: Sequence[int],
    shards: list[Path],
    kept: set[Path],
    workers: int,
    progress: Progress | None,
) -> list[ShardResult]:
    """Write those shards that are not yet there; the results of all, in order."""

    def make_job(shard: int) -> ShardJob:
        chosen = [samples[int(number)] for number in order[starts[shard] : starts[shard + 1]]]
        return ShardJob(shards[shard], starts[shard], chosen, plan.image, plan.max_side, plan.quality)

    results = {shard: ShardResult.read(file) for shard, file in enumerate(shards) if file in kept}
    left = [shard for shard in range(len(shards)) if shard not in results]
    done = sum(len(result.rows) + len(result.unreadable) for result in results.values())
    if progress:
        progress(done, len(samples))
    jobs = (make_job(shard) for shard in left)
    for number, result in map_in_processes(write_shard, jobs, min(workers, len(left))):
        results[left[number]] = result
        done += len(result.rows) + len(result.unreadable)
        if progress:
            progress(done, len(samples))
    return [results[shard] for shard in range(len(shards))]


def _report_unreadable(file: Path, unreadable: list[tuple[str, str]]) -> None:
    if unreadable:
        write_atomically(file, "".join(f"{name}\t{reason}\n" for name, reason in sorted(unreadable)).encode())
    else:
        file.unlink(missing_ok=True)


def _refusal(out: Path, split: str, unreadable: list[tuple[str, str]], samples: int) -> str:
    name, reason = min(unreadable)
    return (
        f"{len(unreadable):,} of {samples:,} pictures cannot be read, so nothing was packed; {name}: {reason}; "
        f"{out / split}.unreadable.txt lists them all"
    )
