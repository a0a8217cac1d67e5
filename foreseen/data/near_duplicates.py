"""Pictures that look alike, within and across splits: one shot re-encoded, rescaled, slightly cropped or retouched.

Three steps. Every picture is decoded once to a 64-bit hash and a thumbnail: the hash tells which of the lowest 8 x 8
cosine coefficients of its 32 x 32 grey lie above their median (Zauner 2010, "Implementation and Benchmarking of
Perceptual Image Hash Functions"). Pairs of hashes that differ in few bits are then looked up, not compared all with
all: cut into four parts of 16 bits, two hashes with at most 10 different bits have at most 2 in one of three parts, or
at most 1 in the fourth (multi-index hashing, Norouzi et al. 2012, arXiv:1307.2982). At last the thumbnails of each pair
are correlated, which decides. A million hashes are looked up in half a minute on one core, with 0.4 GB.

Thumbnails lie in a file that is removed at the end, a kilobyte a picture or less; the rest is 20 bytes a picture.
"""

import itertools
import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from foreseen.data.decode import decode
from foreseen.data.shards import CorruptSample, ShardSet
from foreseen.processes import exit_with_the_parent

PAIR = np.dtype(
    [("set", "<u2"), ("sample", "<i8"), ("other_set", "<u2"), ("other", "<i8"), ("distance", "u1"), ("likeness", "<f4")]
)
MAX_DISTANCE = 10
MIN_LIKENESS = 0.9  # of Oxford-IIIT Pet, every pair above it shows one shot or one moment

_THUMBNAIL = 16
_CHUNK = 256  # pictures decoded by one task
_LEAST_CONTRAST = 4.0  # grey levels; below it a hash is noise
_PARTS, _PART_BITS = 4, 16
_BLOCK = 1_000_000  # pairs compared at once, few enough for a cache

Uint64s = NDArray[np.uint64]


@dataclass(frozen=True)
class NearDuplicates:
    """What was found.

    Attributes:
        pairs: rows of `PAIR`: the numbers of both sets in the order given and of the samples in them, different bits of
            the hashes, correlation of the thumbnails. Of many that are alike each is paired with the first, so that the
            pairs join what belongs together.
        unreadable: samples that could not be decoded, in all sets.
        plain: samples without contrast (blank pages), which are all alike and were not compared.
    """

    pairs: NDArray[Any]
    unreadable: int
    plain: int


def near_duplicates(
    sets: Sequence[ShardSet],
    workers: int,
    *,
    mirrored: bool = False,
    max_distance: int = MAX_DISTANCE,
    min_likeness: float = MIN_LIKENESS,
    progress: Callable[[int, int], None] | None = None,
) -> NearDuplicates:
    """Find the pictures of some splits that look alike; byte-identical ones are among them.

    Args:
        sets: splits, of one set or of several.
        workers: processes that decode; 1 works in this process.
        mirrored: find pairs, too, of which one is the mirror image of the other.
        max_distance: most bits in which the hashes differ, in [0, 10].
        min_likeness: least correlation of the thumbnails, in [0, 1].
        progress: called now and then with the pictures decoded and those in all.

    Raises:
        ValueError: max_distance is out of bounds.
    """
    if not 0 <= max_distance <= MAX_DISTANCE:
        raise ValueError(f"max_distance is {max_distance}, it must lie in [0, {MAX_DISTANCE}]")
    sizes = [len(data) for data in sets]
    shape = (sum(sizes), _THUMBNAIL, _THUMBNAIL, 3)
    hashes, mirrored_hashes = np.zeros((2, sum(sizes)), np.uint64)
    contrast = np.zeros(sum(sizes), np.float32)
    with tempfile.TemporaryFile() as file:
        thumbnails = np.memmap(file, np.uint8, "w+", shape=shape) if sum(sizes) else np.zeros(shape, np.uint8)
        for start, looks in _look_at_all(sets, workers):
            part = slice(start, start + len(looks.contrast))
            hashes[part], mirrored_hashes[part] = looks.hashes
            contrast[part], thumbnails[part] = looks.contrast, looks.thumbnails
            if progress:
                progress(part.stop, sum(sizes))
        compared = np.flatnonzero(contrast >= _LEAST_CONTRAST)
        kept = hashes[compared]
        rows = [_verify(compared[_alike(kept, max_distance)], hashes, hashes, thumbnails)]
        if mirrored:
            pairs = compared[_alike_mirrored(kept, mirrored_hashes[compared], max_distance)]
            rows.append(_verify(pairs, hashes, mirrored_hashes, thumbnails, mirrored=True))
    found = np.concatenate(rows)
    found = found[found["likeness"] >= min_likeness]
    _, once = np.unique(found[["sample", "other"]], return_index=True)  # some pictures are their own mirror image
    found = found[once]
    starts = np.cumsum([0, *sizes])
    for number, which in (("sample", "set"), ("other", "other_set")):
        found[which] = np.searchsorted(starts, found[number], side="right") - 1
        found[number] -= starts[found[which]]
    plain = (contrast >= 0) & (contrast < _LEAST_CONTRAST)
    return NearDuplicates(found, int((contrast < 0).sum()), int(plain.sum()))


