"""Two guesses at a hidden patch's code that need no network: what a model has to beat to have learned something.

Letters: B images, L patches, M hidden ones, K codes, h and w rows and columns of patches.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from foreseen.engine.objective import all_reduce_sum

_COUNT_EVERY = 8  # steps; counts are as large as a layer's gradient, and sending them with every step would cost time


class PositionCounts(nn.Module):
    """How often each place has had each code, and the most frequent one there.

    Args:
        num_patches: L.
        codebook_size: K.

    Attributes:
        frequent: the code that was most frequent at each place up to the step before, [L] int64.
    """

    counts: Tensor
    frequent: Tensor

    def __init__(self, num_patches: int, codebook_size: int) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_patches, codebook_size, dtype=torch.int32))
        self.register_buffer("frequent", torch.zeros(num_patches, dtype=torch.int64))
        self._new: Tensor | None = None

    def collect(self, codes: Sequence[Tensor], step: int) -> None:
        """Count the codes of a global batch, in every eighth step; the counts move only in `move`.

        Args:
            codes: of each micro-batch of this rank, [B, L].
            step: the update being made.
        """
        self._new = None
        if step % _COUNT_EVERY:
            return
        new = torch.zeros_like(self.counts)
        for each in codes:
            new.scatter_add_(1, each.T, torch.ones_like(each.T, dtype=new.dtype))
        self._new = all_reduce_sum(new)

    def move(self, finite: Tensor) -> None:
        """Take up what was counted, unless the step was skipped."""
        if self._new is None:
            return
        self.counts.copy_(torch.where(finite, self.counts + self._new, self.counts))
        self.frequent.copy_(self.counts.argmax(dim=1))
        self._new = None

    def used(self) -> Tensor:
        """Share of the codes that came anywhere."""
        return (self.counts.amax(dim=0) > 0).to(torch.float32).mean()


def nearest_visible(mask: Tensor, places: Tensor, grid: tuple[int, int]) -> Tensor:
    """The visible patch nearest to each of some patches; of several as near, the first in row-major order.

    Args:
        mask: True where a patch is hidden, [B, L]; at least one is visible.
        places: numbers of patches, [B, M].
        grid: (h, w).

    Returns:
        Numbers of visible patches, [B, M].
    """
    patches = grid[0] * grid[1]
    every = torch.arange(patches, device=mask.device)
    down = places[..., None] // grid[1] - every // grid[1]
    right = places[..., None] % grid[1] - every % grid[1]
    # Whole numbers that are all different, so that no device may choose another of two that are as near.
    order = (down.square() + right.square()) * patches + every
    return order.masked_fill(mask[:, None, :], 2 * patches**3).argmin(-1)
