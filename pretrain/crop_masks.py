"""Masks of an image's large crops, drawn in the loader: iBOT's, each by itself, and DINOv2's, stratified over a step.

Letters: n crops of an image, h and w rows and columns of patches, L = h * w, G images in a step.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foreseen.data.block_mask import block_mask
from foreseen.keys import mix, stream_constant


@dataclass(frozen=True)
class IndependentMasks:
    """A ratio drawn for each crop, and a mask of about that share of its patches.

    Attributes:
        grid: (h, w).
        crops: n.
        shape: "block" hides rectangles, and sometimes a little less than the ratio; "random" scattered patches.
        ratios: one of these is chosen for each crop, all alike.
        spreads: the ratio is uniform within so much of the one chosen.

    Source: Zhou et al. 2022, arXiv:2111.07832; bytedance/ibot, loader.py, ImageFolderMask.
    """

    grid: tuple[int, int]
    crops: int
    shape: Literal["block", "random"]
    ratios: tuple[float, ...]
    spreads: tuple[float, ...]

    @property
    def most(self) -> int:
        """The most patches that a crop hides."""
        highest = max(ratio + spread for ratio, spread in zip(self.ratios, self.spreads, strict=True))
        return min(self.grid[0] * self.grid[1], int(highest * self.grid[0] * self.grid[1]))

    def __call__(self, generator: np.random.Generator, position: int) -> NDArray[np.bool_]:
        """Draw the masks of a sample, [n, L]."""
        return np.stack([self._draw(generator) for _ in range(self.crops)])

    def _draw(self, generator: np.random.Generator) -> NDArray[np.bool_]:
        chosen = int(generator.integers(len(self.ratios)))
        ratio = self.ratios[chosen] + self.spreads[chosen] * (2.0 * generator.random() - 1.0)
        patches = self.grid[0] * self.grid[1]
        if self.shape == "random":
            return generator.permutation(patches) < int(ratio * patches)
        smallest = (min(self.grid) // 3) ** 2
        return block_mask(generator, self.grid, ratio * patches, min_block=smallest)


@dataclass(frozen=True)
class StratifiedMasks:
    """So many of a step's crops are masked, each with a ratio from a bin of its own.

    Attributes:
        grid: (h, w).
        crops: n.
        global_size: G.
        seed: of the run.
        probability: share of the n * G crops that are masked.
        ratios: lowest and highest share of patches hidden.

    Source: Oquab et al. 2023, arXiv:2304.07193; facebookresearch/dinov2, data/collate.py and data/masking.py.
    """

    grid: tuple[int, int]
    crops: int
    global_size: int
    seed: int
    probability: float
    ratios: tuple[float, float]

    @property
    def most(self) -> int:
        """The most patches that a crop hides."""
        return int(self.ratios[1] * self.grid[0] * self.grid[1])

    @property
    def masked(self) -> int:
        """Crops of a step that are masked."""
        return int(self.crops * self.global_size * self.probability)

    def __call__(self, generator: np.random.Generator, position: int) -> NDArray[np.bool_]:
        """Draw the masks of the sample at a position, [n, L]."""
        step, place = divmod(position, self.global_size)
        slots = _slots(self.seed, step, self.crops * self.global_size)
        return np.stack([self._draw(generator, int(slots[c * self.global_size + place])) for c in range(self.crops)])

    def _draw(self, generator: np.random.Generator, slot: int) -> NDArray[np.bool_]:
        patches = self.grid[0] * self.grid[1]
        if slot >= self.masked:
            return np.zeros(patches, dtype=np.bool_)
        low, high = self.ratios
        ratio = low + (high - low) * (slot + generator.random()) / self.masked
        return block_mask(generator, self.grid, int(ratio * patches), min_block=4, max_block=patches // 2)


@lru_cache(maxsize=8)
def _slots(seed: int, step: int, count: int) -> NDArray[np.int64]:
    """A permutation for a step, the same in every worker."""
    base = np.uint64(stream_constant(f"mask ratio/{seed}/{step}"))
    return np.argsort(mix(np.arange(count, dtype=np.uint64) ^ base), kind="stable")
