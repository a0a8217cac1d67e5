"""Gradient clipping: whose norm is limited, all gradients' together, each tensor's, or each module's."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

_EPSILON = 1e-6  # as torch's clip_grad_norm_ and the authors' loops


def clip(
    groups: Mapping[str, Sequence[Tensor]],
    limit: float,
    per: Literal["global", "parameter", "module"],
    norm: Tensor | None = None,
) -> None:
    """Scale gradients down, in place, until no norm is above the limit. The host reads nothing.

    Args:
        groups: gradients by module.
        limit: largest norm.
        per: "global" limits the norm of all, "parameter" that of each tensor, "module" that of each group.
        norm: of all gradients, where it is known.

    Source of "parameter": facebookresearch/dino at 7c446df, utils.py, clip_gradients. Of "module": facebookresearch/
    dinov2, train/train.py, which clips backbone and heads apart.
    """
    gradients = [gradient for group in groups.values() for gradient in group]
    if not gradients:
        return
    if per == "global":
        _scale(gradients, limit, torch.nn.utils.get_total_norm(gradients) if norm is None else norm)
    elif per == "module":
        for group in groups.values():
            _scale(group, limit, torch.nn.utils.get_total_norm(group))
    else:
        scales = (limit / (torch.stack(torch._foreach_norm(gradients)) + _EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))


def _scale(gradients: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    torch._foreach_mul_(list(gradients), (limit / (norm + _EPSILON)).clamp(max=1.0))
