"""Backbones: any timm model, made ready for keyed randomness, with errors that name the key to change.

timm builds and initialises; then every DropPath is replaced by a keyed one and element-wise dropout, which cannot be
keyed to a sample cheaply, is switched off.
"""

import difflib
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

import timm
from timm.models import VisionTransformer, is_model, model_entrypoint, split_model_name_tag
from timm.models.beit import Beit
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from foreseen.errors import BadInput
from foreseen.models.drop_path import replace_drop_path

Pool = Literal["token", "mean"]

# Set by other keys of the config.
_OWNED = {
    "img_size": "views.size",
    "drop_path_rate": "model.drop_path_rate",
    "num_classes": "the labels of the data",
    "global_pool": "method.pool",
    "fc_norm": "method.pool",
    "use_fc_norm": "method.pool",
}
# What timm's factory takes for itself: weights from elsewhere, or a module that is no longer the model.
FACTORY = frozenset(inspect.signature(timm.create_model).parameters) | {
    "features_only", "feature_cls", "feature_cfg", "out_indices", "pretrained_strict", "pretrained_model_args",
    "pruned", "device", "dtype",
}  # fmt: skip
# Python's own words, and those of timm where a model checks for itself.
_UNEXPECTED = re.compile(r"(\w+)\.__init__\(\) got (?:an )?unexpected keyword argument(?:\(s\))?:? \[?'(\w+)'")


