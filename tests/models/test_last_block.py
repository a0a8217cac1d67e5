"""The last block of a transformer makes of some tokens what it makes of them among all."""

from itertools import product
from typing import Any

import pytest
import torch

from foreseen.models.backbone import create_backbone
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.last_block import run_last_block
from foreseen.models.mask_tokens import block_arguments
from foreseen.models.take import Places, take

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
CHOSEN = torch.rand(8, 17, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
PLACES: tuple[Places, ...] = (CHOSEN[:, :6], CHOSEN[:, :2], slice(1), slice(11, None))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("beit_base_patch16_224", {"init_values": 0.5}),
        ("beit_base_patch16_224", {"init_values": 0.5, **SHARED}),
        ("beit_base_patch16_224", {"init_values": 0.0}),
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"qkv_bias": False}),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
        ("deit3_small_patch16_224", {}),
        ("vit_base_patch16_224", {"qk_norm": True, "init_values": 0.5}),
        ("vit_small_patch16_18x2_224", {}),
    ],
)
def test_the_last_block_makes_of_some_tokens_what_it_makes_of_them_among_all(name: str, args: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = create_backbone(name, img_size=(32, 32), drop_path_rate=0.5, args={**TINY, **args}).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, arguments = model.blocks[-1], block_arguments(model)
    x = torch.randn(8, 17, 24, dtype=torch.float64, requires_grad=True)
    trained = [x, *block.parameters()]
    for fused, places in product((True, False), PLACES):
        for module in block.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        with draw_drop_path(model, torch.arange(8)):
            expected = take(block(x, **arguments), places)
            found = run_last_block(block, x, places, arguments)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        direction = torch.randn_like(expected)
        ours, whole = (
            torch.autograd.grad((tokens * direction).sum(), trained, retain_graph=True)
            for tokens in (found, expected)
        )  # fmt: skip
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-9)
