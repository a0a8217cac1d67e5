import pytest
import torch

from foreseen.engine.layer_decay import parameter_rules
from foreseen.models.backbone import create_backbone
from tests.golden_cases import load_case


@pytest.mark.parametrize(("case", "pool"), [("true", "mean"), ("false", "token")])
def test_a_vit_has_the_groups_of_maes_code(case, pool):
    described, _ = load_case("mae", f"layer_decay_global_pool_{case}")
    shape = described["config"]
    model = create_backbone(
        "vit_tiny_patch16_224",
        img_size=(shape["img_size"],) * 2,
        num_classes=shape["num_classes"],
        pool=pool,
        args={key: shape[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")},
    )
    rules = parameter_rules(model, shape["layer_decay"])
    theirs = {
        name: (group["lr_scale"], group["weight_decay"] > 0)
        for group in described["values"]["groups"]
        for name in group["params"]
    }
    assert {name: (rule.lr_scale, rule.decay) for name, rule in rules.items()} == theirs


def test_registers_are_part_of_the_stem_and_are_not_decayed():
    model = create_backbone("vit_tiny_patch16_224", img_size=(32, 32), args={"reg_tokens": 2, "depth": 2})
    rule = parameter_rules(model, 0.5)["reg_token"]
    assert (rule.lr_scale, rule.decay) == (0.125, False)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "convnext_atto", "poolformer_s12", "resnet18", "beit_base_patch16_224"]
)
def test_any_backbone_has_layers(name):
    with torch.device("meta"):
        model = create_backbone(name, img_size=(224, 224), num_classes=3, pool="mean")
    rules = parameter_rules(model, 0.9)
    assert set(rules) == {name for name, parameter in model.named_parameters()}
    scales = sorted({rule.lr_scale for rule in rules.values()})
    assert scales[-1] == 1.0
    assert len(scales) > 5
    head = f"{model.pretrained_cfg['classifier']}.weight"
    assert rules[head].lr_scale == 1.0
    assert rules[head].decay
    first = next(iter(name for name, parameter in model.named_parameters() if parameter.ndim == 4))
    assert rules[first].lr_scale == scales[0]


def test_without_layer_decay_and_for_frozen_weights_nothing_is_scaled():
    model = create_backbone("vit_tiny_patch16_224", img_size=(32, 32), args={"depth": 2})
    model.pos_embed.requires_grad_(False)
    rules = parameter_rules(model, None)
    assert "pos_embed" not in rules
    assert {rule.lr_scale for rule in rules.values()} == {1.0}
