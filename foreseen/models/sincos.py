"""Fixed two-dimensional sine-cosine position tables, as MAE builds them."""

import torch
from torch import Tensor

from foreseen.errors import BadInput


def sincos_table(grid: tuple[int, int], dim: int, *, prefix_rows: int = 0) -> Tensor:
    """Build the table of a grid of patches.

    The first half of the channels encodes the column, the second the row; each half is [sin..., cos...] over
    frequencies 10000^(-k / (D / 4)). Other authors put the row first, which transposes the image.

    Args:
        grid: rows and columns of patches.
        dim: channels D, a multiple of 4.
        prefix_rows: rows of zeros in front, for the CLS token and its like.

    Returns:
        [prefix_rows + L, D] float32, computed in float64.

    Source: He et al. 2022, arXiv:2111.06377; facebookresearch/mae at efb2a80, util/pos_embed.py.
    """
    if dim % 4:
        raise BadInput(f"a sine-cosine position table needs a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    halves = [torch.outer(index.flatten(), frequencies) for index in (columns, rows)]
    table = torch.cat([f(half) for half in halves for f in (torch.sin, torch.cos)], dim=1)
    return torch.cat([table.new_zeros(prefix_rows, dim), table]).to(torch.float32)
