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


class NearestVisible(nn.Module):
    """The visible patch nearest to a hidden one; of several as near, the first in row-major order.

    Args:
        grid: (h, w).

    Attributes:
        rank: how many patches are nearer to a patch than another one, [L, L]; all that is looked up for each image.
        order: the patches from the nearest to the farthest, [L, L].
    """

    rank: Tensor
    order: Tensor

    def __init__(self, grid: tuple[int, int]) -> None:
        super().__init__()
        patch = torch.arange(grid[0] * grid[1])
        down, right = (place[:, None] - place for place in (patch // grid[1], patch % grid[1]))
        order = (down.square() + right.square()).argsort(dim=1, stable=True).to(torch.int32)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("rank", order.argsort(dim=1).to(torch.int32), persistent=False)

    def forward(self, mask: Tensor, places: Tensor) -> Tensor:
        """Numbers of visible patches, [B, M] int64.

        Args:
            mask: True where a patch is hidden, [B, L]; at least one is visible.
            places: numbers of patches, [B, M].
        """
        patches = len(self.order)
        first = self.rank[places].masked_fill(mask[:, None], patches).amin(dim=-1)
        return self.order.flatten()[places * patches + first].long()
