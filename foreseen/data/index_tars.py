"""An index and a manifest for tars that others made: what `foreseen data index` does. The tars are only read.

The index is the one that `pack` writes, so everything that reads packed sets reads these. What pack knows and others do
not say stays open: checksums and channel statistics are 0 and null unless they are asked for, since they need every
picture's bytes, and the index alone needs none of them.
"""

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.decode import DecodeError, decode
from foreseen.data.manifest import FILE_NAME, Manifest, Shard, Split, read_manifest, write_manifest
from foreseen.data.parallel import count_cpus, map_in_processes
from foreseen.data.publish import lock_folder, save_array
from foreseen.data.shards import INDEX_ROW, TAR_BLOCK, rows_digest
from foreseen.data.store import MAX_BYTES
from foreseen.data.tar_labels import LabelRule, ShardLabels, number_texts, read_labels
from foreseen.data.tar_samples import Fault, count_up, group_members, name_some
from foreseen.data.tars import read_tar
from foreseen.data.write_shard import channel_statistics
from foreseen.errors import BadInput

_MAX_32_BITS = 1 << 32


@dataclass(frozen=True)
class IndexOptions:
    """What is looked up.

    Attributes:
        image: extension of the member that is the picture; None takes the first picture of a sample (jpg before png).
        labels: where they stand; None takes `KEY.cls` where every sample has one.
        checksums: read every picture for its crc32.
        statistics: decode every picture for the mean and standard deviation of each channel.
    """

    image: str | None = None
    labels: LabelRule | None = None
    checksums: bool = False
    statistics: bool = False


@dataclass
class IndexedShard:
    """What one tar holds.

    Attributes:
        rows: of the index.
        rule: where labels were read,
        labels: and which, before they are numbered.
        faults: why it cannot be indexed.
        extensions: how many samples have a picture of each extension.
        passed_over: members that nobody reads, by what they are.
        several_pictures: samples with more than one, of which one is read.
        statistics: sums over pictures of each channel's mean and mean square, [2, 3].
        undecodable: pictures left out of that.
    """

    rows: NDArray[Any]
    rule: LabelRule
    labels: ShardLabels
    bytes: int
    faults: list[Fault]
    extensions: dict[str, int]
    passed_over: dict[str, int]
    several_pictures: int
    statistics: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, 3)))
    undecodable: int = 0


@dataclass(frozen=True)
class Indexed:
    """What was indexed of one split.

    Attributes:
        split, entry: its name, and what the manifest says of it.
        labels: where they were read; "none" where they were not.
        notes: what a user should know of the tars, in words.
    """

    split: str
    entry: Split
    labels: str
    notes: tuple[str, ...]


def index_tars(
    splits: dict[str, list[Path]],
    out: Path,
    options: IndexOptions,
    *,
    classes: tuple[str, ...] | None = None,
    source: str | None = None,
    licence: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Indexed]:
    """Write the index of some tars and make them splits of the set in a folder, which may be another than theirs.

    Args:
        splits: tars of each split, in the order that the set will have.
        out: folder of manifest and index.
        options: what is looked up.
        classes: names of the classes that labels count.
        source, licence: kept in the manifest.
        workers: processes; None is one a CPU. The result does not depend on it.
        overwrite: replace splits that exist.
        progress: called now and then with the tars done and in all.

    Raises:
        BadInput: a tar cannot be indexed, labels make no sense, a split exists, or the folder cannot be written.
    """
    workers = count_cpus() if workers is None else workers
    if not 1 <= workers <= 1024:
        raise BadInput(f"--workers is {workers}, it must lie in [1, 1024]")
    if out.exists() and not os.access(out, os.W_OK):
        raise BadInput(f"{out} cannot be written: give --out DIR, and the index and manifest are put there")
    with lock_folder(out):
        manifest = read_manifest(out) if (out / FILE_NAME).exists() else Manifest({})
        if (there := [split for split in splits if split in manifest.splits]) and not overwrite:
            raise BadInput(f"{out} already has a split {there[0]!r}: give another --split, or --overwrite")
        files = [file for tars in splits.values() for file in tars]
        found = _index_all(files, options, workers, progress)
        others = {name: entry for name, entry in manifest.splits.items() if name not in splits}
        known = manifest.classes if others else None
        rule, numbers, classes = _number(found, options, classes or known, files[0].parent)
        if classes is not None and known not in (None, classes):
            raise BadInput(f"{out} has a split with other classes: give another --out, or the same classes")
        if there:  # from here to the end they do not exist, so no manifest ever names a mixture
            write_manifest(out, replace(manifest, splits=others))
        result = []
        for split, tars in splits.items():
            mine, found = found[: len(tars)], found[len(tars) :]
            entry = _write(out, split, tars, mine, numbers, options, rule)
            entry = replace(entry, source=source, licence=licence)
            result.append(Indexed(split, entry, str(rule), _notes(mine)))
        entries = {indexed.split: indexed.entry for indexed in result}
        write_manifest(out, Manifest(others | entries, classes or known))
    return result


