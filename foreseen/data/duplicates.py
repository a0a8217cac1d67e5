"""Pictures that are the same byte for byte, within a split and across splits, where they are a leak.

Size and crc32 of every picture stand in the index, so candidates cost no reading. A crc32 of 32 bits agrees by chance
once in a few ten thousand pictures of one size, so what is claimed was read again and hashed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.shards import CorruptSample, ShardSet
from foreseen.data.tar_samples import Fault
from foreseen.errors import BadInput
from foreseen.files import write_atomically
from foreseen.printable import printable

PAIR = np.dtype([("set", "<u2"), ("sample", "<i8"), ("other_set", "<u2"), ("other", "<i8")])
LEAK, NEAR_LEAK, DUPLICATE, NEAR_DUPLICATE = "leak", "near leak", "duplicate", "near duplicate"


@dataclass(frozen=True)
class Pair(Fault):
    """Two pictures that are alike. Of the kinds above two are across splits; shard, split and key are the first's.

    Attributes:
        path, other_path: names of their files before they were packed; where one is not known, its shard and key.
        other_split, other_shard, other_key: where the second is.
        distance: different bits of their hashes, of 64.
        likeness: correlation of their thumbnails.
    """

    path: str = ""
    other_path: str = ""
    other_split: str = ""
    other_shard: str = ""
    other_key: str = ""
    distance: int = 0
    likeness: float = 1.0


def exact_duplicates(sets: Sequence[ShardSet]) -> NDArray[Any]:
    """Find byte-identical pictures.

    Args:
        sets: splits, of one set or of several. Samples whose checksum is not in the index are not compared:
            `foreseen data check` fills it in.

    Returns:
        Rows of `PAIR`, sorted: a sample that is there before, and the one that repeats it. A picture that repeats
        others of its own split is paired with the first of them, and with the first of each earlier split that has it.
    """
    numbers, samples, hashes = _hash_candidates(sets)
    order = np.lexsort((samples, numbers, hashes[:, 1], hashes[:, 0]))
    numbers, samples, hashes = numbers[order], samples[order], hashes[order]
    new_picture = np.r_[True, (hashes[1:] != hashes[:-1]).any(1)] if len(order) else np.zeros(0, bool)
    picture = np.cumsum(new_picture) - 1
    firsts = np.full((int(new_picture.sum()), len(sets)), -1, np.int64)
    for number in range(len(sets)):
        of_set = np.flatnonzero(numbers == number)[::-1]  # backwards: the first of a picture is written last
        firsts[picture[of_set], number] = samples[of_set]
    rows = []
    for number in range(len(sets)):
        first = firsts[picture, number]
        repeats = (first >= 0) & ((numbers > number) | ((numbers == number) & (samples != first)))
        found = np.zeros(int(repeats.sum()), PAIR)
        found["set"], found["sample"] = number, first[repeats]
        found["other_set"], found["other"] = numbers[repeats], samples[repeats]
        rows.append(found)
    return np.sort(np.concatenate([np.zeros(0, PAIR), *rows]), order=["other_set", "other", "set"])


def _hash_candidates(sets: Sequence[ShardSet]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Set number [M], sample [M] and hash of the bytes [M, 2] of all that share size and crc32 with another sample."""
    digests = np.concatenate([np.zeros(0, np.uint64), *(data.picture_digests() for data in sets)])
    order = np.argsort(digests, kind="stable")
    same = digests[order[1:]] == digests[order[:-1]]
    is_candidate = np.zeros(len(digests), bool)
    is_candidate[order[1:][same]] = is_candidate[order[:-1][same]] = True
    is_candidate &= (digests & np.uint64(0xFFFFFFFF)) != 0  # a crc32 of 0 is not known
    counted = np.flatnonzero(is_candidate)
    starts = np.cumsum([0, *(len(data) for data in sets)])
    numbers = np.searchsorted(starts, counted, side="right") - 1
    samples = counted - starts[numbers]
    hashes = np.zeros((len(counted), 2), np.uint64)
    readable = np.ones(len(counted), bool)
    for row, (number, sample) in enumerate(zip(numbers.tolist(), samples.tolist(), strict=True)):
        try:
            digest = hashlib.blake2b(sets[number].read(sample), digest_size=16).digest()
        except (CorruptSample, OSError, BadInput):  # `data check` names those
            readable[row] = False
        else:
            hashes[row] = np.frombuffer(digest, np.uint64)
    return numbers[readable], samples[readable], hashes[readable]


def report_duplicates(file: Path, sets: Sequence[ShardSet]) -> dict[str, int]:
    """Write which pictures of the last of some splits were there before, or remove an older such report.

    A line names the picture, the split that has it too, and the picture there, separated by tabs.

    Returns:
        How many pictures of the last split repeat one of a split, by its name; those with none are left out.
    """
    last = len(sets) - 1
    pairs = exact_duplicates(sets)
    pairs = pairs[pairs["other_set"] == last]
    if not len(pairs):
        file.unlink(missing_ok=True)
        return {}
    lines = []
    for number, sample, _, other in pairs.tolist():
        lines.append("\t".join((sets[last].name(other), sets[number].split, sets[number].name(sample))) + "\n")
    write_atomically(file, "".join(sorted(lines)))
    counts = np.bincount(pairs["set"], minlength=len(sets))
    return {data.split: int(count) for data, count in zip(sets, counts, strict=True) if count}


def describe_pair(
    data: ShardSet, sample: int, others: ShardSet, other: int, distance: int = 0, likeness: float = 1.0
) -> Pair:
    """Name two pictures that look alike, and read them again to see whether they are the same byte for byte."""
    is_same = _are_same(data, sample, others, other)
    is_across = data.split != others.split
    (shard, key), (other_shard, other_key) = data.shard_and_key(sample), others.shard_and_key(other)
    path, other_path = data.name(sample), others.name(other)
    reason = f"{path} is {other_path}" if is_same else f"{path} looks like {other_path}"
    reason += f" of {others.split}" if is_across else ""
    reason += ", byte for byte" if is_same else f" ({distance} of 64 bits differ, likeness {likeness:.3f})"
    kind = (LEAK if is_same else NEAR_LEAK) if is_across else (DUPLICATE if is_same else NEAR_DUPLICATE)
    return Pair(
        kind, key, printable(reason), shard, data.split, path, other_path, others.split, other_shard, other_key,
        0 if is_same else distance, 1.0 if is_same else round(likeness, 4),
    )  # fmt: skip


def _are_same(data: ShardSet, sample: int, others: ShardSet, other: int) -> bool:
    if data.sizes()[sample] != others.sizes()[other]:
        return False
    try:
        return data.read(sample) == others.read(other)
    except (CorruptSample, OSError, BadInput):  # `data check` names those
        return False
