"""Pictures that are there twice, or nearly: what `foreseen data check --near-duplicates` adds to its findings.

Across splits a pair is a leak, and a fault. Within a split it is told and is no fault: sets are what they are.
"""

from collections.abc import Sequence
from pathlib import Path

from foreseen.data.check import Findings, Progress, choose_workers
from foreseen.data.duplicates import LEAK, NEAR_LEAK, Pair, describe_pair, exact_duplicates
from foreseen.data.manifest import read_manifest
from foreseen.data.near_duplicates import near_duplicates
from foreseen.data.shards import ShardSet
from foreseen.data.store import LocalStore
from foreseen.errors import BadInput


def check_duplicates(
    found: Findings,
    folder: Path,
    *,
    split: str | None = None,
    shards_at: Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Look for pictures that are alike, and add them to what a check of the same set has found.

    Args:
        found: of `check_set`; gets faults, `duplicates` and notes.
        folder, split, shards_at, workers: as they were given to `check_set`.
        progress: called now and then with the pictures decoded and those in all.
    """
    sets = []
    for name in read_manifest(folder).splits if split is None else [split]:
        try:
            sets.append(ShardSet.open(folder, name, LocalStore(shards_at or folder)))
        except BadInput as error:
            found.notes.append(f"near duplicates in {name} were not looked for: {error}")
    near = near_duplicates(sets, choose_workers(workers, sum(map(len, sets))), progress=progress)
    pairs = _describe_all(sets, near.pairs.tolist(), exact_duplicates(sets).tolist())
    across = [pair for pair in pairs if pair.kind in (LEAK, NEAR_LEAK)]
    known = {fault for fault in found.faults if isinstance(fault, Pair)}
    found.faults += [pair for pair in across if pair not in known]
    found.duplicates = [pair for pair in pairs if pair.kind not in (LEAK, NEAR_LEAK)]
    found.notes.append(f"{len(pairs):,} pairs of pictures look alike, {len(across):,} of them across splits")
    if across:
        found.notes.append(f"LEAK: what one learns in one split is in another, by {len(across):,} pairs of pictures")
    if near.unreadable or near.plain:
        found.notes.append(
            f"not compared: {near.unreadable:,} pictures that cannot be decoded, {near.plain:,} without contrast"
        )


def _describe_all(
    sets: Sequence[ShardSet], near: list[tuple[int, int, int, int, int, float]], exact: list[tuple[int, int, int, int]]
) -> list[Pair]:
    """All pairs in order; the exact ones are among the near ones but for pages without contrast."""
    likeness = dict.fromkeys(exact, (0, 1.0)) | {row[:4]: row[4:] for row in near}
    return [
        describe_pair(sets[first], sample, sets[second], other, *likeness[first, sample, second, other])
        for first, sample, second, other in sorted(likeness)
    ]
