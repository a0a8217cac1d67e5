"""How varied a teacher's features are in one step, from sums that all ranks add up.

Letters: N rows, B images, L patches, D features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from foreseen.engine.objective import all_reduce_sum

_EPSILON = 1e-7  # RankMe's, for float32 features


class FeatureHealth:
    """Moments of the pooled features of a global batch, and how much the patches of an image differ.

    Features of a micro-batch are added up and forgotten, so that accumulation costs no memory.
    """

    def __init__(self) -> None:
        self._products: Tensor | None = None
        self._patches: Tensor | None = None

    def add(self, pooled: Tensor, patches: Tensor | None = None) -> None:
        """Take in a micro-batch: features [N, D] and, where the backbone has them, patch tokens [B, L, D].

        These are the ones that the last block sees: behind it most methods compute few of them, or none.
        """
        with torch.autocast(pooled.device.type, enabled=False):
            exact = pooled.to(torch.promote_types(pooled.dtype, torch.float32))
            ones = torch.cat([exact, torch.ones_like(exact[:, :1])], dim=1)
            # The last row and column hold the sums and the count.
            products = ones.mT @ ones
            self._products = products if self._products is None else self._products + products
            if patches is None:
                return
            exact = patches.to(torch.promote_types(patches.dtype, torch.float32))
            different = 1.0 - F.normalize(exact, dim=-1).mean(1).square().sum(-1)
            sums = torch.stack([different.sum(), torch.ones_like(different).sum()])
            self._patches = sums if self._patches is None else self._patches + sums

    def all_reduce(self) -> None:
        """Add up what all ranks took in."""
        if self._products is not None:
            self._products = all_reduce_sum(self._products)
        if self._patches is not None:
            self._patches = all_reduce_sum(self._patches)

    def numbers(self) -> dict[str, Tensor]:
        """Effective rank (RankMe of what differs between pictures), and the share of the mean square that differs.

        Both are NaN where a feature is not finite. With patch tokens, 1 minus the mean cosine of those of one image.

        Source: Garrido et al. 2023, arXiv:2210.02885, equation 1, of centred features.
        """
        if self._products is None:
            return {}
        products = self._products
        products = (products if products.device.type in ("cpu", "cuda") else products.cpu()).double()
        count = products[-1, -1]
        gram, mean = products[:-1, :-1], products[:-1, -1] / count
        total = gram.diagonal().sum()
        centred = gram - count * torch.outer(mean, mean)
        bad = torch.where(centred.isfinite().all(), 0.0, torch.nan)
        centred = torch.where(centred.isfinite(), centred, 0.0)  # LAPACK raises where there is a NaN
        singular = torch.linalg.eigvalsh(centred).clamp(min=0.0).sqrt()
        share = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny) + _EPSILON
        found = {
            "feature_rank": (-(share * share.log()).sum()).exp().clamp(min=1.0) + bad,
            "feature_spread": centred.diagonal().sum().clamp(min=0.0) / total.clamp(min=1e-30) + bad,
        }
        if self._patches is not None:
            found["patch_diversity"] = self._patches[0] / self._patches[1]
        return found
