"""K-means on the unit sphere over the tokens of all ranks: where a codebook begins.

Letters: N tokens of this rank, D their width, K centres.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from foreseen.engine.objective import all_reduce_sum
from foreseen.tokenizers.quantizer import nearest, sum_by_code


def cosine_kmeans(unit: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations by angle; every rank must call it.

    Args:
        unit: tokens of this rank, of length 1, [N, D].
        centres: where to begin, the same on every rank, [K, D].
        iterations: how many.

    Returns:
        The centres, [K, D], of length 1; and how many tokens of all ranks each had in the last iteration, [K]. A centre
        without tokens stays where it is.

    Source: microsoft/unilm at 768a3c8, beit2/norm_ema_quantizer.py, kmeans.
    """
    counted = torch.cat([unit, torch.ones_like(unit[:, :1])], dim=1)
    counts = unit.new_zeros(len(centres))
    for _ in range(iterations):
        total = all_reduce_sum(sum_by_code(counted, nearest(unit, centres), len(centres)))
        sums, counts = total[:, :-1], total[:, -1]
        centres = torch.where(counts[:, None] > 0, F.normalize(sums, dim=-1), centres)
    return centres, counts
