"""Tables of relative position biases at another resolution.

A grid of h × w patches has a bias for each of the (2h - 1)(2w - 1) offsets between two patches, and three more: from
the class token to a patch, from a patch to the class token, and of the class token to itself.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.interpolate import RectBivariateSpline
from torch import Tensor

NUM_CLASS_ROWS = 3
_LEAST_RATIO, _LARGEST_RATIO = 1.01, 1.5
_BRACKET = 1e-6


def table_rows(grid: tuple[int, int]) -> int:
    """Rows of the table of a grid of patches with a class token."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + NUM_CLASS_ROWS


def resize_relative_position(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Interpolate a table of relative position biases to another grid of patches.

    A square grid that grows is interpolated as BEiT does it, by geometric progression: old offsets are put on
    coordinates 0, 1, 1 + q, 1 + q + q², …, with the q that makes the outermost ones meet the new ones. Near offsets
    keep their values, far ones are spread. It can do nothing else, so grids that shrink or are not square are read off
    where an offset covers the same share of the image. Both are bicubic splines, in float64; the rows of the class
    token stay.

    Args:
        table: [(2h - 1)(2w - 1) + 3, heads], offsets row-major from the most negative.
        old_grid: its (h, w).
        new_grid: the (h, w) wanted.

    Returns:
        [(2h - 1)(2w - 1) + 3, heads] of the new grid, in the table's dtype.

    Raises:
        ValueError: the table's rows are not those of the old grid.

    Source: Bao et al. 2021, arXiv:2106.08254; microsoft/unilm at 768a3c8, beit/run_class_finetuning.py.
    """
    if len(table) != table_rows(old_grid):
        raise ValueError(f"a table for {old_grid[0]} × {old_grid[1]} patches has {len(table)} rows")
    if old_grid == new_grid:
        return table
    offsets = table[:-NUM_CLASS_ROWS].detach().to("cpu", torch.float64).numpy()
    source, target = zip(*(_axes(old_grid, new_grid, axis) for axis in (0, 1)), strict=True)
    heads = [
        _interpolated(head.reshape(2 * old_grid[0] - 1, 2 * old_grid[1] - 1), source, target) for head in offsets.T
    ]
    resized = torch.from_numpy(np.stack(heads, axis=1)).to(table)
    return torch.cat([resized, table[-NUM_CLASS_ROWS:]])


Axis = NDArray[np.float64]


def _axes(old_grid: tuple[int, int], new_grid: tuple[int, int], axis: int) -> tuple[Axis, Axis]:
    """Coordinates of the old offsets along an axis, and where the new ones lie among them."""
    old, new = old_grid[axis], new_grid[axis]
    target = np.arange(1 - new, new, dtype=np.float64)
    is_square = old_grid[0] == old_grid[1] and new_grid[0] == new_grid[1]
    if is_square and new > old > 1:
        return _geometric(old - 1, new - 1), target
    return np.arange(1 - old, old, dtype=np.float64), target * (old / new)


def _geometric(count: int, reach: int) -> Axis:
    """Coordinates 0 and ±(1, 1 + q, …), `count` on each side, with the q by which they reach `reach`."""
    low, high = _LEAST_RATIO, _LARGEST_RATIO
    while high - low > _BRACKET:
        q = (low + high) / 2
        low, high = (low, q) if _sum(q, count) > reach else (q, high)
    side = np.cumsum(((low + high) / 2) ** np.arange(count))
    return np.concatenate([-side[::-1], [0.0], side])


def _sum(q: float, count: int) -> float:
    return (1.0 - q**count) / (1.0 - q)


def _interpolated(values: Axis, source: tuple[Axis, ...], target: tuple[Axis, ...]) -> Axis:
    """A bicubic spline through values [rows, columns] at source coordinates, at all pairs of target ones, flattened.

    Beyond the outermost coordinate the value there is taken.
    """
    source = tuple(axis if len(axis) > 1 else np.array([-1.0, 1.0]) for axis in source)
    values = np.broadcast_to(values, tuple(map(len, source)))
    degrees = {f"k{name}": min(3, len(axis) - 1) for name, axis in zip("xy", source, strict=True)}
    inside = [axis.clip(known[0], known[-1]) for axis, known in zip(target, source, strict=True)]
    spline = RectBivariateSpline(*source, values, s=0, **degrees)
    found: Axis = spline(*inside).ravel()
    return found
