"""The projection head of self-distillation: an MLP to a short unit vector, compared with prototypes.

Prototypes are rows of unit length times a gain each. What a head gives is the short vector, the bottleneck, and not
the logits: with 65,536 prototypes those are the largest tensors of all, and who needs them makes them in pieces.

Letters: D features of the backbone, d of the bottleneck, K prototypes.

Source: Caron et al. 2021, arXiv:2104.14294; facebookresearch/dino at 7c446df, vision_transformer.py, DINOHead. With
`patch_prototypes` bytedance/ibot, models/head.py, iBOTHead.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Prototypes(nn.Module):
    """K directions and their gains, under the names of the authors' weight-normed linear layer.

    Args:
        dim: d.
        count: K.
        trains_gain: else all gains are 1 for good.
    """

    def __init__(self, dim: int, count: int, *, trains_gain: bool) -> None:
        super().__init__()
        # Kaiming-uniform, torch's own for a linear layer, which the authors leave as it is.
        self.weight_v = nn.Parameter(nn.Linear(dim, count, bias=False).weight.detach().clone())
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=trains_gain)

    def forward(self) -> Tensor:
        """What a bottleneck is multiplied by for its logits, [K, d], in float32 at least."""
        exact = self.weight_v.to(torch.promote_types(self.weight_v.dtype, torch.float32))
        # torch's own kernel of weight norm: in single operations 65,536 prototypes take five times as long.
        return torch._weight_norm(exact, self.weight_g.to(exact.dtype), 0)


class ProjectionHead(nn.Module):
    """An MLP, a bottleneck of unit length, and prototypes.

    Args:
        in_dim: D.
        prototypes: K.
        hidden_dim: width of the MLP.
        bottleneck_dim: d.
        num_layers: of the MLP, the one to the bottleneck among them.
        batch_norm: between the hidden layers; the papers have none for ViTs.
        trains_gain: see `Prototypes`.
        patch_prototypes: of a second set for patch tokens, which share the MLP; None where they share all.
    """

    def __init__(
        self,
        in_dim: int,
        prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        batch_norm: bool = False,
        trains_gain: bool = False,
        patch_prototypes: int | None = None,
    ) -> None:
        super().__init__()
        widths = [in_dim, *[hidden_dim] * (num_layers - 1)]
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers.append(nn.Linear(before, after))
            layers.extend([nn.BatchNorm1d(after)] if batch_norm else [])
            layers.append(nn.GELU())
        layers.append(nn.Linear(widths[-1], bottleneck_dim))
        self.mlp = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = Prototypes(bottleneck_dim, prototypes, trains_gain=trains_gain)
        self.last_layer2 = (
            None if patch_prototypes is None
            else Prototypes(bottleneck_dim, patch_prototypes, trains_gain=trains_gain)
        )  # fmt: skip

    def forward(self, features: Tensor) -> Tensor:
        """Features [N, D] -> bottleneck [N, d] of unit length, in float32 at least."""
        x: Tensor = self.mlp(features)
        return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1)

    def prototypes(self) -> Tensor:
        """Of class tokens, [K, d]."""
        return self.last_layer()  # type: ignore[no-any-return]

    def patch_prototypes(self) -> Tensor:
        """Of patch tokens, [K, d]."""
        return (self.last_layer if self.last_layer2 is None else self.last_layer2)()  # type: ignore[no-any-return]
