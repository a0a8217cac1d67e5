"""What models with mask tokens share, whatever their blocks are."""

from typing import Any

import pytest
import torch

from foreseen.models.backbone import create_backbone
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.mask_tokens import block_arguments, run_last_block
from foreseen.models.masked_vit import take

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SHARED = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("beit_base_patch16_224", {"init_values": 0.5}),
        ("beit_base_patch16_224", {"init_values": 0.5, **SHARED}),
        ("beit_base_patch16_224", {"init_values": 0.0}),
        ("vit_tiny_patch16_224", {}),
        ("deit3_small_patch16_224", {}),
        ("vit_base_patch16_224", {"qk_norm": True, "init_values": 0.5}),
        ("vit_small_patch16_18x2_224", {}),
    ],
)
def test_the_last_block_makes_of_some_tokens_what_it_makes_of_them_among_all(
    name: str, args: dict[str, Any], fused: bool
) -> None:
    torch.manual_seed(0)
    model: Any = create_backbone(name, img_size=(32, 32), drop_path_rate=0.5, args={**TINY, **args}).double().train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, arguments = model.blocks[-1], block_arguments(model)
    for module in block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    x = torch.randn(8, 17, 24, dtype=torch.float64)
    places = torch.rand(8, 17).argsort(dim=1)[:, :6]
    with draw_drop_path(model, torch.arange(8)):
        expected = take(block(x, **arguments), places)
        torch.testing.assert_close(run_last_block(block, x, places, arguments), expected, rtol=1e-12, atol=1e-12)
