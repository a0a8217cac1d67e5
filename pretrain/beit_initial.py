"""How BEiT draws its weights.

Source: microsoft/unilm at 768a3c8, beit/modeling_pretrain.py and beit2/modeling_pretrain.py.
"""

import math
from collections.abc import Iterable

import torch
from timm.layers import LayerScale
from timm.models.beit import Block
from torch import Tensor, nn

from foreseen.models.mask_tokens import MaskableViT

_STD = 0.02
_TOKENS = ("cls_token", "mask_token", "pos_embed", "reg_token", "dist_token")


def initialise(model: MaskableViT) -> None:
    """Draw the weights of a backbone.

    Matrices, the patch embedding, tokens and positions are normal, cut off at one standard deviation of 0.02; biases,
    and timm's tables of relative positions, are zero. The l-th block's projection and second MLP layer are then divided
    by sqrt(2 l).
    """
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            draw(part)
    for name, parameter in model.named_parameters():
        if name in _TOKENS:
            draw_normal(parameter)
    shrink(model.blocks.children(), first=1)


def draw(layer: nn.Linear | nn.Conv2d) -> None:
    """Draw the weights of a layer."""
    draw_normal(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def draw_normal(weight: Tensor) -> None:
    """Draw from a normal distribution cut off at one standard deviation, of 0.02, on either side."""
    nn.init.trunc_normal_(weight, std=_STD, a=-_STD, b=_STD)


def shrink(blocks: Iterable[nn.Module], first: int) -> None:
    """Divide what a block adds to its tokens by sqrt(2 l), where l counts on from `first`."""
    for number, block in enumerate(blocks, first):
        for name, layer in block.named_modules():
            if name in ("attn.proj", "mlp.fc2"):
                assert isinstance(layer, nn.Linear)
                with torch.no_grad():
                    layer.weight.div_(math.sqrt(2.0 * number))


def begin_anew(block: nn.Module) -> None:
    """Draw a copy of a block afresh, by torch's defaults: so the authors' extra blocks begin."""
    for part in block.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.reset_parameters()
        elif isinstance(part, LayerScale):
            nn.init.constant_(part.gamma, part.init_values)
        elif isinstance(part, Block) and part.init_values:
            nn.init.constant_(part.gamma_1, part.init_values)
            nn.init.constant_(part.gamma_2, part.init_values)
    for name, parameter in block.named_parameters():
        if name.endswith(("q_bias", "v_bias", "relative_position_bias_table")):
            nn.init.zeros_(parameter)