def create_backbone(
    name: str,
    *,
    img_size: tuple[int, int],
    num_classes: int = 0,
    pool: Pool | None = None,
    drop_path_rate: float = 0.0,
    drop_path_uniform: bool = False,
    any_size: bool = False,
    args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model with fresh weights, on the CPU in float32, drawn from torch's global generator.

    Args:
        name: a model that timm knows.
        img_size: (H, W) in pixels; models that take any size ignore it.
        num_classes: outputs of the head; 0 for none.
        pool: how a ViT pools. "mean" is the mean of the patch tokens, then `fc_norm`; "token" is `norm`, then the
            class token. None keeps the model's own pooling, after the final `norm`, as pretraining wants it.
        drop_path_rate: of the last block.
        drop_path_uniform: of all blocks; else it rises from 0 at the first.
        any_size: let the model take images of other sizes too, where it can.
        args: more keyword arguments of the model, such as `depth`; those that are None are left out, as timm does.

    Returns:
        The model. `architecture_of` tells how to build it again.

    Raises:
        BadInput: no such model, an argument that it does not take, or a size that its patches do not divide.
    """
    args = {key: value for key, value in (args or {}).items() if value is not None}
    _check_name(name)
    _check_args(name, args)
    # What not every model takes is left out where it says so; what was asked for is not.
    soft: dict[str, Any] = {"img_size": img_size, "fc_norm": pool == "mean"}
    if model_entrypoint(split_model_name_tag(name)[0]).__module__ == Beit.__module__:
        soft["use_fc_norm"] = pool == "mean"  # others have their own rule for what is left to them
    hard: dict[str, Any] = {"num_classes": num_classes, **args}
    (hard if drop_path_rate > 0 else soft)["drop_path_rate"] = drop_path_rate
    if any_size:
        soft |= {"dynamic_img_size": True, "strict_img_size": False}
    if pool is not None:
        hard["global_pool"] = {"mean": "avg", "token": "token"}[pool]
    elif args.get("class_token") is False:
        hard["global_pool"] = "avg"  # the model's own would need the token
    model, taken = _build(name, hard, soft)
    _check_patches(model, img_size)
    replace_drop_path(model, drop_path_rate if drop_path_uniform else None)
    _switch_dropout_off(model)
    rebuilt = {key: value for key, value in taken.items() if key not in ("num_classes", "drop_path_rate")}
    marked: Any = model
    marked.foreseen_architecture = (split_model_name_tag(name)[0], rebuilt)
    return model


def architecture_of(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The timm name of a backbone, and the keyword arguments that build it again, without classes and drop path."""
    marked: Any = model
    name, args = marked.foreseen_architecture
    return name, dict(args)


def patch_size(model: nn.Module) -> tuple[int, int] | None:
    """The (height, width) of a model's patches in pixels, behind a convolutional stem, too; None without patches."""
    embedding: Any = getattr(model, "patch_embed", None)
    if has_stem(model):
        rows, columns = embedding.feat_ratio(as_scalar=False)  # of pixels, not of the stem's map
        return int(rows), int(columns)
    size = getattr(embedding, "patch_size", None)
    return None if size is None else ((size, size) if isinstance(size, int) else (int(size[0]), int(size[1])))


def has_stem(model: nn.Module) -> bool:
    """Whether a convolutional stem stands before a ViT's patches, as in timm's `vit_*_r*_s*`."""
    return isinstance(getattr(model, "patch_embed", None), HybridEmbed)


def patch_grid(model: nn.Module) -> tuple[int, int]:
    """How many patches a ViT's image has, (rows, columns)."""
    embedding: Any = model.patch_embed
    return int(embedding.grid_size[0]), int(embedding.grid_size[1])


def _check_name(name: str) -> None:
    if not any(mark in name for mark in ":/\\") and is_model(name):
        return
    near = difflib.get_close_matches(split_model_name_tag(name)[0], timm.list_models(), n=3)
    hint = f"; the nearest are {', '.join(near)}" if near else "; timm.list_models() shows them all"
    raise BadInput(f"model.name {name!r} is no model of timm{hint}")


def _check_args(name: str, args: Mapping[str, Any]) -> None:
    for key, value in args.items():
        if key in _OWNED:
            raise BadInput(f"model.args.{key} is set by {_OWNED[key]}; leave it out")
        if key in FACTORY:
            raise BadInput(f"model.args.{key} is no argument of {name}; weights are chosen by model.init_from")
        if "drop" in key and value:
            raise BadInput(
                f"model.args.{key} is {value}: dropout would differ with every split of a batch, so it stays 0; "
                "use model.drop_path_rate"
            )


def _build(name: str, hard: dict[str, Any], soft: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    # A model refuses an argument before it draws a weight, so trying again gives the weights of a first try.
    soft = dict(soft)
    while True:
        try:
            return timm.create_model(name, pretrained=False, **hard, **soft), {**hard, **soft}
        except (TypeError, ValueError, AssertionError, RuntimeError, KeyError, IndexError, ZeroDivisionError) as error:
            refused = _UNEXPECTED.search(str(error))
            if refused is None or refused[2] not in {**hard, **soft}:
                raise BadInput(f"timm cannot build {name} with {_shown({**hard, **soft})}: {error}") from error
            if refused[2] not in soft:
                raise BadInput(_refusal(name, refused[1], refused[2])) from None
            del soft[refused[2]]


def _shown(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in args.items())


def _refusal(name: str, class_name: str, key: str) -> str:
    if key == "drop_path_rate":
        return f"{name} has no drop path; set model.drop_path_rate to 0"
    if key in ("global_pool", "num_classes"):
        return f"{name} takes no {key}; choose another model.name"
    owner = getattr(sys.modules[model_entrypoint(name).__module__], class_name, None)
    known = [] if owner is None else [word for word in inspect.signature(owner).parameters if word not in _OWNED]
    near = difflib.get_close_matches(key, known) or sorted(word for word in known if key in word)
    hint = f" (did you mean {' or '.join(repr(f'model.args.{word}') for word in near[:2])}?)" if near else ""
    return f"{name} takes no model.args.{key}{hint}"


def _check_patches(model: nn.Module, img_size: tuple[int, int]) -> None:
    patch = patch_size(model)
    if patch is None or has_stem(model) or not isinstance(model, VisionTransformer | Beit):
        return
    if any(side % step for side, step in zip(img_size, patch, strict=True)):
        floor = [max(step, side - side % step) for side, step in zip(img_size, patch, strict=True)]
        ceiling = [-(-side // step) * step for side, step in zip(img_size, patch, strict=True)]
        raise BadInput(
            f"views.size {list(img_size)} is not a multiple of the {patch[0]}×{patch[1]} patches of the model; "
            f"the nearest sizes are {floor} and {ceiling}; change views.size or model.args.patch_size"
        )


def _switch_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            # The rates that functional dropout reads: drop_rate, attn_drop_p and their like.
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(module, name, 0.0)
