"""Layer decay: smaller learning rates towards the input, and what weight decay leaves alone.

Clark et al. 2020, arXiv:2003.10555; Bao et al. 2021, arXiv:2106.08254. For ViTs the layers are those of MAE's code, for
BEiTs those of BEiT's, for other backbones timm's groups.
"""

from collections.abc import Mapping
from typing import Any

from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from foreseen.engine.objective import ParameterRule

# What comes before the blocks of a timm ViT.
_STEM = ("cls_token", "dist_token", "reg_token", "pos_embed", "patch_embed.", "norm_pre.")
_TABLE = "relative_position_bias_table"


def parameter_rules(
    model: nn.Module, layer_decay: float | None, *, decay_relative_positions: bool = True
) -> dict[str, ParameterRule]:
    """A rule for each trained parameter of a timm model, by its name.

    The last layer has scale 1, the one before it `layer_decay`, the stem the smallest. Vectors and what the model
    itself names (position tables, tokens) have no weight decay.

    Args:
        model: a timm model.
        layer_decay: in (0, 1]; None is 1.
        decay_relative_positions: whether the tables of relative positions in a BEiT's blocks have weight decay, as they
            have in its authors' recipes. One that all blocks share always has.

    Source: facebookresearch/mae, util/lr_decay.py, param_groups_lrd; microsoft/unilm, beit/optim_factory.py.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    spared = _spared(model, decay_relative_positions)
    scales = lr_scales(model, layer_decay)
    return {
        name: ParameterRule(decay=parameter.ndim > 1 and name not in spared, lr_scale=scales.get(name, 1.0))
        for name, parameter in named.items()
    }


def _spared(model: nn.Module, decay_relative_positions: bool) -> set[str]:
    if isinstance(model, Beit):
        tables = {name for name, _ in model.blocks.named_parameters(prefix="blocks") if name.endswith(_TABLE)}
        return {"cls_token", "pos_embed"} | (set() if decay_relative_positions else tables)
    described: Any = model
    return set(described.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()


def lr_scales(model: nn.Module, layer_decay: float | None) -> Mapping[str, float]:
    """The factor on the lr of each parameter of a timm model that has one other than 1, by its name."""
    if layer_decay is None:
        return {}
    if isinstance(model, VisionTransformer | Beit):
        last = len(model.blocks) + 1
        return {name: layer_decay ** (last - _vit_layer(name, last)) for name, _ in model.named_parameters()}
    by_parameter = {
        parameter: float(group["lr_scale"])
        for group in param_groups_layer_decay(model, layer_decay=layer_decay)
        for parameter in group["params"]
    }
    return {name: by_parameter[parameter] for name, parameter in model.named_parameters() if parameter in by_parameter}


def _vit_layer(name: str, last: int) -> int:
    if name.startswith(_STEM):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else last
