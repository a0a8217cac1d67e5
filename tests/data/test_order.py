"""The stream holds every sample once an epoch, the same wherever and however it is asked for, in a random order."""

import numpy as np
import pytest

from foreseen.data.order import Order

SIZES = [1, 2, 3, 5, 16, 37, 255, 4095, 4096, 4097, 5000, 8192, 8193, 100_003, 1 << 17]


@pytest.mark.parametrize("n", SIZES)
def test_an_epoch_holds_every_sample_once(n: int) -> None:
    for seed, epoch in [(0, 0), (1, 3), (2**40, 10**6)]:
        found = Order(seed, n).samples(np.arange(epoch * n, (epoch + 1) * n))
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(n))


@pytest.mark.parametrize("n", [7, 5000])
def test_a_block_that_crosses_epochs_reads_what_single_positions_read(n: int) -> None:
    order = Order(3, n)
    positions = np.concatenate([np.arange(n - 3, n + 4), np.arange(3 * n - 2, 3 * n + 2), [0, 10 * n + 1]])
    block = order.samples(positions)
    singles = [Order(3, n).samples(positions[i : i + 1])[0] for i in range(len(positions))]
    assert block.tolist() == singles
    assert order.samples(positions[::-1]).tolist() == singles[::-1]


@pytest.mark.parametrize("n", [300, 5000])
def test_other_epochs_and_seeds_have_other_orders(n: int) -> None:
    orders = [Order(seed, n).samples(np.arange(epoch * n, (epoch + 1) * n)) for seed in (0, 1) for epoch in (0, 1)]
    for i, one in enumerate(orders):
        for two in orders[:i]:
            assert (one == two).sum() < 12  # one place in n agrees by chance


def test_small_sets_are_uniform() -> None:
    # Of 5 samples each of the 25 (place, sample) pairs is as likely; few Feistel rounds would fail this badly.
    found = np.stack([Order(0, 5).samples(np.arange(e * 5, e * 5 + 5)) for e in range(4000)])
    counts = np.stack([np.bincount(column, minlength=5) for column in found.T])
    assert ((counts - 800.0) ** 2 / 800).sum() < 39.3  # chi square of 16 degrees, one in a thousand


@pytest.mark.parametrize("place", [0, 1, 2500, 4999])
def test_large_sets_are_uniform(place: int) -> None:
    order, epochs = Order(0, 5000), 1600
    found = order.samples(np.arange(epochs) * 5000 + place)
    following = order.samples(np.arange(epochs) * 5000 + (place + 1) % 5000)
    for numbers in (found, (following - found) % 5000):
        counts = np.bincount(numbers * 16 // 5000, minlength=16)
        assert ((counts - 100.0) ** 2 / 100).sum() < 44.3  # chi square of 15 degrees, one in ten thousand


def test_far_positions_cost_no_more() -> None:
    order = Order(0, 100_000_000)
    far = order.samples(np.arange(10**15, 10**15 + 10_000))
    assert len(np.unique(far)) == 10_000
    assert far.max() < 100_000_000


def test_the_order_does_not_change_between_versions() -> None:
    # A checkpoint goes on in this order; a change needs another ORDER_VERSION.
    assert Order(3, 10).samples(np.arange(12)).tolist() == [1, 0, 3, 5, 9, 8, 2, 6, 4, 7, 4, 1]
    assert Order(3, 100_000).samples(np.arange(5)).tolist() == [8805, 15342, 26516, 81871, 46963]


def test_an_empty_set_has_no_order() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Order(0, 0)
