"""Position tables at another resolution."""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_pos_embed(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int
) -> Tensor:  # fmt: skip
    """Interpolate a table of absolute positions to another grid of patches, by MAE's rule.

    Bicubic without antialiasing, in float32. timm's own rule is antialiased, whose kernel differs even where the
    grid grows.

    Args:
        table: [1, num_prefix_tokens + h * w, D], rows of the grid one after another.
        old_grid: its (h, w).
        new_grid: the (h, w) wanted.
        num_prefix_tokens: rows of class and register tokens in front, kept as they are.

    Returns:
        [1, num_prefix_tokens + h * w, D] for the new grid, in the table's dtype.

    Raises:
        ValueError: the table's rows are not those of the old grid.

    Source: facebookresearch/mae, util/pos_embed.py, interpolate_pos_embed.
    """
    rows = num_prefix_tokens + old_grid[0] * old_grid[1]
    if table.shape[1] != rows:
        raise ValueError(f"a table for {num_prefix_tokens} + {old_grid[0]} × {old_grid[1]} has {table.shape[1]} rows")
    if old_grid == new_grid:
        return table
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    exact = image.to(torch.promote_types(image.dtype, torch.float32))
    resized = F.interpolate(exact, size=new_grid, mode="bicubic", align_corners=False, antialias=False)
    patches = resized.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat((prefix, patches), dim=1)


PositionResize = Literal["offset", "exact", "antialias", "antialias_offset"]


def resample_pos_embed(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix_tokens: int, how: PositionResize
) -> Tensor:  # fmt: skip
    """Interpolate a table while training, for crops of several sizes; gradients reach it.

    As a product with a fixed matrix: on a GPU torch's own backward of bicubic interpolation adds in any order, so that
    no run could be repeated to the bit.

    Args:
        table: [1, num_prefix_tokens + h * w, D].
        old_grid: its (h, w).
        new_grid: the (h, w) wanted.
        num_prefix_tokens: rows in front, kept as they are.
        how: all are bicubic. "offset" scales by (new + 0.1) / old, as DINO, iBOT and the first DINOv2 do; "exact" by
            new / old; "antialias" as well, with antialiasing, as timm and DINOv2 with registers do;
            "antialias_offset" has both.

    Returns:
        [1, num_prefix_tokens + h * w, D] for the new grid, in the table's dtype.

    Source: facebookresearch/dino at 7c446df, vision_transformer.py, interpolate_pos_encoding; facebookresearch/dinov2,
    models/vision_transformer.py.
    """
    if old_grid == new_grid:
        return table
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    with torch.autocast(table.device.type, enabled=False):
        exact = patches.to(torch.promote_types(patches.dtype, torch.float32))
        resized = _shares(old_grid, new_grid, how, exact.dtype, exact.device) @ exact
    return torch.cat((prefix, resized.to(table.dtype)), dim=1)


@lru_cache(maxsize=64)
def _shares(
    old_grid: tuple[int, int], new_grid: tuple[int, int], how: PositionResize, dtype: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    """What each place of the new grid takes of each place of the old one, [h * w of the new, h * w of the old]."""
    antialias = how.startswith("antialias")
    with torch.inference_mode(False):  # kept for later, when it may be trained with
        places = torch.eye(old_grid[0] * old_grid[1], dtype=dtype, device="cpu").view(1, -1, *old_grid)
        if how.endswith("offset"):
            scale = ((new_grid[0] + 0.1) / old_grid[0], (new_grid[1] + 0.1) / old_grid[1])
            taken = F.interpolate(places, scale_factor=scale, mode="bicubic", antialias=antialias)
        else:
            taken = F.interpolate(places, size=new_grid, mode="bicubic", antialias=antialias)
        return taken.flatten(2)[0].T.contiguous().to(device)
