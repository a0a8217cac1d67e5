"""The folder side of packing: who may write, what an unfinished packing left, and the moment a split comes to exist.

The work happens in OUT/.packing-SPLIT: `plan.json` says what is being packed, and each finished shard has a json beside
it. Publishing moves the shards out and replaces the manifest last; a kill at any point before that leaves no split,
and the same command goes on.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.manifest import (
    FILE_NAME,
    WORK_PREFIX,
    Manifest,
    Shard,
    Split,
    read_manifest,
    write_manifest,
)
from foreseen.data.shards import INDEX_ROW, rows_digest
from foreseen.data.write_shard import ShardResult, done_file
from foreseen.errors import BadInput
from foreseen.files import locked, read_json, sync, write_atomically

_LOCK = ".packing.lock"


@dataclass(frozen=True)
class Plan:
    """What is being packed and how: two packings with equal plans give the same bytes.

    Attributes:
        listing: digest of the samples' names, sizes and facts, and of the class names.
        shard_samples, shard_bytes: at how many samples, and how many bytes to be expected, a shard is full.
    """

    split: str
    samples: int
    listing: str
    image: str
    max_side: int | None
    quality: int
    shard_samples: int
    shard_bytes: int | None
    seed: int
    source: str | None
    licence: str | None


@contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """Make the folder and keep other packings out of it; a folder that stays empty is removed again.

    Raises:
        BadInput: another process is packing into it, or it is not a folder that can be written.
    """
    file = out / _LOCK
    with ExitStack() as held:
        try:
            out.mkdir(parents=True, exist_ok=True)
            number = held.enter_context(locked(file, waits=False))
        except (FileExistsError, NotADirectoryError, PermissionError) as error:
            raise BadInput(f"{out} cannot be written ({error.strerror}): give another folder") from None
        if number is None:
            raise BadInput(f"another process is packing into {out}: wait until it has finished")
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            if not os.listdir(out):
                out.rmdir()


def read_manifest_or_none_yet(out: Path) -> Manifest:
    """The manifest of the set in a folder, without splits if the folder is new or its first packing was killed.

    Raises:
        BadInput: the folder holds something else.
    """
    if (out / FILE_NAME).exists():
        return read_manifest(out)
    if others := sorted(name for name in os.listdir(out) if not name.startswith(".")):
        ours = any(name.startswith(WORK_PREFIX) for name in os.listdir(out))
        if not ours and not all(name.endswith(".unreadable.txt") for name in others):
            raise BadInput(
                f"{out} holds other files ({others[0]}): give a new or empty folder, or one with a packed set"
            )
    return Manifest({})


def begin(out: Path, plan: Plan, manifest: Manifest) -> Path:
    """Make the work folder, or take up one that a killed packing with the same plan left.

    Raises:
        BadInput: an unfinished packing with another plan is in the way.
    """
    work = out / f"{WORK_PREFIX}{plan.split}"
    plan_file = work / "plan.json"
    if plan_file.exists() and (found := read_json(plan_file)) != asdict(plan):
        published = manifest.splits.get(plan.split)
        if published is None or published.plan != found:  # else it was killed after its last act, and left only litter
            raise BadInput(
                f"{work} holds an unfinished packing of {_difference(found, plan)}: finish it with the command that "
                "began it, or delete that folder"
            )
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    for part in work.glob("*.part"):
        part.unlink()
    write_atomically(plan_file, json.dumps(asdict(plan), indent=1).encode())
    return work


def publish(
    out: Path,
    work: Path,
    plan: Plan,
    classes: tuple[str, ...] | None,
    shards: Sequence[Path],
    results: Sequence[ShardResult],
) -> Split:
    """Move the finished shards into the set, write index and labels, and replace the manifest last."""
    manifest = read_manifest_or_none_yet(out)
    if plan.split in manifest.splits:  # from here to the end it does not exist, so no manifest ever names a mixture
        others = {name: entry for name, entry in manifest.splits.items() if name != plan.split}
        manifest = replace(manifest, splits=others)
        write_manifest(out, manifest)
    filled = [(shard, result) for shard, result in zip(shards, results, strict=True) if result.rows]
    for shard, _ in filled:
        if shard.exists():  # else a publishing that was killed has moved it
            os.replace(shard, out / shard.name)
    rows = np.array([row for _, result in filled for row in result.rows], dtype=np.int64).reshape(-1, 4)
    index = np.empty(len(rows), dtype=INDEX_ROW)
    for column, name in enumerate(("offset_512", "size", "crc32")):
        index[name] = rows[:, column]
    index_file, labels_file = f"{plan.split}.index.npy", f"{plan.split}.labels.npy"
    save_array(out / index_file, index)
    labels = rows[:, 3].astype("<i4")
    has_labels = bool((labels >= 0).any())
    if has_labels:
        save_array(out / labels_file, labels)
    mean, std = _channel_statistics(results, len(rows))
    entry = Split(
        samples=len(rows),
        shards=tuple(Shard(shard.name, len(result.rows), result.bytes) for shard, result in filled),
        image=plan.image,
        index=index_file,
        index_digest=rows_digest(index),
        labels=labels_file if has_labels else None,
        labels_digest=rows_digest(labels) if has_labels else None,
        mean=mean,
        std=std,
        source=plan.source,
        licence=plan.licence,
        plan=asdict(plan),
    )
    _remove_strays(out, plan.split, entry)
    sync(out)
    write_manifest(out, Manifest({**manifest.splits, plan.split: entry}, classes or manifest.classes))
    shutil.rmtree(work)
    return entry


def _channel_statistics(results: Sequence[ShardResult], samples: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = np.sum([result.sums for result in results], axis=0) / samples
    variance = np.sum([result.squares for result in results], axis=0) / samples - mean**2
    return tuple(mean.round(6).tolist()), tuple(np.sqrt(np.maximum(variance, 0)).round(6).tolist())


def _remove_strays(out: Path, split: str, entry: Split) -> None:
    """Delete what a replaced split had and this one has not: readers that go by file names would take it up."""
    keep = {entry.labels, *(shard.name for shard in entry.shards)}
    for file in out.iterdir():
        is_ours = re.fullmatch(rf"{re.escape(split)}(-\d{{6,}}\.tar|\.labels\.npy)", file.name)
        if is_ours and file.name not in keep:
            file.unlink()


def save_array(file: Path, array: NDArray[Any]) -> None:
    """Write or replace a `.npy` whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    with open(part, "wb") as out:
        np.save(out, array, allow_pickle=False)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)


def _difference(found: dict[str, Any], plan: Plan) -> str:
    """What an unfinished packing has that the new plan has not, in words."""
    facts = asdict(plan)
    if found.get("listing") != facts["listing"]:
        return "other pictures"
    differing = [key for key, value in facts.items() if found.get(key) != value]
    if not differing:
        return "the same pictures by another version of foreseen"
    return "the same pictures with " + ", ".join(f"{key} {found.get(key)!r}" for key in differing)


def is_finished(shard: Path) -> bool:
    """Whether an earlier packing finished this shard: it stands in the work folder, or was already moved out."""
    return done_file(shard).exists() and (shard.exists() or (shard.parent.parent / shard.name).exists())
