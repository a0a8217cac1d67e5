"""Weights of one model as the beginning of another: the backbone must fit, what pools and classifies may differ."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.models.backbone import has_stem, patch_grid, patch_size
from foreseen.models.position import resize_pos_embed
from foreseen.models.relative_position import resize_relative_position, table_rows

# Between backbone and classes; which of them a model has depends on how it pools.
_POOLING = ("norm.", "fc_norm.", "attn_pool.")
_TABLE = "relative_position_bias_table"
_SHARED_TABLE = f"rel_pos_bias.{_TABLE}"
_DISTILLATION = "dist_token"
_ABOUT_DISTILLATION = (
    "{source} has no distillation token: the token and its head are new, and it is placed where the class token is"
)


@dataclass(frozen=True)
class Initialised:
    """What `initialise` did not carry over.

    Attributes:
        fresh: weights of the model that keep their random values.
        unused: weights of the source that have no place in the model.
        notes: what else the user should know, in words.
    """

    fresh: tuple[str, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...] = ()


def initialise(
    model: nn.Module, state: Mapping[str, Tensor], *, img_size: tuple[int, int], source: str
) -> Initialised:  # fmt: skip
    """Copy the weights of another model of the same backbone.

    A position table is resized to the model's grid by MAE's rule, BEiT's tables of relative positions by BEiT's; a
    table that all blocks share is copied into each block of a model that has one per block. A plain ViT's weights
    begin a distilled one, too: its distillation token is new, and is placed where the class token is. Where the
    pooling differs, `norm` is dropped and `fc_norm` begins anew, as MAE and BEiT fine-tune; a head is carried over only
    if it has as many classes.

    Args:
        model: a timm model, changed in place.
        state: the other model's weights, by timm's names.
        img_size: (H, W) in pixels that they were trained at.
        source: where they are from, for messages.

    Raises:
        BadInput: a weight of either backbone has no equal in the other; the model is left as it was.

    Source: facebookresearch/mae, main_finetune.py and util/pos_embed.py; microsoft/unilm, beit/run_class_finetuning.py.
    """
    wanted = model.state_dict()
    given = dict(state)
    lacks_token = isinstance(model, VisionTransformerDistilled) and _DISTILLATION not in given and "cls_token" in given
    if lacks_token:
        given = _with_place_for_distillation(model, given, img_size)
    if "pos_embed" in given and "pos_embed" in wanted:
        given["pos_embed"] = _positions(model, given, img_size)
    if isinstance(model, Beit):
        given = _with_relative_positions(model, given, img_size)
    fitting = {name for name, value in wanted.items() if name in given and given[name].shape == value.shape}
    result = Initialised(
        fresh=tuple(name for name in wanted if name not in fitting),
        unused=tuple(name for name in given if name not in fitting),
        notes=(_ABOUT_DISTILLATION.format(source=source),) if lacks_token else (),
    )
    may_differ = (*_POOLING, *head_names(model), *([_DISTILLATION] if lacks_token else []))
    misfits = [name for name in (*result.fresh, *result.unused) if not name.startswith(may_differ)]
    if misfits:
        raise BadInput(_misfit(misfits, wanted, given, source))
    model.load_state_dict({name: given[name] for name in fitting}, strict=False)
    return result


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of a timm model's classifiers, such as `head`, each with a dot behind it."""
    described: Any = model
    names = described.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _positions(model: nn.Module, given: Mapping[str, Tensor], img_size: tuple[int, int]) -> Tensor:
    table = given["pos_embed"]
    projection = given.get("patch_embed.proj.weight")
    described: Any = model
    if projection is None or table.ndim != 3:
        return table
    prefix = 0 if getattr(described, "no_embed_class", False) else int(described.num_prefix_tokens)
    old_grid = _grid(model, projection, img_size)
    if table.shape[1] != prefix + old_grid[0] * old_grid[1]:
        return table  # prefix tokens differ; the shapes will tell
    return resize_pos_embed(table, old_grid, patch_grid(model), prefix)


def _with_place_for_distillation(
    model: nn.Module, given: Mapping[str, Tensor], img_size: tuple[int, int]
) -> dict[str, Tensor]:  # fmt: skip
    """The same weights, with the class token's position twice where a plain ViT's table has it once.

    Both tokens stand for the whole image, so the new one, which is drawn anew, begins at the same place. DeiT itself
    trains its own from scratch; MAE's class token, and so this one, is at zero.
    """
    table, projection = given.get("pos_embed"), given.get("patch_embed.proj.weight")
    if table is None or projection is None or table.ndim != 3:
        return dict(given)
    rows, columns = _grid(model, projection, img_size)
    if table.shape[1] != 1 + rows * columns:
        return dict(given)  # the shapes will tell
    return dict(given) | {"pos_embed": torch.cat((table[:, :1], table), dim=1)}


def _with_relative_positions(model: Beit, given: Mapping[str, Tensor], img_size: tuple[int, int]) -> dict[str, Tensor]:
    """The same weights with the tables of relative positions that a Beit has, where they can be made of those given."""
    given, wanted = dict(given), model.state_dict()
    if _SHARED_TABLE in given and _SHARED_TABLE not in wanted and f"blocks.0.attn.{_TABLE}" in wanted:
        shared = given.pop(_SHARED_TABLE)
        given |= {f"blocks.{number}.attn.{_TABLE}": shared for number in range(len(model.blocks))}
    projection = given.get("patch_embed.proj.weight")
    if projection is None:
        return given
    old_grid, new_grid = _grid(model, projection, img_size), patch_grid(model)
    return {
        name: resize_relative_position(value, old_grid, new_grid)
        if name.endswith(_TABLE) and len(value) == table_rows(old_grid)
        else value
        for name, value in given.items()
    }


def _grid(model: nn.Module, projection: Tensor, img_size: tuple[int, int]) -> tuple[int, int]:
    """Patches of an image, by the weights given; behind a convolutional stem their kernel lies on the stem's map."""
    behind_stem = patch_size(model) if has_stem(model) else None
    rows, columns = behind_stem or (projection.shape[-2], projection.shape[-1])
    return img_size[0] // rows, img_size[1] // columns


def _misfit(names: list[str], wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str) -> str:
    name = names[0]
    if name not in given:
        what = f"{source} has no {name}, which the model needs"
    elif name not in wanted:
        what = f"{source} has {name}, for which the model has no place"
    else:
        what = f"{name} is {list(given[name].shape)} in {source} and {list(wanted[name].shape)} in the model"
    more = f" (and {len(set(names)) - 1} more)" if len(set(names)) > 1 else ""
    return f"{what}{more}; set model.name=null and model.args=null to take the encoder's own, or change model.init_from"
