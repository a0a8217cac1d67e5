"""How varied a teacher's features are in one step, from sums that all ranks add up.

Letters: N rows, B images, L patches, D features.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from foreseen.engine.objective import all_reduce_sum

_EPSILON = 1e-7  # RankMe's, for float32 features


class FeatureMoments:
    """First and second moments of the pooled features of a global batch."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        """Add up [N, D] of each micro-batch, and of all ranks."""
        exact = [each.to(torch.promote_types(each.dtype, torch.float32)) for each in features]
        with torch.autocast(exact[0].device.type, enabled=False):
            ones = [torch.cat([each, torch.ones_like(each[:, :1])], dim=1) for each in exact]
            # The last row and column hold the sums and the count.
            self._products = all_reduce_sum(torch.stack([each.mT @ each for each in ones]).sum(0))

    def numbers(self) -> dict[str, Tensor]:
        """Effective rank (RankMe of what differs between pictures), and the share of the mean square that differs.

        Both are NaN where a feature is not finite.

        Source: Garrido et al. 2023, arXiv:2210.02885, equation 1, of centred features.
        """
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
        return {
            "feature_rank": (-(share * share.log()).sum()).exp().clamp(min=1.0) + bad,
            "feature_spread": centred.diagonal().sum().clamp(min=0.0) / total.clamp(min=1e-30) + bad,
        }


def patch_diversity(patches: Sequence[Tensor]) -> Tensor:
    """How much the patches of one image differ: 1 minus their mean cosine, a mean over all images and ranks.

    Args:
        patches: [B, L, D] of each micro-batch.
    """
    sums, count = [], 0
    for each in patches:
        exact = each.to(torch.promote_types(each.dtype, torch.float32))
        sums.append((1.0 - F.normalize(exact, dim=-1).mean(1).square().sum(-1)).sum())
        count += len(each)
    total = all_reduce_sum(torch.stack([torch.stack(sums).sum(), sums[0].new_tensor(float(count))]))
    return total[0] / total[1]