def _index_all(
    files: Sequence[Path], options: IndexOptions, workers: int, progress: Callable[[int, int], None] | None
) -> list[IndexedShard]:
    shards: dict[int, IndexedShard] = {}
    jobs = ((file, options) for file in files)
    for number, shard in map_in_processes(_index_tar, jobs, min(workers, len(files))):
        if shard.faults:
            place = files[0] if len(files) == 1 else files[0].parent
            raise BadInput(_refusal(files[number], place, shard.faults, options.image))
        shards[number] = shard
        if progress:
            progress(len(shards), len(files))
    return [shards[number] for number in range(len(files))]


def _number(
    shards: Sequence[IndexedShard], options: IndexOptions, classes: tuple[str, ...] | None, folder: Path
) -> tuple[LabelRule, dict[str, int], tuple[str, ...] | None]:
    """Where the labels of all tars stand, the number of each, and the names of the classes."""
    texts = {text for shard in shards for text in shard.labels.texts}
    rule = options.labels or LabelRule("cls" if texts and all(shard.rule.extension for shard in shards) else None)
    if rule.extension is None:
        return rule, {}, None
    return rule, *number_texts(texts, f"--labels {rule} of {folder}", classes)


def _index_tar(job: tuple[Path, IndexOptions]) -> IndexedShard:
    """What a worker process does with one tar."""
    file, options = job
    tar = read_tar(file)
    if tar.problem is not None:
        raise BadInput(f"{tar.problem}: `foreseen data repair {file.parent} OUT` makes a clean copy of what is whole")
    samples = group_members(tar)
    faults = samples.faults(options.image)
    if not samples.keys:
        faults = [Fault("no picture", "", "it holds no samples")]
    pictures = samples.pictures(options.image)
    shard = IndexedShard(
        rows=np.zeros(len(pictures), dtype=INDEX_ROW),
        rule=LabelRule(None),
        labels=ShardLabels([], np.full(len(pictures), -1, dtype=np.int32)),
        bytes=file.stat().st_size,
        faults=faults,
        extensions={},
        passed_over=samples.passed_over(),
        several_pictures=samples.several_pictures() if options.image is None else 0,
    )
    if faults:
        return shard
    offset, size = samples.offset[pictures], samples.size[pictures]
    for values, limit, what in ((offset, _MAX_32_BITS * TAR_BLOCK, "begins"), (size, _MAX_32_BITS, "ends")):
        if (values >= limit).any():
            number = int(np.argmax(values >= limit))
            reason = f"its picture {what} after {limit:,} bytes, which an index cannot say"
            shard.faults.append(Fault("too large", samples.keys[number], reason))
            return shard
    shard.rows["offset_512"], shard.rows["size"] = offset // TAR_BLOCK, size
    names, counts = np.unique(samples.extension[pictures], return_counts=True)
    shard.extensions = {samples.extensions[name]: int(count) for name, count in zip(names, counts, strict=True)}
    shard.rule = options.labels or LabelRule("cls" if (samples.members("cls") >= 0).all() else None)
    shard.labels = read_labels(file, samples, shard.rule)
    if options.checksums or options.statistics:
        _read_pictures(file, shard, options)
    return shard