@dataclass(frozen=True)
class _Looks:
    """Of some samples: hashes upright and mirrored [2, n], contrast [n] (-1: unreadable), thumbnails [n, 16, 16, 3]."""

    hashes: Uint64s
    contrast: NDArray[np.float32]
    thumbnails: NDArray[np.uint8]


_SETS: list[ShardSet] = []  # of a worker process


def _start_worker(sets: Sequence[ShardSet]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    exit_with_the_parent()
    _SETS[:] = sets


def _look_in_worker(chunk: tuple[int, range]) -> _Looks:
    return _look_at(_SETS[chunk[0]], chunk[1])


def _look_at_all(sets: Sequence[ShardSet], workers: int) -> Iterator[tuple[int, _Looks]]:
    """The looks of all samples in order, and the number of the first of each lot, counted through all sets."""
    chunks = [
        (number, range(start, min(start + _CHUNK, len(data))))
        for number, data in enumerate(sets)
        for start in range(0, len(data), _CHUNK)
    ]
    starts = itertools.accumulate((len(samples) for _, samples in chunks), initial=0)
    if workers <= 1:
        yield from zip(starts, (_look_at(sets[number], samples) for number, samples in chunks), strict=False)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(chunks) or 1), context, _start_worker, (sets,)) as pool:
        yield from zip(starts, pool.map(_look_in_worker, chunks), strict=False)


def _look_at(data: ShardSet, samples: range) -> _Looks:
    hashes, contrast = np.zeros((2, len(samples)), np.uint64), np.full(len(samples), -1, np.float32)
    thumbnails = np.zeros((len(samples), _THUMBNAIL, _THUMBNAIL, 3), np.uint8)
    for row, sample in enumerate(samples):
        try:
            picture = Image.fromarray(decode(data.read(sample), fast=False))
        except (CorruptSample, OSError):
            continue
        grey = np.asarray(picture.convert("L").resize((32, 32), Image.Resampling.BILINEAR), np.float32)
        hashes[:, row], contrast[row] = perceptual_hashes(grey), grey.std()
        thumbnails[row] = np.asarray(picture.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BILINEAR))
    return _Looks(hashes, contrast, thumbnails)


def perceptual_hashes(grey: NDArray[np.float32]) -> Uint64s:
    """The hashes of a grey picture [32, 32] and of its mirror image, [2]."""
    low: NDArray[np.float32] = dctn(grey, norm="ortho")[:8, :9]
    # The mean says nothing; the next coefficient of its row takes its place.
    upright = np.where(np.arange(64).reshape(8, 8) == 0, low[0, 8], low[:, :8])
    mirrored = upright * np.where(np.arange(8) % 2, -1, 1)  # which negates the odd cosines along a row
    bits = [values.ravel() > np.median(values) for values in (upright, mirrored)]
    hashes: Uint64s = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return hashes


def _alike(hashes: Uint64s, max_distance: int) -> NDArray[np.int64]:
    """Pairs [M, 2], the lower number first, whose hashes differ in few bits; of equal ones each with the first."""
    distinct, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    equal = np.stack([first[which], np.arange(len(hashes))], axis=1)
    near = first[_join(distinct, distinct, max_distance)]
    pairs = np.concatenate([equal, near])
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _alike_mirrored(hashes: Uint64s, mirrored: Uint64s, max_distance: int) -> NDArray[np.int64]:
    """The same, where the second is seen in a mirror."""
    (upright, first), (turned, first_turned) = (np.unique(found, return_index=True) for found in (hashes, mirrored))
    near = _join(upright, turned, max_distance)
    pairs = np.stack([first[near[:, 0]], first_turned[near[:, 1]]], axis=1)
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    return np.unique(np.sort(pairs, axis=1), axis=0)


