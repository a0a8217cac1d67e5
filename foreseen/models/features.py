"""Features of images from a frozen backbone: one vector each, which probes judge, and those of the patches.

Letters: B images, L patches, h down and w across, P prefix tokens (class, distillation, registers), D channels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foreseen.errors import BadInput

Features = Literal["cls", "mean", "both"]
Feature = Literal["cls", "mean", "patches"]


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
    wanted: tuple[Feature, ...] = ("cls", "mean") if features == "both" else (features,)
    return torch.cat(list(features_of(model, images, wanted).values()), dim=1)


def features_of(model: nn.Module, images: Tensor, wanted: Sequence[Feature]) -> dict[Feature, Tensor]:
    """Run a timm model on images once, and take several kinds of features from before its head.

    Args:
        model, images: as `pooled_features`.
        wanted: "cls" and "mean" as there; "patches" are the patch tokens, or the places of a feature map. What a model
            norms only after pooling is normed in each patch.

    Returns:
        In the order of `wanted`, in float32 at least: [B, D], and [B, h, w, D] for "patches".

    Raises:
        BadInput: as `pooled_features`, or the patches are in no grid.
    """
    if "cls" in wanted and not _has_class_token(model):
        raise BadInput(
            f"features 'cls' need a class token, and {type(model).__name__} has none; set the features to 'mean'"
        )
    described: Any = model
    tokens = described.forward_features(images)
    if not isinstance(tokens, Tensor) or tokens.ndim not in (3, 4):
        raise BadInput(f"{type(model).__name__} gives neither tokens nor one feature map, so it cannot be probed")
    tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    norm = getattr(described, "fc_norm", None) or nn.Identity()
    found: dict[Feature, Tensor] = {}
    for feature in wanted:
        if feature == "cls":
            found[feature] = norm(tokens[:, 0])
        elif feature == "mean":
            found[feature] = norm(_mean(described, tokens))
        else:
            found[feature] = norm(_patches(described, tokens, (images.shape[2], images.shape[3])))
    return found


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
    return tokens[:, _prefix(model) :].mean(1)


def _patches(model: Any, tokens: Tensor, size: tuple[int, int]) -> Tensor:
    """Patch tokens or a feature map as a grid, [B, h, w, D]."""
    if tokens.ndim == 4:
        if getattr(model, "output_fmt", "NCHW") == "NHWC":
            return tokens
        norm = getattr(getattr(model, "head", None), "norm", None)  # of a feature map with one place, so each is one
        return (tokens if norm is None else norm(tokens)).permute(0, 2, 3, 1)
    patches = tokens[:, _prefix(model) :]
    side = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    grid = () if side is None else (size[0] // side[0], size[1] // side[1])
    if not grid or grid[0] * grid[1] != patches.shape[1]:
        raise BadInput(f"the {patches.shape[1]} patches of {type(model).__name__} stand in no grid that it tells of")
    return patches.reshape(len(patches), *grid, patches.shape[2])


def _prefix(model: Any) -> int:
    return int(getattr(model, "num_prefix_tokens", int(_has_class_token(model))))
