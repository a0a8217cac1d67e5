"""The stream holds every sample once an epoch, the same wherever and however it is asked for, in a random order."""

import pickle

import numpy as np
import pytest

from foreseen.data.order import BlockOrder, Order, RepeatedOrder

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


COUNTS = [[10, 0, 7, 13, 5, 4000, 100, 3, 9], [5], [1, 1, 1, 1], [0, 0, 6], [300] * 40]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("block_shards", [1, 4, 100])
def test_an_epoch_in_blocks_holds_every_sample_once(counts: list[int], block_shards: int) -> None:
    n = sum(counts)
    for seed, epoch in [(0, 0), (1, 3)]:
        found = BlockOrder(seed, counts, block_shards).samples(np.arange(epoch * n, (epoch + 1) * n))
        assert found.dtype == np.int64
        assert np.array_equal(np.sort(found), np.arange(n))


def test_a_position_in_blocks_reads_the_same_however_it_is_asked_for() -> None:
    counts = COUNTS[0]
    positions = np.random.default_rng(0).integers(0, 4 * sum(counts), 200)
    together = BlockOrder(3, counts, 2).samples(positions).tolist()
    assert together == [BlockOrder(3, counts, 2).samples(positions[i : i + 1])[0] for i in range(200)]
    assert pickle.loads(pickle.dumps(BlockOrder(3, counts, 2))).samples(positions).tolist() == together


def test_a_block_takes_few_shards_and_mixes_them() -> None:
    counts, order = [100] * 20, BlockOrder(0, [100] * 20, 5)
    epoch = order.samples(np.arange(2000)) // 100
    blocks = [set(epoch[start : start + 500].tolist()) for start in range(0, 2000, 500)]
    assert [len(block) for block in blocks] == [5] * 4
    assert set().union(*blocks) == set(range(len(counts)))
    assert len(set(epoch[:50].tolist())) == 5  # a batch takes from all shards of the block
    assert blocks != [
        set((order.samples(np.arange(2000, 4000)) // 100)[s : s + 500].tolist()) for s in range(0, 2000, 500)
    ]
    for start in range(0, 1500, 500):
        assert set(order.shards_ahead(start + 499)) == blocks[start // 500] | blocks[start // 500 + 1]
    following = set((order.samples(np.arange(2000, 2500)) // 100).tolist())
    assert set(order.shards_ahead(1999)) == blocks[3] | following


def test_the_full_order_is_what_it_was() -> None:
    # Checkpoints name version 1: these are its samples, in a small and in a large set.
    assert Order(3, 77).samples(np.arange(5)).tolist() == [68, 38, 57, 35, 23]
    assert Order(3, 100_003).samples(np.arange(299_995, 300_000)).tolist() == [84953, 36356, 93360, 256, 76015]


@pytest.mark.parametrize(("size", "repeats"), [(12, 3), (16, 3), (8, 2), (9, 1)])
def test_a_sample_stands_several_times_in_a_global_batch_and_not_beside_itself(size: int, repeats: int) -> None:
    order = RepeatedOrder(Order(4, 5000), repeats, size)
    plain = iter(Order(4, 5000).samples(np.arange(10_000)).tolist())
    for step in range(400):
        batch = order.samples(np.arange(step * size, (step + 1) * size))
        values, counts = np.unique(batch, return_counts=True)
        assert len(values) == -(-size // repeats)
        assert counts.max() == repeats
        assert counts.sum() == size
        assert (batch[0::2][: size // 2] != batch[1::2]).all()  # mixed with each other
        assert sorted(values.tolist()) == sorted(next(plain) for _ in values)  # nothing is left out over the epochs


def test_repeated_positions_read_the_same_however_they_are_asked_for() -> None:
    order = RepeatedOrder(BlockOrder(1, [40, 30, 50], 2), 3, 16)
    whole = order.samples(np.arange(320))
    assert whole.tolist() == [int(order.samples(np.array([p]))[0]) for p in range(320)]
    assert order.name != BlockOrder(1, [40, 30, 50], 2).name
