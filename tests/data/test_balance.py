"""Balanced orders: classes by their rule, samples of a class alike, and nothing that depends on who asks."""

from pathlib import Path

import numpy as np
import pytest

from foreseen.data.balance import BalancedOrder
from foreseen.data.batch import BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import FolderListing
from foreseen.data.views import Request, View
from foreseen.errors import BadInput

SIZES = (90, 40, 10)
LABELS = np.random.default_rng(0).permutation(np.repeat([2, 0, 7], SIZES))  # class numbers with gaps
CLASSES = (2, 0, 7)


def _period(order: BalancedOrder, number: int = 0) -> np.ndarray:
    length = int(order.targets.sum())
    return order.samples(np.arange(number * length, (number + 1) * length))


def test_full_balance_shows_all_classes_alike_and_sqrt_by_the_root_of_their_sizes() -> None:
    for balance, expected in (("full", (90, 90, 90)), ("sqrt", (90, 60, 30))):
        seen = LABELS[_period(BalancedOrder(0, LABELS, balance))]
        assert tuple((seen == label).sum() for label in CLASSES) == expected


@pytest.mark.parametrize("balance", ["full", "sqrt"])
def test_at_any_moment_the_samples_of_a_class_have_been_seen_equally_often(balance: str) -> None:
    order = BalancedOrder(3, LABELS, balance)
    for periods in (1, 2, 5):
        counts = np.bincount(np.concatenate([_period(order, n) for n in range(periods)]), minlength=len(LABELS))
        for label in CLASSES:
            of_class = counts[label == LABELS]
            assert of_class.min() >= 1
            assert of_class.max() - of_class.min() <= 1


def test_classes_are_mixed_along_the_way() -> None:
    seen = LABELS[_period(BalancedOrder(0, LABELS, "full"))]
    for part in np.split(seen, 9):
        assert all(3 <= (part == label).sum() <= 19 for label in CLASSES)  # 10 are expected


def test_a_position_reads_the_same_sample_however_it_is_asked_for() -> None:
    order = BalancedOrder(1, LABELS, "sqrt")
    positions = np.arange(150, 420)  # over the end of a period
    whole = order.samples(positions)
    assert whole.tolist() == [int(order.samples(np.array([position]))[0]) for position in positions]


def test_the_seed_and_the_period_choose_the_order() -> None:
    order = BalancedOrder(0, LABELS, "full")
    assert _period(order).tolist() != _period(order, 1).tolist()
    assert _period(order).tolist() != _period(BalancedOrder(1, LABELS, "full")).tolist()
    assert BalancedOrder(0, LABELS, "full").name != BalancedOrder(0, LABELS, "sqrt").name


def test_an_epoch_is_as_long_as_without_balance() -> None:
    assert BalancedOrder(0, LABELS, "full").num_samples == len(LABELS)


def test_the_order_does_not_change_between_versions() -> None:
    assert BalancedOrder(0, LABELS, "sqrt").samples(np.arange(8)).tolist() == [49, 54, 38, 32, 63, 76, 26, 8]


REQUEST = Request(views=(View("image", (16, 16)),), labels=True)


def test_batches_are_balanced_within_a_subset_and_alike_on_any_ranks(small_shards: Path) -> None:
    shards = ShardSet.open(small_shards, "train")
    assert shards.labels is not None
    rare = np.concatenate([np.flatnonzero(shards.labels == 0)[:2], np.flatnonzero(shards.labels == 1)])
    subset = np.sort(rare)
    builder = BatchBuilder(shards, REQUEST, 0, balance="full")
    whole = StreamDataset(builder, BatchLayout(24, 24), 0, subset)
    batch = whole[0]
    assert batch.label is not None
    assert batch.label.bincount().tolist() == [12, 12]
    assert set(batch.sample.tolist()) == set(subset.tolist())
    cut = [
        StreamDataset(builder, BatchLayout(24, 4, 3), rank, subset)[micro] for rank in range(3) for micro in range(2)
    ]
    assert [sample for part in cut for sample in part.sample.tolist()] == batch.sample.tolist()


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_samples_are_as_balanced_and_alike_on_any_ranks(small_shards: Path, repeats: int) -> None:
    shards = ShardSet.open(small_shards, "train")
    assert shards.labels is not None
    subset = np.concatenate([np.flatnonzero(shards.labels == 0)[:2], np.flatnonzero(shards.labels == 1)])
    builder = BatchBuilder(shards, REQUEST, 0, balance="full", repeats=repeats)
    whole = StreamDataset(builder, BatchLayout(12, 12), 0, subset)
    alone = BalancedOrder(0, shards.labels[subset], "full")
    each = 12 // repeats
    for step in range(8):
        samples = whole[step].sample.numpy()
        # One by one they are the samples of the balanced stream itself, none left out and none twice.
        assert samples[:each].tolist() == subset[alone.samples(np.arange(step * each, (step + 1) * each))].tolist()
        assert samples.tolist() == samples[:each].tolist() * repeats
    period = np.concatenate([whole[step].label for step in range(2 * repeats)])  # 24 places, of 12 and 12
    assert np.bincount(period).tolist() == [12 * repeats, 12 * repeats]
    cut = [
        StreamDataset(builder, BatchLayout(12, 2, 3), rank, subset)[2 + micro] for rank in range(3) for micro in (0, 1)
    ]
    assert [sample for part in cut for sample in part.sample.tolist()] == whole[1].sample.tolist()
    assert whole.order.name == f"balanced by class, full, {repeats} times each in 12"


def test_what_cannot_be_balanced_is_refused_with_a_sentence(
    small_shards: Path, picture_folder: Path, tmp_path: Path
) -> None:
    layout = BatchLayout(4, 4)
    shards = ShardSet.open(small_shards, "train")
    with pytest.raises(BadInput, match=r"data.balance full takes samples from any shard: set data.order=full"):
        BatchBuilder(shards, REQUEST, 0, balance="full", block_shards=2).feed(layout, 0)
    shards.labels = np.array(shards.labels)
    shards.labels[11] = -1
    with pytest.raises(BadInput, match=r"sample trained on, and train-000001.tar: sample 1 \(key \d+\) has none"):
        BatchBuilder(shards, REQUEST, 0, balance="sqrt").feed(layout, 0)
    pack(FolderListing(picture_folder), tmp_path / "plain", "train", workers=1)
    plain = ShardSet.open(tmp_path / "plain", "train")
    with pytest.raises(BadInput, match="data.balance sqrt needs labels, and .* has none"):
        BatchBuilder(plain, Request(views=REQUEST.views), 0, balance="sqrt").feed(layout, 0)
