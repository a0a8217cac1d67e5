"""LARS as in the code of DINO and of MAE's linear probe; timm's adds the norms of gradient and decay instead."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Momentum over gradients rescaled, tensor by tensor, to a share of the weights' norm.

    A matrix or kernel w with gradient g moves along u = g + weight_decay × w, scaled by trust × |w| / |u|, or by 1
    where one of the norms is 0. Vectors (biases, norms) are not rescaled.

    Args:
        params: parameters or groups.
        lr: of a step.
        momentum: of the rescaled gradients.
        weight_decay: added to the gradients.
        trust: how far a step goes, as a share of the weights' norm at lr 1.

    Source: You et al. 2017, arXiv:1708.03888; facebookresearch/dino, utils.py, class LARS.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make one update; nothing waits for the device."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad.add(parameter, alpha=group["weight_decay"])
                if parameter.ndim > 1:
                    update.mul_(_share(parameter.norm(), update.norm(), group["trust"]))
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                parameter.add_(state["momentum_buffer"].mul_(group["momentum"]).add_(update), alpha=-group["lr"])


def _share(weights: Tensor, update: Tensor, trust: float) -> Tensor:
    return torch.where((weights > 0) & (update > 0), trust * weights / update, torch.ones_like(update))
