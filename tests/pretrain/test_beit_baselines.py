"""What BEiT's accuracy stands beside: guesses that need no network."""

import pytest
import torch

from foreseen.pretrain.beit_baselines import NearestVisible


@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 6)])
def test_the_nearest_visible_patch_is_found_on_any_grid(grid: tuple[int, int]) -> None:
    patches, columns = grid[0] * grid[1], grid[1]
    mask = torch.rand(20, patches, generator=torch.Generator().manual_seed(0)) < 0.8
    mask[:, patches // 2] = False  # at least one is seen
    found = NearestVisible(grid)(mask, torch.arange(patches).expand(len(mask), -1))
    for image in range(len(mask)):
        visible = (~mask[image]).nonzero()[:, 0].tolist()
        for place in range(patches):

            def distance(other: int, place: int = place) -> int:
                return (other // columns - place // columns) ** 2 + (other % columns - place % columns) ** 2

            assert found[image, place] == min(visible, key=lambda other: (distance(other), other))
