"""The blocks of networks of every kind are found, each once."""

import pytest
import timm
import torch
from torch import nn

from foreseen.models.blocks import repeated_blocks
from foreseen.models.masked_vit import PatchDecoder

MODELS = {
    "vit_tiny_patch16_224": {"Block": 12},
    "deit_tiny_distilled_patch16_224": {"Block": 12},
    "beit_base_patch16_224": {"Block": 12},
    "eva02_tiny_patch14_224": {"EvaBlock": 12},
    "swin_tiny_patch4_window7_224": {"SwinTransformerBlock": 12},
    "twins_svt_small": {"Block": 18},
    "convnext_atto": {"ConvNeXtBlock": 12},
    "resnet18": {"BasicBlock": 8},
    "regnety_002": {"Bottleneck": 13},
    "poolformer_s12": {"MetaFormerBlock": 12},
    "maxvit_tiny_tf_224": {"MbConvBlock": 11, "PartitionAttentionCl": 22},
    # Without drop path.
    "efficientvit_b0": {"ResidualBlock": 7, "EfficientVitBlock": 4},
    "ghostnet_100": {"GhostBottleneck": 16},
    "vgg11": {},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_blocks_of_a_timm_model_are_found(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    blocks = repeated_blocks(model)
    assert {kind: [type(b).__name__ for b in blocks].count(kind) for kind in MODELS[name]} == MODELS[name]
    assert len(blocks) == sum(MODELS[name].values())
    inside = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not inside & {id(block) for block in blocks}


def test_the_blocks_of_a_decoder_are_found_and_a_head_has_none() -> None:
    decoder = PatchDecoder(24, 192, (4, 4), embed_dim=32, depth=3, num_heads=2)
    assert repeated_blocks(decoder) == list(decoder.blocks)
    assert repeated_blocks(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))) == []
