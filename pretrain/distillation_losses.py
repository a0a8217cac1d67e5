"""Losses of self-distillation, as sums over logits that are never all there at once.

Letters: S student crops and T teacher crops of each of B images, N images, M places for masked patches, R rows,
K prototypes, d of the bottleneck, D features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 1 << 25
"""Logits held at a time where nothing else is asked for: 128 MiB in float32, for student and teacher together."""


def crop_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of every student crop with every teacher crop but the same one, a mean over these pairs.

    It takes one product in place of a loop over pairs: all targets of a student crop are added up first.

    Args:
        logits: of the student over its temperature, [S, B, K]; the first T crops are the teacher's.
        targets: of the teacher, rows of sum 1, [T, B, K].

    Returns:
        [B].

    Source: Caron et al. 2021, arXiv:2104.14294, equation 3; facebookresearch/dino at 7c446df, main_dino.py, DINOLoss.
    """
    crops, teachers = len(logits), len(targets)
    own = logits[:teachers]
    normaliser = logits.logsumexp(dim=-1)
    total: Tensor = teachers * normaliser.sum(0) - normaliser[:teachers].sum(0)
    total = total - (logits.sum(0) * targets.sum(0)).sum(-1) + (own * targets).sum((0, -1))
    return total / (teachers * (crops - 1))


def row_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row: [R, K] and [R, K], whose rows sum to 1 -> [R]."""
    return logits.logsumexp(dim=-1) - (logits * targets).sum(-1)


def entropy(targets: Tensor) -> Tensor:
    """Entropy of rows of sum 1 in nats: [..., K] -> [...]."""
    surprise: Tensor = torch.special.xlogy(targets, targets)
    return -surprise.sum(-1)


def koleo(features: Tensor, group: int) -> Tensor:
    """Spread features out: minus the log distance of each to the nearest one in its group, a mean.

    Args:
        features: [B, D], B a multiple of `group`.
        group: features that are neighbours, consecutive ones, so that it does not matter how a batch is cut.

    Source: Sablayrolles et al. 2019, arXiv:1806.03198; facebookresearch/dinov2, loss/koleo_loss.py, where the group is
    a GPU's batch.
    """
    exact = features.to(torch.promote_types(features.dtype, torch.float32))
    with torch.autocast(exact.device.type, enabled=False):
        z = F.normalize(exact.view(-1, group, exact.shape[-1]), dim=-1, eps=1e-8)
        similarity = (z @ z.mT).detach()
        itself = torch.eye(group, dtype=torch.bool, device=z.device)
        nearest = similarity.masked_fill(itself, -2.0).argmax(-1, keepdim=True)
        # A product, as on a GPU the backward of a gather adds in any order where features share a neighbour.
        chosen = (nearest == torch.arange(group, device=z.device)).to(z.dtype)
        distance = F.pairwise_distance(z, chosen @ z, eps=1e-8)
        return -(distance + 1e-8).log().mean()


def masked_places(mask: Tensor, most: int) -> Tensor:
    """As many places for each image as any mask can fill, so that nothing asks the device how many there are.

    Args:
        mask: True where hidden, [N, L].
        most: M, the most that any image hides.

    Returns:
        Numbers of hidden patches [N, M], and of others where there are too few.
    """
    return mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]


def place_weights(mask: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """What gives each image's hidden patches their mean: 1 / how many it hides, and 0 for places that are not hidden.

    Args:
        mask: True where hidden, [N, L].
        places: of `masked_places`, [N, M].
        dtype: of the weights.

    Returns:
        [N, M].
    """
    return mask.gather(1, places).to(dtype) / mask.sum(1, keepdim=True).clamp(min=1)


def rows_at_once(asked: int | None, prototypes: int) -> int:
    """Rows of logits held at a time.

    Args:
        asked: by the config; None takes LOGITS_AT_ONCE.
        prototypes: K.
    """
    return asked or max(1, LOGITS_AT_ONCE // prototypes)


def summed_in_chunks(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], size: int, *fixed: Tensor
) -> Tensor:  # fmt: skip
    """Add up what a function makes of pieces, keeping nothing of one while the next is made.

    Where there are several pieces and a gradient is wanted, each is made again in the backward pass.

    Args:
        function: of pieces of `tensors` and the whole of `fixed`, to a tensor of one shape.
        tensors: cut along their last axis but one, all of the same length there.
        size: of a piece.
        fixed: what all pieces need, such as prototypes.
    """
    length = tensors[0].shape[-2]
    if length <= size:
        return function(*tensors, *fixed)
    total: Tensor | None = None
    for start in range(0, length, size):
        pieces = [tensor.narrow(-2, start, min(size, length - start)) for tensor in tensors]
        part: Tensor
        if torch.is_grad_enabled():
            part = checkpoint(function, *pieces, *fixed, use_reentrant=False, preserve_rng_state=False)
        else:
            part = function(*pieces, *fixed)
        total = part if total is None else total + part
    assert total is not None
    return total
