"""Counts, sizes, modes, colours and labels of the pictures of a split, from their headers."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreseen.data.decode import DecodeError, decode
from foreseen.data.picture_header import Header, look_at_header
from foreseen.data.pictures import Pictures
from foreseen.data.shards import CorruptSample
from foreseen.data.write_shard import channel_statistics
from foreseen.errors import BadInput

PERCENTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True)
class Labels:
    """How the labels of a split are spread.

    Attributes:
        labelled, unlabelled: samples with a label, and without.
        classes: samples of each class by its name, in the order of the classes; 0 for those that have none here.
    """

    labelled: int
    unlabelled: int
    classes: Mapping[str, int]


@dataclass(frozen=True)
class Statistics:
    """What the pictures of a split are like.

    Attributes:
        samples: pictures in the split.
        looked_at: those whose header was read, for all that follows but bytes and labels.
        unreadable: those of them that have no header that can be read.
        bytes: of all pictures together.
        spread: of "width", "height", "ratio" (width / height), "megapixels" and "bytes": the `PERCENTILES`.
        formats: pictures of each format.
        modes: pictures of each kind of pixel, such as "RGB, 8 bits".
        mean, std: of each channel in [0, 1], every picture weighing the same; None where none could be decoded.
        measured_on: pictures that mean and std were measured on; 0 where the manifest has them.
        labels: None without labels.
    """

    samples: int
    looked_at: int
    unreadable: int
    bytes: int
    spread: Mapping[str, list[float]]
    formats: Mapping[str, int]
    modes: Mapping[str, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    measured_on: int
    labels: Labels | None


def measure(
    pictures: Pictures,
    classes: tuple[str, ...] | None,
    colours: tuple[tuple[float, ...], tuple[float, ...]] | None,
    *,
    samples: int | None,
    decoded: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Measure the pictures of a split.

    Args:
        pictures: the split.
        classes: names of the labels' classes.
        colours: mean and std that the manifest has; measured if None.
        samples: pictures whose headers are read, drawn at random; None reads all.
        decoded: most pictures that are decoded where mean and std must be measured.
        seed: of the draw.
        progress: called now and then with the headers read and those to read.
    """
    chosen = _draw(len(pictures), samples, seed)
    headers: list[Header] = []
    for done, sample in enumerate(chosen.tolist()):
        try:
            headers.append(look_at_header(pictures, sample))
        except (CorruptSample, OSError, BadInput):
            continue
        if progress:
            progress(done + 1, len(chosen))
    sizes = pictures.sizes()
    measured_on = 0
    if colours is None:
        colours, measured_on = _colours(pictures, chosen[:: max(1, len(chosen) // max(1, decoded))][:decoded])
    widths, heights = (np.array([getattr(header, side) for header in headers], float) for side in ("width", "height"))
    spread = {"width": widths, "height": heights, "ratio": widths / heights, "megapixels": widths * heights / 1e6}
    spread |= {"bytes": sizes.astype(float)}
    return Statistics(
        samples=len(pictures),
        looked_at=len(chosen),
        unreadable=len(chosen) - len(headers),
        bytes=int(sizes.sum(dtype=np.uint64)),
        spread={name: np.percentile(found, PERCENTILES).tolist() for name, found in spread.items() if len(found)},
        formats=dict(Counter(header.format for header in headers).most_common()),
        modes=dict(Counter(f"{header.mode}, {_count_bits(header.bits)}" for header in headers).most_common()),
        mean=None if colours is None else colours[0],
        std=None if colours is None else colours[1],
        measured_on=measured_on,
        labels=_labels(pictures.labels, classes),
    )


def _draw(total: int, samples: int | None, seed: int) -> NDArray[np.int64]:
    """Numbers of the samples to look at, rising, so that shards are read from front to back."""
    if samples is None or samples >= total:
        return np.arange(total)
    drawn = np.random.default_rng(seed).choice(total, samples, replace=False, shuffle=False)
    return np.sort(drawn).astype(np.int64)


def _count_bits(bits: int) -> str:
    return f"{bits} bits" if bits != 1 else "1 bit"


def _colours(
    pictures: Pictures, samples: NDArray[np.int64]
) -> tuple[tuple[tuple[float, ...], tuple[float, ...]] | None, int]:  # fmt: skip
    """Mean and std of the channels over some pictures, and how many could be decoded."""
    moments = []
    for sample in samples.tolist():
        try:
            pixels = decode(pictures.read(sample), fast=False)
        except (DecodeError, CorruptSample, OSError, BadInput):
            continue
        moments.append(channel_statistics(pixels))
    if not moments:
        return None, 0
    mean, square = np.mean(moments, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    return (tuple(mean.round(6).tolist()), tuple(std.round(6).tolist())), len(moments)


def _labels(labels: NDArray[np.int32] | None, classes: tuple[str, ...] | None) -> Labels | None:
    if labels is None:
        return None
    counts: dict[int, int] = {}
    for start in range(0, len(labels), 1 << 24):  # mapped from disk, and never taken whole
        numbers, found = np.unique(labels[start : start + (1 << 24)], return_counts=True)
        for number, count in zip(numbers.tolist(), found.tolist(), strict=True):
            counts[number] = counts.get(number, 0) + count
    unlabelled = counts.pop(-1, 0)
    names = classes or tuple(str(number) for number in range(max(counts, default=-1) + 1))
    return Labels(sum(counts.values()), unlabelled, {name: counts.get(number, 0) for number, name in enumerate(names)})
