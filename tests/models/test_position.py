import pytest
import torch

from foreseen.models.position import resize_pos_embed
from tests.golden_cases import load_case


@pytest.mark.parametrize("case", ["interpolate_pos_embed_up", "interpolate_pos_embed_down"])
def test_a_resized_table_equals_the_authors(case):
    described, tensors = load_case("mae", case)
    old, new = described["config"]["old_grid"], described["config"]["new_grid"]
    resized = resize_pos_embed(tensors["in/pos_embed"], (old, old), (new, new), 1)
    torch.testing.assert_close(resized, tensors["out/pos_embed_new"], rtol=1e-4, atol=1e-5)
    exact = resize_pos_embed(tensors["in/pos_embed"].double(), (old, old), (new, new), 1)
    torch.testing.assert_close(exact, tensors["out64/pos_embed_new"], rtol=1e-8, atol=1e-10)


def test_rows_stay_rows_on_a_rectangular_grid():
    row_number = torch.arange(4.0).repeat_interleave(2).view(1, 8, 1)
    resized = resize_pos_embed(row_number, (4, 2), (4, 6), 0).view(4, 6)
    torch.testing.assert_close(resized, torch.arange(4.0)[:, None].expand(4, 6))


def test_prefix_tokens_and_an_equal_grid_are_left_alone():
    table = torch.randn(1, 5 + 16, 8, dtype=torch.bfloat16)
    assert resize_pos_embed(table, (4, 4), (4, 4), 5) is table
    resized = resize_pos_embed(table, (4, 4), (2, 8), 5)
    assert resized.dtype == torch.bfloat16
    assert torch.equal(resized[:, :5], table[:, :5])


def test_a_table_of_another_grid_is_refused():
    with pytest.raises(ValueError, match="1 \\+ 3 × 4 has 17 rows"):
        resize_pos_embed(torch.zeros(1, 17, 8), (3, 4), (4, 4), 1)
