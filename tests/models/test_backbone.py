import pytest
import timm
import torch
from torch import nn

from foreseen.errors import BadInput
from foreseen.models.backbone import architecture_of, create_backbone, patch_grid
from foreseen.models.drop_path import KeyedDropPath

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def vit(name="vit_tiny_patch16_224", *, img_size=(32, 32), args=None, **options):
    return create_backbone(name, img_size=img_size, args={**TINY, **(args or {})}, **options)


def test_weights_are_drawn_as_timm_draws_them():
    torch.manual_seed(3)
    ours = vit(num_classes=7, pool="token", drop_path_rate=0.2)
    torch.manual_seed(3)
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7, **TINY)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_mean_pooling_is_that_of_mae():
    model = vit(num_classes=7, pool="mean", args={"reg_tokens": 2}).eval()
    images = torch.randn(2, 3, 32, 32)
    tokens = model.forward_features(images)
    assert isinstance(model.norm, nn.Identity)
    expected = model.head(model.fc_norm(tokens[:, 3:].mean(1)))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_base_patch16_gap_224", "vit_base_patch16_siglip_gap_224"]
)
def test_an_encoder_for_pretraining_keeps_its_final_norm(name):
    model = vit(name, args={"reg_tokens": 4})
    assert isinstance(model.norm, nn.LayerNorm)
    assert isinstance(model.fc_norm, nn.Identity)
    assert isinstance(model.head, nn.Identity)
    assert model.num_reg_tokens == 4


def test_rectangles_have_their_own_grid():
    model = vit(img_size=(32, 64))
    assert patch_grid(model) == (4, 8)
    assert model(torch.randn(1, 3, 32, 64)).shape == (1, 24)


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_other_backbones_are_built_without_the_arguments_that_they_do_not_take(name):
    model = create_backbone(name, img_size=(32, 32), num_classes=3, pool="mean").train()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)


@pytest.mark.parametrize("name", ["rexnet_100", "ghostnet_050", "vit_relpos_base_patch16_224", "caformer_s18"])
def test_dropout_that_timm_would_switch_on_is_off(name):
    with torch.device("meta"):
        model = create_backbone(name, img_size=(224, 224))
    assert not [module for module in model.modules() if getattr(module, "p", 0.0) or getattr(module, "drop_rate", 0.0)]


def test_a_default_of_timm_does_not_bring_drop_path_in():
    with torch.device("meta"):
        model = create_backbone("swin_tiny_patch4_window7_224", img_size=(64, 64))
    assert not [module for module in model.modules() if isinstance(module, KeyedDropPath)]


def test_a_backbone_tells_how_to_build_it_again():
    name, args = architecture_of(vit(num_classes=7, pool="mean", drop_path_rate=0.1, img_size=(32, 64)))
    again = timm.create_model(name, num_classes=7, **args)
    assert again(torch.randn(1, 3, 32, 64)).shape == (1, 7)
    assert "drop_path_rate" not in args


def test_an_argument_that_is_none_is_left_out_of_what_builds_it_again():
    # timm's factory drops it, its folders do not: what was trained could not be loaded.
    model = vit("beit_base_patch16_224", args={"init_values": None})
    name, args = architecture_of(model)
    assert model.blocks[0].gamma_1 is not None
    assert "init_values" not in args
    assert list(timm.create_model(name, num_classes=0, **args).state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("vit_smal_patch16_224", {}, "is no model of timm; the nearest are vit_small"),
        ("hf-hub:timm/vit_tiny_patch16_224", {}, "is no model of timm"),
        ("vit_tiny_patch16_224", {"img_size": (130, 128)}, r"\[128, 128\] and \[144, 128\]; change views.size"),
        ("vit_tiny_patch16_224", {"img_size": (8, 32)}, r"nearest sizes are \[16, 32\] and \[16, 32\]"),
        ("vit_tiny_patch16_224", {"args": {"dept": 3}}, "no model.args.dept .did you mean 'model.args.depth'"),
        ("vit_tiny_patch16_224", {"args": {"depth": "x"}}, "cannot build vit_tiny_patch16_224 with .*depth=x"),
        ("vit_tiny_patch16_224", {"args": {"pretrained": True}}, "weights are chosen by model.init_from"),
        ("vit_tiny_patch16_224", {"args": {"checkpoint_path": "w.pth"}}, "no argument of vit_tiny"),
        ("vit_tiny_patch16_224", {"args": {"img_size": 64}}, "model.args.img_size is set by views.size"),
        ("vit_tiny_patch16_224", {"args": {"attn_drop_rate": 0.1}}, "use model.drop_path_rate"),
        ("vgg11", {"drop_path_rate": 0.1}, "vgg11 has no drop path"),
        ("vit_base_patch16_gap_224", {"pool": "token"}, "Token pooling needs the class token"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_with_the_key_to_change(name, options, sentence):
    with pytest.raises(BadInput, match=sentence):
        create_backbone(name, **{"img_size": (128, 128), **options})


def test_shipped_sizes_are_built_without_memory():
    with torch.device("meta"):
        model = create_backbone("vit_huge_patch14_224", img_size=(224, 224), num_classes=1000, pool="mean")
    assert sum(p.numel() for p in model.parameters()) == 632_045_800
