"""Blockwise masks: rectangles of patches are hidden until there are enough, as BEiT, iBOT and DINOv2 mask.

Each rectangle depends on those before it, so a worker draws them, from the sample's own generator (`Draw`).

Letters: h and w rows and columns of patches, L = h * w.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ATTEMPTS = 10


def block_mask(
    generator: np.random.Generator,
    grid: tuple[int, int],
    target: float,
    *,
    min_block: int = 16,
    max_block: int | None = None,
    min_aspect: float = 0.3,
    exact: bool = False,
) -> NDArray[np.bool_]:
    """Draw which patches of one image are hidden.

    A round draws a rectangle up to ten times and takes the first that is smaller than the grid on both sides, hides
    something new, and not more than is still wanted. Once less than `min_block` is wanted, areas are drawn between the
    two all the same. A round without success is the last one, so that fewer than `target` patches may be hidden.

    Args:
        generator: where the numbers come from.
        grid: (h, w) of the patches.
        target: patches to hide, in [0, L]; no more than that are.
        min_block: smallest area that a rectangle is drawn with, in patches.
        max_block: largest area; None for `target`.
        min_aspect: smallest height over width; the largest is its inverse, and between them it is log-uniform.
        exact: hide single patches, drawn uniformly, until there are `target`, as BEiT v2 does. BEiT v1 does not.

    Returns:
        Boolean [L], row-major, True where hidden.

    Source: Bao et al. 2021, arXiv:2106.08254, algorithm 1; microsoft/unilm at 768a3c8, beit/masking_generator.py and
    beit2/masking_generator.py.
    """
    height, width = grid
    mask = np.zeros(grid, dtype=np.bool_)
    log_aspect = -math.log(min_aspect)
    count = 0
    while count < target:
        wanted = target - count
        largest = wanted if max_block is None else min(wanted, max_block)
        added = 0
        for _ in range(_ATTEMPTS):
            area = min_block + (largest - min_block) * generator.random()
            aspect = math.exp(log_aspect * (2.0 * generator.random() - 1.0))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h >= height or w >= width:
                continue
            top, left = int(generator.integers(height - h + 1)), int(generator.integers(width - w + 1))
            block = mask[top : top + h, left : left + w]
            new = h * w - int(np.count_nonzero(block))
            if 0 < new <= largest:
                block[:] = True
                added = new
                break
        if added == 0:
            break
        count += added
    flat = mask.ravel()
    if exact and count < target:
        flat[generator.choice(np.flatnonzero(~flat), int(target) - count, replace=False)] = True
    return flat


@dataclass(frozen=True)
class BlockMask:
    """`block_mask` with its numbers, as the function of a `Draw`: a worker's generator -> boolean [L].

    Attributes: see `block_mask`.
    """

    grid: tuple[int, int]
    target: int
    min_block: int = 16
    max_block: int | None = None
    min_aspect: float = 0.3
    exact: bool = False

    def __call__(self, generator: np.random.Generator, position: int) -> NDArray[np.bool_]:
        """Draw the mask of the sample at a position, [L]."""
        return block_mask(
            generator,
            self.grid,
            self.target,
            min_block=self.min_block,
            max_block=self.max_block,
            min_aspect=self.min_aspect,
            exact=self.exact,
        )
