"""Relative tables at another size: the authors' numbers where they grow, and what one would expect elsewhere."""

import pytest
import torch
from timm.models.beit import gen_relative_position_index

from foreseen.models.relative_position import resize_relative_position, table_rows
from tests.golden_cases import load_case


@pytest.mark.parametrize("case", ["rel_pos_interpolation_0", "rel_pos_interpolation_1"])
def test_a_growing_square_table_equals_the_authors(case: str) -> None:
    described, tensors = load_case("beit", case)
    old, new = (described["config"][f"{which}_grid"] for which in ("old", "new"))
    found = resize_relative_position(tensors["in/table"], (old, old), (new, new))
    torch.testing.assert_close(found, tensors["out/table_new"], **described["tolerance"])
    assert torch.equal(found[-3:], tensors["in/table"][-3:])


@pytest.mark.parametrize("case", ["rel_pos_index_0", "rel_pos_index_1"])
def test_timms_rows_mean_what_the_authors_rows_mean(case: str) -> None:
    described, tensors = load_case("beit", case)
    grid = (described["config"]["grid_h"], described["config"]["grid_w"])
    assert torch.equal(gen_relative_position_index(grid), tensors["out/index"])
    assert table_rows(grid) == described["values"]["num_relative_distance"]


def _smooth(grid: tuple[int, int]) -> torch.Tensor:
    """A table whose bias is a smooth function of the share of the image that an offset covers."""
    rows, columns = (torch.arange(1 - n, n, dtype=torch.float64) / n for n in grid)
    values = torch.stack([torch.cos(2 * rows)[:, None] + torch.sin(columns), rows[:, None] * columns + 1], dim=-1)
    return torch.cat([values.flatten(0, 1), torch.tensor([[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]])])


@pytest.mark.parametrize(
    ("old", "new"), [((14, 14), (10, 10)), ((8, 8), (4, 4)), ((6, 9), (9, 6)), ((8, 6), (12, 9)), ((7, 7), (7, 11))]
)
def test_other_sizes_keep_the_bias_of_a_share_of_the_image(old: tuple[int, int], new: tuple[int, int]) -> None:
    found, wanted = resize_relative_position(_smooth(old), old, new), _smooth(new)
    centred = torch.cartesian_prod(*(torch.arange(1 - n, n) / n for n in new)).abs().amax(1)
    known = torch.cat([centred <= (min(old) - 1) / min(old), torch.ones(3, dtype=torch.bool)])
    torch.testing.assert_close(found[known], wanted[known], rtol=0, atol=5e-3)
    assert len(found) == table_rows(new)


def test_a_single_row_of_patches_and_no_change_at_all() -> None:
    table = torch.randn(table_rows((1, 4)), 2)
    assert resize_relative_position(table, (1, 4), (1, 4)) is table
    assert resize_relative_position(table, (1, 4), (3, 8)).shape == (table_rows((3, 8)), 2)
    assert resize_relative_position(table, (1, 4), (1, 1)).dtype == torch.float32
    with pytest.raises(ValueError, match="10 × 1 patches has"):
        resize_relative_position(table, (10, 1), (3, 8))


def test_near_offsets_keep_their_bias_where_a_square_grid_grows() -> None:
    table = torch.randn(table_rows((7, 7)), 1)
    found = resize_relative_position(table, (7, 7), (14, 14))
    old, new = table[:-3].view(13, 13), found[:-3].view(27, 27)
    torch.testing.assert_close(new[12:15, 12:15], old[5:8, 5:8], rtol=1e-4, atol=1e-4)
