"""One vector an image from a frozen backbone: what probes judge.

Letters: B images, L patches, P prefix tokens (class, distillation, registers), D channels.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from foreseen.errors import BadInput

Features = Literal["cls", "mean", "both"]


def default_features(model: nn.Module) -> Features:
    """How a model's features are best pooled where nobody says: as its own head would.

    "cls" for one that has a class token and reads it, "mean" for all others.
    """
    described: Any = model
    reads_token = getattr(described, "global_pool", None) == "token"
    return "cls" if reads_token and _has_class_token(model) else "mean"


def pooled_features(model: nn.Module, images: Tensor, features: Features) -> Tensor:
    """Run a timm model on images and pool what comes out before its head.

    Args:
        model: in evaluation mode; its classifier, if it has one, is not used.
        images: normalised, [B, C, H, W].
        features: "cls" is the class token, "mean" the mean over patch tokens or over the places of a feature map,
            "both" is one beside the other. Prefix tokens are no patches. All of it after the model's final norm; where
            a model norms only what it has pooled (`fc_norm`; ConvNeXt's head), so is it here.

    Returns:
        [B, D], or [B, 2 * D] for "both", in float32 at least.

    Raises:
        BadInput: there is no class token, or the model gives no tokens and no feature map.
    """
    if features != "mean" and not _has_class_token(model):
        raise BadInput(
            f"features {features!r} need a class token, and {type(model).__name__} has none; set the features to 'mean'"
        )
    described: Any = model
    tokens = described.forward_features(images)
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        raise BadInput(f"{type(model).__name__} gives neither tokens nor one feature map, so it cannot be probed")
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    norm = getattr(described, "fc_norm", None) or nn.Identity()
    parts = []
    if features != "mean":
        parts.append(norm(tokens[:, 0]))
    if features != "cls":
        parts.append(norm(_mean(described, tokens)))
    return torch.cat(parts, dim=1)


def feature_map(model: nn.Module, features: Tensor) -> Tensor:
    """A model's features by place.

    Args:
        model: a timm model.
        features: what its `forward_features` gives: tokens [B, P + L, D], or a map of either layout.

    Returns:
        [B, D, h, w] after the model's own norm; prefix tokens are no places.

    Raises:
        BadInput: they are neither tokens of a grid of patches nor a map.
    """
    described: Any = model
    if features.ndim == 4:
        if getattr(described, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        norm = getattr(getattr(described, "head", None), "norm", None)  # ConvNeXt's, which is of maps
        return features if norm is None else norm(features)
    grid = getattr(getattr(described, "patch_embed", None), "grid_size", None)
    prefix = getattr(described, "num_prefix_tokens", int(_has_class_token(model)))
    if features.ndim != 3 or grid is None or features.shape[1] != prefix + grid[0] * grid[1]:
        raise BadInput(f"{type(model).__name__} gives no features of places")
    norm = getattr(described, "fc_norm", None) or nn.Identity()
    return norm(features[:, prefix:]).transpose(1, 2).unflatten(2, tuple(grid))  # type: ignore[no-any-return]


def _has_class_token(model: nn.Module) -> bool:
    return getattr(model, "cls_token", None) is not None


def _mean(model: Any, tokens: Tensor) -> Tensor:
    if tokens.ndim == 4:
        channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
        pooled = tokens.mean((1, 2) if channels_last else (2, 3))
        norm = getattr(getattr(model, "head", None), "norm", None)  # of feature maps, so it wants one
        return pooled if norm is None or channels_last else norm(pooled[:, :, None, None]).flatten(1)
    prefix = getattr(model, "num_prefix_tokens", int(_has_class_token(model)))
    return tokens[:, prefix:].mean(1)
