"""Pretrained BEiTs of others by this project's names: the authors' v1 and v2, and Hugging Face's.

What comes out is loaded with `strict=False`: the counts behind `baseline_position` are no weights, and begin anew.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from foreseen.handoff.official_beit import BLOCK, check_all_known, is_backbone, is_index

_RENAMED = (
    (re.compile(r"mask_token"), r"mask_token"),
    (re.compile(r"lm_head\.(weight|bias)"), r"head.\1"),
    (re.compile(rf"cls_pt_layers\.(\d+)\.({BLOCK})"), r"aggregation.blocks.\1.\2"),
    (re.compile(r"cls_pt_norm\.(weight|bias)"), r"aggregation.norm.\1"),
    (re.compile(r"cls_pt_lm_head\.(weight|bias)"), r"aggregation.head.\1"),
)
_HUGGING_FACE = (
    (re.compile(r"beit\.embeddings\.mask_token"), r"mask_token"),
    (re.compile(r"beit\.embeddings\.cls_token"), r"vit.cls_token"),
    (re.compile(r"beit\.embeddings\.position_embeddings"), r"vit.pos_embed"),
    (re.compile(r"beit\.embeddings\.patch_embeddings\.projection\."), r"vit.patch_embed.proj."),
    (re.compile(r"beit\.encoder\.relative_position_bias\."), r"vit.rel_pos_bias."),
    (re.compile(r"beit\.encoder\.layer\.(\d+)\."), r"vit.blocks.\1."),
    (re.compile(r"attention\.attention\.relative_position_bias\."), r"attn."),
    (re.compile(r"attention\.attention\.query\.bias"), r"attn.q_bias"),
    (re.compile(r"attention\.attention\.value\.bias"), r"attn.v_bias"),
    (re.compile(r"attention\.output\.dense\."), r"attn.proj."),
    (re.compile(r"intermediate\.dense\."), r"mlp.fc1."),
    (re.compile(r"output\.dense\."), r"mlp.fc2."),
    (re.compile(r"lambda_([12])"), r"gamma_\1"),
    (re.compile(r"layernorm_before\."), r"norm1."),
    (re.compile(r"layernorm_after\."), r"norm2."),
    (re.compile(r"^layernorm\."), r"vit.norm."),
    (re.compile(r"^lm_head\."), r"head."),
)
_PROJECTION = re.compile(r"beit\.encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.weight")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' keys (`model` of a pretraining checkpoint) to those of `BEiT`.

    Raises:
        BadInput: keys that have no place there.

    Source: microsoft/unilm at 768a3c8, beit/modeling_pretrain.py and beit2/modeling_pretrain.py.
    """
    renamed, unknown = {}, []
    for name, tensor in state.items():
        if is_index(name):
            continue
        if is_backbone(name):
            renamed[f"vit.{name}"] = tensor
            continue
        for pattern, place in _RENAMED:
            if (found := pattern.fullmatch(name)) is not None:
                renamed[found.expand(place)] = tensor
                break
        else:
            unknown.append(name)
    check_all_known(unknown, "the pretraining checkpoint")
    return renamed


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the keys of transformers' BeitForMaskedImageModeling to those of `BEiT`.

    Its query, key and value are put one under the other. Its norms have an epsilon of 1e-12 where the authors' and
    timm's have 1e-6.

    Raises:
        BadInput: keys that have no place there.
    """
    renamed: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if is_index(name.replace("beit.encoder.relative_position_bias", "rel_pos_bias")):
            continue
        if (found := _PROJECTION.fullmatch(name)) is not None:
            projections.setdefault(found[1], {})[found[2]] = tensor
            continue
        for pattern, place in _HUGGING_FACE:
            name = pattern.sub(place, name)
        renamed[name] = tensor
    for number, parts in projections.items():
        stacked = torch.cat([parts[which] for which in ("query", "key", "value")])
        renamed[f"vit.blocks.{number}.attn.qkv.weight"] = stacked
    check_all_known(
        (
            name
            for name in renamed
            if not is_backbone(name.removeprefix("vit.")) and name not in ("mask_token", "head.weight", "head.bias")
        ),
        "the checkpoint of transformers",
    )
    return renamed