def _read_pictures(file: Path, shard: IndexedShard, options: IndexOptions) -> None:
    with open(file, "rb", buffering=0) as tar:
        for row in shard.rows:
            size = int(row["size"])
            if size > MAX_BYTES:
                shard.undecodable += 1
                continue
            data = os.pread(tar.fileno(), size, int(row["offset_512"]) * TAR_BLOCK)
            if options.checksums:
                row["crc32"] = zlib.crc32(data)
            if options.statistics:
                try:
                    shard.statistics += channel_statistics(decode(data, fast=False))
                except DecodeError:
                    shard.undecodable += 1


def _write(
    out: Path,
    split: str,
    tars: Sequence[Path],
    shards: Sequence[IndexedShard],
    numbers: dict[str, int],
    options: IndexOptions,
    rule: LabelRule,
) -> Split:
    """Write index and labels of one split; what the manifest will say of it."""
    rows = np.concatenate([shard.rows for shard in shards])
    save_array(out / f"{split}.index.npy", rows)
    labels_file = labels_digest = None
    if rule.extension is not None:
        tables = [np.array([*(numbers[text] for text in shard.labels.texts), -1], np.int32) for shard in shards]
        found = (table[shard.labels.codes] for table, shard in zip(tables, shards, strict=True))
        labels = np.concatenate([*found]).astype("<i4")
        labels_file, labels_digest = f"{split}.labels.npy", rows_digest(labels)
        save_array(out / labels_file, labels)
    mean = std = None
    if options.statistics and (counted := len(rows) - sum(shard.undecodable for shard in shards)):
        means, squares = np.sum([shard.statistics for shard in shards], axis=0) / counted
        mean, std = means, np.sqrt(np.maximum(squares - means**2, 0))
    extensions = count_up(shard.extensions for shard in shards)
    return Split(
        samples=len(rows),
        shards=tuple(Shard(file.name, len(shard.rows), shard.bytes) for file, shard in zip(tars, shards, strict=True)),
        image=options.image or next(iter(extensions)),
        index=f"{split}.index.npy",
        index_digest=rows_digest(rows),
        labels=labels_file,
        labels_digest=labels_digest,
        mean=None if mean is None else tuple(mean.round(6).tolist()),
        std=None if std is None else tuple(std.round(6).tolist()),
        source=None,
        licence=None,
        plan={"indexed": asdict(options) | {"labels": str(rule)}},
    )


def _refusal(file: Path, place: Path, faults: list[Fault], image: str | None) -> str:
    kinds = count_up({fault.kind: 1} for fault in faults)
    kind = next(iter(kinds))
    first = next(fault for fault in faults if fault.kind == kind)
    names = name_some([fault.key for fault in faults if fault.kind == kind and fault.key])
    counts = ", ".join(f"{count:,} {name}" for name, count in kinds.items())
    remedy = f"`foreseen data repair {place} OUT` makes a clean copy, `foreseen data check {file}` lists them all"
    if image is not None and kind == "no picture":
        remedy = "give another --image, or none"
    return f"{file} cannot be indexed: {counts} ({names + ': ' if names else ''}{first.reason}): {remedy}"


def _notes(shards: Sequence[IndexedShard]) -> tuple[str, ...]:
    notes = []
    if over := count_up(shard.passed_over for shard in shards):
        notes.append("never opened: " + ", ".join(f"{count:,} {what}" for what, count in over.items()))
    extensions = count_up(shard.extensions for shard in shards)
    if len(extensions) > 1:
        notes.append("pictures are " + ", ".join(f"{count:,} {name}" for name, count in extensions.items()))
    if several := sum(shard.several_pictures for shard in shards):
        notes.append(f"{several:,} samples have several pictures: one is read, jpg before png; --image EXT chooses")
    if undecodable := sum(shard.undecodable for shard in shards):
        notes.append(f"{undecodable:,} pictures cannot be decoded: `foreseen data check` names them")
    return tuple(notes)