def _join(left: Uint64s, right: Uint64s, max_distance: int) -> NDArray[np.int64]:
    """Every pair (i, j), [M, 2], with at most `max_distance` different bits between left[i] and right[j].

    Where both are the same array, each pair comes in one order only.
    """
    found = [np.empty((0, 2), np.int64)]
    for part in range(_PARTS):
        # Where every part differs in one bit more than is looked up, all of them differ in more than max_distance.
        flips = _flips((max_distance + 1 + part) // _PARTS - 1)
        # In the order of their parts, partners lie side by side, and reading them is reading on.
        (keys, order, ours), (other_keys, other_order, theirs) = (_by_part(side, part) for side in (left, right))
        starts = np.r_[0, np.cumsum(np.bincount(other_keys, minlength=1 << _PART_BITS))]
        for flip in flips:
            wanted = keys ^ flip
            counts = starts[wanted + 1] - starts[wanted]
            if left is right:
                counts[wanted < keys] = 0
            for block in _blocks(counts):
                until = np.cumsum(counts[block])
                if not until[-1]:
                    continue
                j = np.arange(until[-1]) + np.repeat(starts[wanted[block]] - until + counts[block], counts[block])
                near = np.flatnonzero(_count_bits(np.repeat(ours[block], counts[block]) ^ theirs[j]) <= max_distance)
                i = block.start + np.searchsorted(until, near, side="right")
                found.append(np.stack([order[i], other_order[j[near]]], axis=1))
    pairs: NDArray[np.int64] = np.unique(np.concatenate(found), axis=0)
    return pairs


def _flips(distance: int) -> list[int]:
    """What a part may differ by, in at most so many bits; nothing for -1."""
    return [
        sum(1 << bit for bit in bits)
        for count in range(distance + 1)
        for bits in itertools.combinations(range(_PART_BITS), count)
    ]


def _by_part(hashes: Uint64s, part: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Uint64s]:
    """One part of each hash, sorted; where the hashes stood; the hashes in that order."""
    keys = ((hashes >> np.uint64(part * _PART_BITS)) & np.uint64(0xFFFF)).astype(np.int64)
    order = np.argsort(keys, kind="stable")
    return keys[order], order, hashes[order]


def _blocks(counts: NDArray[np.int64]) -> Iterator[slice]:
    """Cut rows into runs whose counts sum up to about `_BLOCK`, or to none."""
    sums = np.cumsum(counts)
    start = 0
    while start < len(counts):
        done = sums[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(sums, done + _BLOCK, side="right")))
        yield slice(start, stop)
        start = stop


def _count_bits(values: Uint64s) -> NDArray[Any]:
    """How many bits of each number are set."""
    if hasattr(np, "bitwise_count"):  # numpy 2
        return np.asarray(np.bitwise_count(values))
    return np.asarray(np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(1))


def _verify(
    pairs: NDArray[np.int64],
    hashes: Uint64s,
    other_hashes: Uint64s,
    thumbnails: NDArray[np.uint8],
    *,
    mirrored: bool = False,
) -> NDArray[Any]:
    """Rows of `PAIR` for pairs of samples, counted through all sets, with distance and likeness."""
    rows = np.zeros(len(pairs), PAIR)
    rows["sample"], rows["other"] = pairs.T
    rows["distance"] = _count_bits(hashes[pairs[:, 0]] ^ other_hashes[pairs[:, 1]])
    for start in range(0, len(pairs), 4096):
        block = slice(start, start + 4096)
        first, other = (thumbnails[numbers].astype(np.float32) for numbers in pairs[block].T)
        rows["likeness"][block] = _correlation(first, other[:, :, ::-1] if mirrored else other)
    return rows


def _correlation(first: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pearson correlation of each picture [n, H, W, 3] with its partner, [n]."""
    first, other = (side.reshape(len(side), -1) for side in (first, other))
    first, other = (side - side.mean(1, keepdims=True) for side in (first, other))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(other, axis=1)
    correlation: NDArray[np.float32] = (first * other).sum(1) / np.maximum(norms, 1e-6)
    return correlation
