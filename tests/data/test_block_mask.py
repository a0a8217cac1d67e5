"""Blockwise masks have the statistics of the authors' generators, and hide as many patches as they promise."""

import pickle

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foreseen.data.block_mask import BlockMask, block_mask
from tests.golden_cases import load_case

DRAWS = 2000


def _masks(draw: BlockMask, draws: int = DRAWS) -> NDArray[np.bool_]:
    return np.stack([draw(np.random.default_rng(seed), seed) for seed in range(draws)])


@pytest.mark.parametrize("case", ["block_mask_official", "block_mask_small"])
def test_beits_masks_have_the_authors_counts_and_places(case: str) -> None:
    described, tensors = load_case("beit", case)
    c, values = described["config"], described["values"]
    grid, target = (c["grid"], c["grid"]), c["num_masking_patches"]
    draw = BlockMask(grid, target, min_block=c["min_num_patches"], min_aspect=c.get("min_aspect", 0.3))
    masks = _masks(draw)
    counts = masks.sum(1)
    assert counts.max() == target
    assert counts.min() >= values["min"] - 4
    standard_error = values["std"] / DRAWS**0.5
    assert counts.mean() == pytest.approx(values["mean"], abs=5 * standard_error)
    assert (counts == target).mean() == pytest.approx(values["histogram"][str(target)] / DRAWS, abs=0.05)
    found = torch.from_numpy(masks.mean(0)).reshape(grid)
    torch.testing.assert_close(found, tensors["out/position_frequency"], rtol=0, atol=0.06)


def test_beit_v2s_masks_hide_exactly_as_many_as_asked() -> None:
    described, tensors = load_case("beit2", "block_mask")
    c = described["config"]
    grid, target = (c["grid"], c["grid"]), c["num_masking_patches"]
    masks = _masks(BlockMask(grid, target, min_block=c["min_num_patches"], exact=True))
    assert (masks.sum(1) == target).all()
    found = torch.from_numpy(masks.mean(0)).reshape(grid)
    torch.testing.assert_close(found, tensors["out/position_frequency"], rtol=0, atol=0.06)


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (4, 12), (3, 2), (2, 9)])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.4, 0.8, 1.0])
def test_any_grid_and_any_target(grid: tuple[int, int], share: float) -> None:
    patches = grid[0] * grid[1]
    target = round(share * patches)
    draw = BlockMask(grid, target, min_block=2)
    counts = _masks(draw, 50).sum(1)
    assert counts.max() <= target
    assert target == 0 or counts.max() > 0  # on a tiny grid all ten attempts may be too large
    exact = _masks(BlockMask(grid, target, min_block=2, exact=True), 50)
    assert exact.shape == (50, patches)
    assert (exact.sum(1) == target).all()


def test_a_grid_of_one_row_has_no_smaller_rectangle() -> None:
    assert block_mask(np.random.default_rng(0), (1, 9), 4, min_block=2).sum() == 0
    assert block_mask(np.random.default_rng(0), (1, 9), 4, min_block=2, exact=True).sum() == 4


def test_rectangles_are_no_larger_than_the_largest_allowed() -> None:
    small, free = (_masks(BlockMask((14, 14), 75, max_block=m), 200).reshape(-1, 14, 14) for m in (16, None))

    def solid(masks: NDArray[np.bool_]) -> float:
        """Share of 6 × 6 windows that are hidden altogether."""
        windows = np.lib.stride_tricks.sliding_window_view(masks, (6, 6), axis=(1, 2))
        return float(windows.all((-1, -2)).mean())

    assert solid(small) < 0.2 * solid(free)


def test_a_mask_depends_on_its_generator_alone_and_goes_to_a_worker() -> None:
    draw = BlockMask((14, 14), 75)
    again: BlockMask = pickle.loads(pickle.dumps(draw))
    one, two = draw(np.random.default_rng(5), 1), again(np.random.default_rng(5), 2)
    assert one.dtype == np.bool_
    assert np.array_equal(one, two)
    assert not np.array_equal(one, draw(np.random.default_rng(6), 1))
