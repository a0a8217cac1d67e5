"""Is a set what its manifest says, to the last byte? What `foreseen data check` does.

`check_shard.py` looks at one shard. Here are the manifest and its files, and what shows itself between shards only: a
key in two of them, samples with other members than the rest, the same picture in two splits. Near duplicates are
looked for by `check_duplicates.py`.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.arrays import map_array
from foreseen.data.check_shard import CheckedShard, CheckJob, check_shard
from foreseen.data.duplicates import LEAK, NEAR_LEAK, Pair, describe_pair
from foreseen.data.manifest import WORK_PREFIX, Manifest, Split, read_manifest, write_manifest
from foreseen.data.parallel import count_cpus, map_in_processes
from foreseen.data.publish import lock_folder, save_array
from foreseen.data.shards import INDEX_ROW, ShardSet, rows_digest
from foreseen.data.store import LocalStore
from foreseen.data.tar_labels import LabelRule
from foreseen.data.tar_samples import Fault, count_up
from foreseen.errors import BadInput

Progress = Callable[[int, int], None]


@dataclass
class Findings:
    """What a check found.

    Attributes:
        place: what was checked.
        splits: of each, the shards and samples that are there, and their bytes.
        faults: all of them, those of a shard together.
        notes: what is no fault but good to know, in words.
        duplicates: pictures that are alike within a split, which is none either; see `check_duplicates.py`.
        decoded: pictures were decoded, not only compared with their checksums.
        without_checksum: samples whose checksum is not known.
        is_indexed: there is an index; else the structure alone was checked.
    """

    place: str
    splits: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    duplicates: list[Pair] = field(default_factory=list)
    decoded: bool = True
    without_checksum: int = 0
    is_indexed: bool = True


def check_set(
    folder: Path,
    *,
    split: str | None = None,
    shards_at: Path | None = None,
    decode: bool = True,
    write_checksums: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Findings:
    """Check the splits of a packed or indexed set.

    Args:
        folder: of the manifest.
        split: the one to check; all if None.
        shards_at: folder of the tars; that of the manifest if None.
        decode: decode every picture, which takes nearly all of the time.
        write_checksums: put the checksums of splits that have none into their index, where nothing is wrong with them.
        workers: processes; None is one a CPU.
        progress: called now and then with the samples done and in all.

    Raises:
        BadInput: there is no set or no such split.
    """
    manifest = read_manifest(folder)
    if split is not None and split not in manifest.splits:
        raise BadInput(f"--split is {split!r}, {folder} has {', '.join(sorted(manifest.splits)) or 'none'}")
    chosen = {name: entry for name, entry in manifest.splits.items() if split in (None, name)}
    found = Findings(str(folder), decoded=decode)
    at = shards_at or folder
    found.faults += _strays(at, manifest, chosen)
    tables = {name: _Table(folder, name, entry, found) for name, entry in chosen.items()}
    places = [(name, number) for name, entry in chosen.items() for number in range(len(entry.shards))]
    jobs = (job for table in tables.values() for job in table.jobs(at, manifest.classes, decode=decode))
    done, total = 0, sum(entry.samples for entry in chosen.values())
    workers = choose_workers(workers, len(places))
    for place, shard in map_in_processes(check_shard, jobs, workers):
        name, number = places[place]
        tables[name].take(number, shard)
        done += chosen[name].shards[number].samples
        if progress:
            progress(done, total)
    for table in tables.values():
        table.finish(found)
    _find_leaks(at, tables, found)
    if write_checksums:
        _write_checksums(folder, tables, found)
    else:
        found.without_checksum = sum(table.unknown for table in tables.values())
    return found


def check_tars(
    files: Sequence[Path], *, image: str | None = None, workers: int | None = None, progress: Progress | None = None
) -> Findings:
    """Check the structure of tars without an index: headers, keys and members, but no contents."""
    found = Findings(str(files[0] if len(files) == 1 else files[0].parent), decoded=False, is_indexed=False)
    jobs = (CheckJob(file, 0, 0, None, None, LabelRule(None), None, image, False, False) for file in files)
    shards: dict[int, CheckedShard] = {}
    workers = choose_workers(workers, len(files))
    for number, shard in map_in_processes(check_shard, jobs, workers):
        shards[number] = shard
        if progress:
            progress(len(shards), len(files))
    ordered = [shards[number] for number in range(len(files))]
    for file, shard in zip(files, ordered, strict=True):
        found.faults += [replace(fault, shard=file.name) for fault in shard.faults]
    found.splits[""] = (len(files), sum(s.samples for s in ordered), sum(s.bytes for s in ordered))
    found.notes += _notes("", [file.name for file in files], ordered)
    return found


def choose_workers(asked: int | None, jobs: int) -> int:
    """Processes for so many jobs.

    Raises:
        BadInput: too few or too many were asked for.
    """
    if asked is not None and not 1 <= asked <= 1024:
        raise BadInput(f"--workers is {asked}, it must lie in [1, 1024]")
    return min(count_cpus() if asked is None else asked, max(1, jobs))


class _Table:
    """One split: its index and labels, and what its shards turned out to hold."""

    def __init__(self, folder: Path, name: str, entry: Split, found: Findings) -> None:
        self.name, self.entry, self.folder = name, entry, folder
        self.starts = [0, *accumulate(shard.samples for shard in entry.shards)]
        self.index = self._load(entry.index, INDEX_ROW, found)
        self.labels = None if entry.labels is None else self._load(entry.labels, np.dtype("<i4"), found)
        self.shards: dict[int, CheckedShard] = {}
        self.is_half_written = False  # a writing of checksums was stopped between the index and the manifest
        if self.index is not None and (digest := rows_digest(self.index)) != entry.index_digest:
            blank = self.index.copy()
            blank["crc32"] = 0
            self.is_half_written = rows_digest(blank) == entry.index_digest
            if not self.is_half_written:
                reason = f"{entry.index} has changed since it was written: its digest is {digest}"
                found.faults.append(Fault("index", "", reason, split=name))

    @property
    def unknown(self) -> int:
        """Samples without a checksum."""
        return 0 if self.index is None else int((self.index["crc32"] == 0).sum())

    def _load(self, file: str, dtype: np.dtype[Any], found: Findings) -> NDArray[Any] | None:
        try:
            return map_array(self.folder / file, dtype, self.entry.samples)
        except BadInput as error:
            found.faults.append(Fault("index", "", str(error), split=self.name))
            return None

    def jobs(self, at: Path, classes: tuple[str, ...] | None, *, decode: bool) -> Iterator[CheckJob]:
        plan = dict((self.entry.plan or {}).get("indexed") or {})
        for number, shard in enumerate(self.entry.shards):
            rows = slice(self.starts[number], self.starts[number + 1])
            yield CheckJob(
                file=at / shard.name,
                samples=shard.samples,
                bytes=shard.bytes,
                rows=np.zeros(0, INDEX_ROW) if self.index is None else np.array(self.index[rows]),
                labels=None if self.labels is None else np.array(self.labels[rows]),
                rule=LabelRule.parse(str(plan.get("labels", "none"))),
                classes=classes,
                image=plan.get("image") if self.entry.is_indexed else self.entry.image,
                is_ours=not self.entry.is_indexed,
                decode=decode,
            )

    def take(self, number: int, shard: CheckedShard) -> None:
        self.shards[number] = shard

    def finish(self, found: Findings) -> None:
        """Take down what the shards hold, and compare them with one another."""
        names = [shard.name for shard in self.entry.shards]
        shards = [self.shards[number] for number in range(len(names))]
        for name, shard in zip(names, shards, strict=True):
            found.faults += [replace(fault, shard=name, split=self.name) for fault in shard.faults]
        there = sum(any(shard.keys) or shard.bytes > 0 for shard in shards)
        found.splits[self.name] = (there, sum(s.samples for s in shards), sum(s.bytes for s in shards))
        notes = _notes(self.name, names, shards)
        if self.entry.is_indexed:
            found.notes += notes
            return
        found.notes += [note for note in notes if "never opened" in note]
        for name, extensions, count, key, norm in _odd_members(names, shards):
            more = f" and {count - 1:,} more of this shard" if count > 1 else ""
            reason = f"it has the members {', '.join(extensions)}{more}, and most have {', '.join(norm)}"
            found.faults.append(Fault("members", key, reason, name, self.name))
        for name, count in _repeated_keys(names, shards):
            reason = f"{count:,} of its keys stand in another shard of the split, too"
            found.faults.append(Fault("duplicate key", "", reason, name, self.name))

    def digests(self) -> NDArray[np.uint64]:
        """Size and crc32 of every picture, 0 where it could not be read."""
        return np.concatenate(
            [self.shards[n].digests for n in range(len(self.entry.shards))] or [np.zeros(0, np.uint64)]
        )

    def as_set(self, at: Path) -> ShardSet:
        """Its pictures, whatever is wrong with the labels."""
        assert self.index is not None
        return ShardSet(self.folder, self.name, self.entry, None, self.index, None, LocalStore(at), str(self.folder))


def _strays(at: Path, manifest: Manifest, chosen: dict[str, Split]) -> list[Fault]:
    """Tars that readers who go by file names would take for part of a split."""
    if not at.is_dir():
        raise BadInput(f"{at} is no folder: --shards-at is the folder of the tars")
    named = {shard.name for entry in manifest.splits.values() for shard in entry.shards}
    found = []
    for name in sorted(os.listdir(at)):
        split = next((split for split in chosen if re.fullmatch(rf"{re.escape(split)}-\d{{6,}}\.tar", name)), None)
        if split is not None and name not in named:
            reason = "it is no part of the split, and readers that go by file names take it for one"
            found.append(Fault("stray", "", reason, name, split))
        elif name.startswith(WORK_PREFIX):
            found.append(Fault("stray", "", f"{name} is left of a packing that was not finished"))
    return found


def _odd_members(
    names: Sequence[str], shards: Sequence[CheckedShard]
) -> Iterator[tuple[str, tuple[str, ...], int, str, tuple[str, ...]]]:
    """Sets of members other than the most frequent one: shard, members, samples, the first key, and the usual ones."""
    total = count_up({extensions: count for extensions, (count, _) in shard.member_sets.items()} for shard in shards)
    norm: tuple[str, ...] = next(iter(total), ())
    for name, shard in zip(names, shards, strict=True):
        for extensions, (count, key) in shard.member_sets.items():
            if extensions != norm:
                yield name, extensions, count, key, norm


def _repeated_keys(names: Sequence[str], shards: Sequence[CheckedShard]) -> list[tuple[str, int]]:
    """Shards with keys that an earlier shard has, and how many."""
    keys = np.concatenate([shard.keys for shard in shards] or [np.zeros(0, np.uint64)])
    owner = np.repeat(np.arange(len(shards)), [len(shard.keys) for shard in shards])
    order = np.argsort(keys, kind="stable")
    later = order[1:][(keys[order][1:] == keys[order][:-1])]
    counts = np.bincount(owner[later], minlength=len(shards))
    return [(names[number], int(counts[number])) for number in np.flatnonzero(counts).tolist()]


def _notes(split: str, names: Sequence[str], shards: Sequence[CheckedShard]) -> list[str]:
    of = f" of {split}" if split else ""
    notes = []
    if over := count_up(shard.passed_over for shard in shards):
        notes.append(f"never opened{of}: " + ", ".join(f"{count:,} {what}" for what, count in over.items()))
    odd = sum(count for _, _, count, _, _ in _odd_members(names, shards))
    if odd:
        name, extensions, _, key, norm = next(_odd_members(names, shards))
        such = f"such as {key} in {name} with {', '.join(extensions)}"
        notes.append(f"{odd:,} samples{of} have other members than {', '.join(norm)}: {such}")
    if repeated := _repeated_keys(names, shards):
        count = sum(count for _, count in repeated)
        notes.append(f"{count:,} keys{of} stand in several shards, such as in {repeated[0][0]}: give shard and key")
    return notes


def _find_leaks(at: Path, tables: dict[str, "_Table"], found: Findings) -> None:
    """The same picture in two splits, byte for byte."""
    digests = {name: table.digests() for name, table in tables.items() if table.index is not None}
    sets = {name: tables[name].as_set(at) for name in digests}
    for one, other in combinations(digests, 2):
        common = np.intersect1d(digests[one], digests[other])
        first, second = _rows_of(digests[one], common), _rows_of(digests[other], common)
        for digest in common[common != 0].tolist():
            pair = describe_pair(sets[one], first[digest], sets[other], second[digest])
            if pair.kind == LEAK:
                found.faults.append(pair)


def _rows_of(digests: NDArray[np.uint64], common: NDArray[np.uint64]) -> dict[int, int]:
    """The first row of each digest."""
    (rows,) = np.nonzero(np.isin(digests, common))
    return {int(digests[row]): row for row in rows[::-1].tolist()}


def _write_checksums(folder: Path, tables: dict[str, "_Table"], found: Findings) -> None:
    """Fill in the checksums that are not known; what is already there stays."""
    with lock_folder(folder):
        for name, table in tables.items():
            if table.index is None or not (table.unknown or table.is_half_written):
                continue
            if any(fault.split == name and fault.kind not in (LEAK, NEAR_LEAK) for fault in found.faults):
                found.notes.append(f"the checksums of {name} were not written, since it has faults")
                found.without_checksum += table.unknown
                continue
            manifest = read_manifest(folder)
            if manifest.splits.get(name) != table.entry:
                found.notes.append(f"the checksums of {name} were not written, since it was packed anew meanwhile")
                found.without_checksum += table.unknown
                continue
            rows = np.array(table.index)
            crc32 = np.concatenate([table.shards[number].crc32 for number in range(len(table.entry.shards))])
            rows["crc32"] = np.where(rows["crc32"] == 0, crc32, rows["crc32"])
            save_array(folder / table.entry.index, rows)
            # The pictures are the same, and runs that were begun without checksums go on.
            first = table.entry.first_digest or table.entry.index_digest
            entry = replace(table.entry, index_digest=rows_digest(rows), first_digest=first)
            write_manifest(folder, replace(manifest, splits={**manifest.splits, name: entry}))
            found.notes.append(f"wrote the checksums of {len(rows):,} samples of {name} into {table.entry.index}")
