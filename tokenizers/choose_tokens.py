"""Tokens of the whole global batch, chosen by keys: the same ones however the batch is cut.

Letters: N tokens of this rank, D their width.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def choose_tokens(tokens: Tensor, priorities: Tensor, count: int) -> Tensor:
    """The tokens with the largest priorities among those of all ranks; every rank must call it.

    Args:
        tokens: of this rank, [N, D]; as many on every rank.
        priorities: one random integer for each, drawn from its sample's key, [N] int64.
        count: how many are wanted.

    Returns:
        [count, D], or all of them if there are fewer, in the order of falling priorities.
    """
    best = priorities.topk(min(count, len(priorities)))
    chosen, rank_of = gather_rows(tokens[best.indices]), gather_rows(best.values)
    return chosen[rank_of.topk(min(count, len(rank_of))).indices]


def gather_rows(value: Tensor) -> Tensor:
    """The rows of all ranks one after another, [N, ...] -> [ranks * N, ...]."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)
