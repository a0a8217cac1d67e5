"""A batch is a function of the seed and its positions: ranks, micro-batches, workers and damage change nothing else."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset, SweepDataset, load
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import FolderListing
from foreseen.data.views import Draw, Request, View
from foreseen.errors import BadInput
from foreseen.keys import sample_keys

GLOBAL_SIZE, STEPS, SAMPLES = 16, 3, 37
DAMAGED = range(4, 37, 6)


def draw_numbers(generator: np.random.Generator, position: int) -> NDArray[np.float64]:
    return generator.beta(0.8, 0.8, size=3)


def tell_position(generator: np.random.Generator, position: int) -> NDArray[np.int64]:
    return np.array(position)


REQUEST = Request(
    views=(
        View("input", (24, 32), count=2),
        View("tokenizer", (12, 16), count=2, window_of="input"),
        View("centre", (16, 16), crop="centre"),
    ),
    draws=(
        Draw("numbers", draw_numbers),
        Draw("pair", draw_numbers, group=2),
        Draw("place", tell_position),
        Draw("place of pair", tell_position, group=2),
    ),
    labels=True,
)


def stream(
    shards: ShardSet, *, ranks: int = 1, micro_size: int = GLOBAL_SIZE, rank: int = 0, seed: int = 5, **more: Any
) -> StreamDataset:  # fmt: skip
    builder = BatchBuilder(shards, REQUEST, seed)
    return StreamDataset(builder, BatchLayout(GLOBAL_SIZE, micro_size, ranks), rank, **more)


def rows(batches: Iterator[Batch]) -> dict[int, dict[str, Tensor]]:
    """What each position of the stream holds."""
    found: dict[int, dict[str, Tensor]] = {}
    for batch in batches:
        fields = {"key": batch.key, "sample": batch.sample, "label": batch.label, **batch.draws}
        crops = {name: x.unflatten(0, (-1, len(batch))).transpose(0, 1) for name, x in batch.images.items()}
        for row, position in enumerate(batch.position.tolist()):
            assert position not in found
            found[position] = {name: x[row] for name, x in {**fields, **crops}.items()}
    return found


def assert_same(one: dict[int, dict[str, Tensor]], two: dict[int, dict[str, Tensor]]) -> None:
    assert one.keys() == two.keys()
    for position, fields in one.items():
        for name, value in fields.items():
            assert torch.equal(value, two[position][name]), (position, name)


def all_ranks(shards: ShardSet, ranks: int, micro_size: int) -> Iterator[Batch]:
    numbers = range(STEPS * GLOBAL_SIZE // (ranks * micro_size))
    for rank in range(ranks):
        dataset = stream(shards, ranks=ranks, micro_size=micro_size, rank=rank)
        yield from load(dataset, numbers, workers=0, pin_memory=False)


@pytest.fixture(scope="module")
def shards(small_shards: Path) -> ShardSet:
    return ShardSet.open(small_shards, "train")


@pytest.fixture(scope="module")
def whole(shards: ShardSet) -> dict[int, dict[str, Tensor]]:
    return rows(all_ranks(shards, 1, 16))


@pytest.mark.parametrize(("ranks", "micro_size"), [(1, 8), (2, 8), (4, 4), (16, 1)])
def test_batches_do_not_depend_on_ranks_and_micro_batches(
    ranks: int, micro_size: int, shards: ShardSet, whole: dict[int, dict[str, Tensor]]
) -> None:
    assert set(whole) == set(range(STEPS * GLOBAL_SIZE))
    assert_same(whole, rows(all_ranks(shards, ranks, micro_size)))


def test_batches_do_not_depend_on_workers(shards: ShardSet, whole: dict[int, dict[str, Tensor]]) -> None:
    dataset = stream(shards, ranks=2, micro_size=4, rank=1)
    found = rows(load(dataset, range(STEPS * 2), workers=2, pin_memory=False))
    assert list(found) == [position for position in whole if position % GLOBAL_SIZE >= 8]  # in their order
    assert_same({position: whole[position] for position in found}, found)


def test_a_loader_starts_at_any_batch(shards: ShardSet, whole: dict[int, dict[str, Tensor]]) -> None:
    found = rows(load(stream(shards, micro_size=8), range(3, 5), workers=0, pin_memory=False))
    assert list(found) == list(range(24, 40))
    assert_same({position: whole[position] for position in found}, found)


def test_ranks_take_consecutive_slices_of_a_step(shards: ShardSet) -> None:
    batch = stream(shards, ranks=2, micro_size=4, rank=1)[3]  # the rank's second micro-batch of step 1
    assert batch.position.tolist() == [28, 29, 30, 31]


def test_an_epoch_shows_every_sample_once_and_the_next_one_other_crops(whole: dict[int, dict[str, Tensor]]) -> None:
    place = {int(whole[position]["sample"]): position for position in range(SAMPLES)}
    assert sorted(place) == list(range(SAMPLES))
    again = whole[SAMPLES]
    before = whole[place[int(again["sample"])]]
    assert again["label"] == before["label"]
    assert torch.equal(again["centre"], before["centre"])
    assert not torch.equal(again["input"], before["input"])
    assert not torch.equal(again["numbers"], before["numbers"])


def test_another_seed_is_another_stream(shards: ShardSet, whole: dict[int, dict[str, Tensor]]) -> None:
    other = rows(iter([stream(shards, seed=6)[0]]))
    assert [int(fields["sample"]) for fields in other.values()] != [int(whole[p]["sample"]) for p in other]
    assert len({int(fields["key"]) for fields in (*other.values(), *whole.values())}) == GLOBAL_SIZE * (STEPS + 1)


def test_a_pair_shares_a_draw_and_samples_do_not(whole: dict[int, dict[str, Tensor]]) -> None:
    numbers = torch.stack([whole[position]["numbers"] for position in range(16)])
    pairs = torch.stack([whole[position]["pair"] for position in range(16)])
    assert torch.equal(pairs[0::2], pairs[1::2])
    assert len(numbers[:, 0].unique()) == 16
    assert len(pairs[:, 0].unique()) == 8


def test_draws_use_every_bit_of_the_key(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    close = np.array([(1 << 64) - 1, (1 << 64) - 2, (1 << 63) - 1, (1 << 63) - 2], dtype=np.uint64)
    monkeypatch.setattr("foreseen.data.loader.sample_keys", lambda seed, positions: close[: len(positions)])
    drawn = stream(shards, micro_size=4)[0].draws["numbers"]
    assert len(drawn[:, 0].unique()) == 4


def test_labels_are_those_of_the_samples(shards: ShardSet, whole: dict[int, dict[str, Tensor]]) -> None:
    for fields in whole.values():
        assert int(fields["label"]) == shards.labels[int(fields["sample"])]
        # conftest's pictures: the class is the channel that rises from left to right
        rise = fields["centre"][0].float().diff(dim=2).mean((1, 2))
        assert int(rise.argmax()) == int(fields["label"])


def test_a_subset_is_a_stream_of_its_own(shards: ShardSet) -> None:
    subset = np.array([3, 5, 8, 13, 21, 34], dtype=np.int64)
    batch = stream(shards, subset=subset)[0]
    assert sorted(batch.sample[:6].tolist()) == sorted(batch.sample[6:12].tolist()) == subset.tolist()


@pytest.fixture
def damaged(small_shards: Path, tmp_path: Path) -> ShardSet:
    """The set with a flipped byte in each sample of DAMAGED."""
    shutil.copytree(small_shards, tmp_path / "damaged")
    shards = ShardSet.open(tmp_path / "damaged", "train")
    for number in DAMAGED:
        data = shards.read(number)
        for shard in (tmp_path / "damaged").glob("train*.tar"):
            raw = bytearray(shard.read_bytes())
            if (at := raw.find(data)) >= 0:
                raw[at + len(data) // 2] ^= 1
                shard.write_bytes(raw)
    return ShardSet.open(tmp_path / "damaged", "train")


def test_a_damaged_sample_is_replaced_without_moving_any_other(
    damaged: ShardSet, whole: dict[int, dict[str, Tensor]]
) -> None:
    batches = list(all_ranks(damaged, 1, 16))
    found = rows(iter(batches))
    replaced = {position for position in whole if int(whole[position]["sample"]) in DAMAGED}
    assert replaced
    assert_same({p: whole[p] for p in whole if p not in replaced}, {p: found[p] for p in found if p not in replaced})
    for position in replaced:
        assert int(found[position]["sample"]) not in DAMAGED
        assert found[position]["key"] == whole[position]["key"]
        assert found[position]["label"] == damaged.labels[int(found[position]["sample"])]
    assert_same(found, rows(all_ranks(damaged, 2, 4)))

    problems = [problem for batch in batches for problem in batch.problems]
    assert len(problems) >= len(replaced)  # a substitute may be damaged too
    assert {problem.sample for problem in problems} <= set(DAMAGED)
    for problem in problems:
        assert str(problem).count("train-") == 1
        assert "crc32 differs" in problem.reason
        assert problem.key in problem.reason
        assert problem.position in found


def test_a_substitute_comes_from_the_same_subset(damaged: ShardSet) -> None:
    batch = stream(damaged, subset=np.array([4, 7], dtype=np.int64))[0]
    assert set(batch.sample.tolist()) == {7}


def test_a_set_with_nothing_readable_is_refused_with_a_sentence(damaged: ShardSet) -> None:
    with pytest.raises(BadInput, match=r"21 samples in a row .* pack it again"):
        stream(damaged, subset=np.array([4, 10], dtype=np.int64))[0]


def test_labels_that_a_set_has_not_are_refused(picture_folder: Path, tmp_path: Path) -> None:
    pack(FolderListing(picture_folder), tmp_path / "set", "train", workers=1)
    with pytest.raises(BadInput, match="holds no labels"):
        BatchBuilder(ShardSet.open(tmp_path / "set", "train"), REQUEST, 0)


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("subset", [None, np.arange(0, 37, 2)])
def test_a_sweep_shows_every_sample_once(ranks: int, subset: NDArray[np.int64] | None, shards: ShardSet) -> None:
    builder = BatchBuilder(shards, REQUEST, 0)
    seen = []
    for rank in range(ranks):
        sweep = SweepDataset(builder, 5, rank=rank, ranks=ranks, subset=subset)
        for batch in load(sweep, range(len(sweep)), workers=0, pin_memory=False):
            assert len(batch) <= 5
            seen.extend(batch.sample.tolist())
    assert sorted(seen) == list(range(37) if subset is None else subset)


def test_a_layout_that_does_not_divide_names_the_sizes_that_do() -> None:
    with pytest.raises(BadInput, match=r"global_size 16 is not a multiple of 2 ranks × .*micro_size 5 .* 1, 2, 4, 8"):
        BatchLayout(16, 5, ranks=2)
    with pytest.raises(BadInput, match=r"set batch\.global_size to a multiple of 3"):
        BatchLayout(16, 1, ranks=3)


def test_keys_of_a_batch_are_those_of_its_positions(whole: dict[int, dict[str, Tensor]]) -> None:
    expected = sample_keys(5, np.arange(STEPS * GLOBAL_SIZE)).view(np.int64).tolist()
    assert [int(whole[position]["key"]) for position in range(STEPS * GLOBAL_SIZE)] == expected


def test_a_draw_is_told_the_position_of_its_group(shards: ShardSet) -> None:
    batch = stream(shards)[2]
    assert torch.equal(batch.draws["place"], batch.position)
    assert torch.equal(batch.draws["place of pair"], batch.position // 2 * 2)


def test_blocks_of_shards_are_a_stream_of_their_own_and_take_subsets(shards: ShardSet) -> None:
    def blocks(subset: NDArray[np.int64] | None = None) -> StreamDataset:
        return BatchBuilder(shards, REQUEST, 5, block_shards=2).feed(BatchLayout(4, 4), 0, subset)

    found = [blocks()[number].sample.tolist() for number in range(12)]
    assert sorted(list(itertools.chain(*found))[:37]) == list(range(37))
    assert found != [stream(shards, micro_size=4)[number].sample.tolist() for number in range(12)]
    first = {sample // 10 for sample in itertools.chain(*found[:4])}  # 16 of at least 17 samples of the first block
    assert len(first) == 2
    subset = np.array([36, 3, 5, 21, 13, 34, 8, 30], dtype=np.int64)
    taken = [sample for number in range(2) for sample in blocks(subset)[number].sample.tolist()]
    assert sorted(taken) == sorted(subset.tolist())


def test_a_picture_larger_than_any_may_be_is_replaced_before_it_is_read(small_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_shards, tmp_path / "set"))
    index = np.load(folder / "train.index.npy")
    index["size"][7] = 0xFFFFFFFF
    np.save(folder / "train.index.npy", index)
    batch = stream(ShardSet.open(folder, "train"), subset=np.array([7, 8], dtype=np.int64))[0]
    assert set(batch.sample.tolist()) == {8}
    (reason,) = {problem.reason for problem in batch.problems}
    assert "sample 7 (key 000000007) has 4,294,967,295 bytes, more than the 67,108,864 allowed" in reason
