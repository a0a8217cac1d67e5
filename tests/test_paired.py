"""Paired differences and their interval, against numbers worked by hand."""

import pytest

from foreseen.paired import paired_difference


def test_the_interval_is_students() -> None:
    # Differences 1, 2, 3: mean 2, sd 1, t(0.975, 2) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138.
    difference = paired_difference([11, 22, 33], [10, 20, 30])
    assert difference.each == (1, 2, 3)
    assert difference.mean == 2
    assert difference.low == pytest.approx(2 - 2.484138, abs=1e-5)
    assert difference.high == pytest.approx(2 + 2.484138, abs=1e-5)


def test_luck_that_both_sides_share_does_not_widen_the_interval() -> None:
    difference = paired_difference([10.0, 50.0, 90.0], [5.0, 45.0, 85.0])
    assert difference.low == difference.high == pytest.approx(5)


def test_one_pair_allows_no_interval() -> None:
    difference = paired_difference([3.0], [1.0])
    assert (difference.mean, difference.low, difference.high) == (2, None, None)


def test_sides_of_different_lengths_or_none_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no pair"):
        paired_difference([], [])
