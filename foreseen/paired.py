"""Paired comparisons: the same seeds and labels on both sides, so that their luck cancels."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

from scipy.stats import t as student_t


@dataclass(frozen=True)
class PairedDifference:
    """How far one side lies above the other, in the unit of the scores.

    Attributes:
        each: the difference of each pair.
        mean: of the differences.
        low, high: the interval that holds the true mean with the stated confidence, by Student's t; None for one pair,
            which allows none.
    """

    each: tuple[float, ...]
    mean: float
    low: float | None
    high: float | None


def paired_difference(
    treated: Sequence[float], control: Sequence[float], *, confidence: float = 0.95
) -> PairedDifference:
    """Compare two sides that were measured in pairs.

    Args:
        treated, control: scores, one for each pair in the same order.
        confidence: in (0, 1).

    Raises:
        ValueError: the sides have different lengths, or none.
    """
    each = tuple(a - b for a, b in zip(treated, control, strict=True))
    if not each:
        raise ValueError("there is no pair to compare")
    middle = mean(each)
    if len(each) == 1:
        return PairedDifference(each, middle, None, None)
    half = float(student_t.ppf((1 + confidence) / 2, len(each) - 1)) * stdev(each) / sqrt(len(each))
    return PairedDifference(each, middle, middle - half, middle + half)
