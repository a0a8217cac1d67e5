from typing import Any

import pytest
import timm
import torch

from foreseen.errors import BadInput
from foreseen.models.features import default_features, pooled_features

TINY = {"embed_dim": 24, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 0}
IMAGES = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).sin().view(2, 3, 32, 32)


def vit(**more: Any) -> Any:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **(TINY | more)).eval()


@torch.no_grad()
def test_prefix_tokens_are_no_patches() -> None:
    model = vit(reg_tokens=3)
    tokens = model.forward_features(IMAGES)
    assert torch.equal(pooled_features(model, IMAGES, "cls"), tokens[:, 0])
    assert torch.allclose(pooled_features(model, IMAGES, "mean"), tokens[:, 4:].mean(1))
    both = pooled_features(model, IMAGES, "both")
    assert torch.equal(both, torch.cat([pooled_features(model, IMAGES, name) for name in ("cls", "mean")], dim=1))


@torch.no_grad()
@pytest.mark.parametrize(("pool", "name"), [("token", "cls"), ("avg", "mean")])
def test_the_default_is_what_the_models_own_head_would_see(pool: str, name: str) -> None:
    model = vit(global_pool=pool)
    if pool == "avg":
        model.fc_norm.bias.fill_(0.5)  # mean pooling norms after the mean
    assert default_features(model) == name
    own = model.forward_head(model.forward_features(IMAGES), pre_logits=True)
    assert torch.allclose(pooled_features(model, IMAGES, default_features(model)), own, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 24)}),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 32, "window_size": 1, "depths": (1, 1), "embed_dim": 12, "num_heads": (2, 2)},
        ),
    ],
)
def test_feature_maps_of_either_layout_have_a_mean_and_no_class_token(name: str, args: dict[str, Any]) -> None:
    model = timm.create_model(name, num_classes=0, **args).eval()
    assert default_features(model) == "mean"
    pooled = pooled_features(model, IMAGES, "mean")
    assert pooled.shape == (2, 24)
    assert torch.allclose(pooled, model(IMAGES), atol=1e-6), "what the model's own head would see"
    for asked in ("cls", "both"):
        with pytest.raises(BadInput, match="need a class token, and .* has none; set the features to 'mean'"):
            pooled_features(model, IMAGES, asked)  # type: ignore[arg-type]
