"""MAE computes what the authors' code computes, and keeps what the recipe promises."""

from typing import Any

import pytest
import torch
from torch import Tensor

from foreseen.commands.verbs import method_options
from foreseen.config import Config, load
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.models.masked_vit import patchify, unpatchify
from foreseen.models.sincos import sincos_table
from foreseen.pretrain.mae import MAE, from_official, visible_count
from tests.golden_cases import load_case

OPTIONS = method_options("pretrain")
PROGRESS = Progress(0, 10, 5.0, 0)


def _config(name: str = "vit_tiny_patch16_224", *overrides: str, args: str = "{}") -> Config:
    return load("pretrain", "mae_vit_b16", [f"model.name={name}", f"model.args={args}", *overrides], OPTIONS)


def _small(**more: Any) -> MAE:
    torch.manual_seed(0)
    overrides = {
        "views.size": 32,
        "method.decoder": "{embed_dim: 32, depth: 1, num_heads: 2}",
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    args = overrides.pop("args", "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}")
    name = overrides.pop("name", "vit_tiny_patch16_224")
    return MAE.build(_config(name, *(f"{k}={v}" for k, v in overrides.items()), args=args))


def _batch(size: tuple[int, int] = (32, 32), count: int = 4) -> Batch:
    key = torch.arange(count) * 7919 + 1
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))
    return Batch(key, key, key, {"image": images})


@pytest.mark.parametrize("case_name", ["pretrain_raw", "pretrain_norm_pix"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_prediction_and_gradients_equal_the_authors(case_name: str, dtype: torch.dtype) -> None:
    case, tensors = load_case("mae", case_name)
    c = case["config"]
    objective = _small(
        args=f"{{patch_size: {c['patch_size']}, embed_dim: {c['embed_dim']}, depth: {c['depth']}, "
        f"num_heads: {c['num_heads']}}}",
        views__size=c["img_size"],
        method__norm_pix_loss=c["norm_pix_loss"],
        method__mask_ratio=c["mask_ratio"],
        method__decoder=f"{{embed_dim: {c['decoder_embed_dim']}, depth: {c['decoder_depth']}, "
        f"num_heads: {c['decoder_num_heads']}}}",
    )
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    objective.load_state_dict(from_official(weights))
    objective.to(dtype)
    order = tensors["in/noise"].argsort(dim=1)
    loss, prediction = objective.reconstruct(tensors["in/images"].to(dtype), order)
    loss.backward()

    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if exact else case["tolerance"]

    def expected(name: str) -> Tensor:
        return tensors[f"out64/{name}" if exact and f"out64/{name}" in tensors else f"out/{name}"].to(dtype)

    torch.testing.assert_close(loss, expected("loss"), **tolerance)
    hidden = order[:, objective.num_visible :]
    wanted = tensors["out/pred"].gather(1, hidden[..., None].expand(-1, -1, prediction.shape[-1])).to(dtype)
    torch.testing.assert_close(prediction, wanted, **case["tolerance"])
    parameters = dict(objective.named_parameters())
    ours = list(from_official({name: torch.zeros(()) for name in c["grad_norm_params"]}))
    norms = torch.stack([parameters[name].grad.norm() for name in ours])  # type: ignore[union-attr]
    torch.testing.assert_close(norms, expected("grad_norm"), **tolerance)
    torch.testing.assert_close(
        parameters["vit.patch_embed.proj.bias"].grad, expected("grad_patch_embed_bias"), **tolerance
    )
    frozen = {name for name, parameter in parameters.items() if not parameter.requires_grad}
    assert frozen == {"vit.pos_embed"}  # the decoder's table is a buffer


def test_patches_have_the_authors_pixel_order() -> None:
    case, tensors = load_case("mae", "pretrain_raw")
    p = case["config"]["patch_size"]
    patches = patchify(tensors["in/images"], (p, p))
    torch.testing.assert_close(patches, tensors["out/patchified"])
    torch.testing.assert_close(unpatchify(patches, (p, p), (4, 4)), tensors["in/images"])
    torch.testing.assert_close(unpatchify(tensors["out/pred"], (p, p), (4, 4)), tensors["out/unpatchified_pred"])


@pytest.mark.parametrize("case_name", ["sincos_0_cls", "sincos_0_nocls", "sincos_1_cls", "sincos_1_nocls"])
def test_position_tables_equal_the_authors(case_name: str) -> None:
    case, tensors = load_case("mae", case_name)
    c = case["config"]
    table = sincos_table((c["grid"], c["grid"]), c["dim"], prefix_rows=int(c["cls_token"]))
    torch.testing.assert_close(table.double(), tensors["out/sincos"].double(), rtol=1e-6, atol=1e-7)


def test_as_many_patches_stay_visible_as_in_the_authors_code() -> None:
    case, _ = load_case("mae", "visible_counts")
    for length, ratio, kept in case["values"]["rows"]:
        assert visible_count(length, ratio) == kept


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_distilled_patch16_224",
        "deit3_small_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "vit_base_patch16_clip_224",
        "vit_medium_patch16_reg4_gap_256",
    ],
)
def test_every_kind_of_plain_vit_encodes_what_timm_encodes(name: str) -> None:
    objective = _small(name=name, args="{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}").eval()
    vit, images = objective.vit, _batch().images["image"]
    everything = torch.arange(16).expand(4, -1)
    from foreseen.models.masked_vit import encode_visible

    ours = encode_visible(vit, patchify(images, (8, 8)), everything)
    torch.testing.assert_close(ours, vit.forward_features(images), rtol=1e-5, atol=1e-5)
    objective.train()
    objective(_batch(), None, PROGRESS)["loss"].backward()
    untouched = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []


def test_rectangular_inputs_work_and_the_loss_falls() -> None:
    objective = _small(views__size="[16, 48]", name="vit_tiny_patch16_224")
    assert objective.grid == (2, 6)
    batch = _batch((16, 48), 8)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = objective(batch, None, PROGRESS)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_sample_hides_the_same_patches_wherever_it_stands() -> None:
    objective, batch = _small(), _batch()
    together = objective(batch, None, PROGRESS)["loss"]
    alone = [
        objective(Batch(batch.position[i : i + 1], batch.key[i : i + 1], batch.sample[i : i + 1],
                        {"image": batch.images["image"][i : i + 1]}), None, PROGRESS)["loss"]
        for i in range(4)
    ]  # fmt: skip
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_hidden_pixels_do_not_reach_the_prediction() -> None:
    objective = _small().eval()
    images = _batch().images["image"]
    order = torch.arange(16).expand(4, -1)
    _, prediction = objective.reconstruct(images, order)
    changed = images.clone()
    changed[:, :, 8:] += 1.0  # rows of patches 4 to 15, all hidden
    _, again = objective.reconstruct(changed, order)
    assert torch.equal(prediction, again)


def test_initial_weights_are_drawn_as_the_authors_draw_them() -> None:
    objective = _small(args="{patch_size: 8, embed_dim: 192, depth: 1, num_heads: 3}")
    qkv = objective.vit.blocks[0].attn.qkv
    assert qkv.weight.abs().max() <= (6 / (192 + 576)) ** 0.5
    assert qkv.weight.std().item() == pytest.approx((2 / (192 + 576)) ** 0.5, rel=0.02)
    assert not qkv.bias.any()
    patch = objective.vit.patch_embed.proj
    assert patch.weight.std().item() == pytest.approx((2 / (192 + 192)) ** 0.5, rel=0.02)
    assert patch.bias.any()
    assert objective.vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)


def test_pictures_show_original_seen_and_reconstruction() -> None:
    objective, batch = _small().eval(), _batch()
    (name, picture), *_ = objective.pictures(batch, PROGRESS).items()
    assert "lent" in name
    assert picture.shape == (4, 3, 32, 96)
    assert picture.dtype == torch.uint8
    original, seen, filled = picture.float().chunk(3, dim=3)
    same = (original == seen).all(1).float().mean()
    assert 0.2 < float(same) < 0.35  # a quarter is visible
    visible = (original == seen).all(1)
    assert (original == filled).all(1)[visible].all()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"views__size": 36}, "views.size"),
        ({"method__mask_ratio": 0.99}, "leaves 0 of 16 patches visible"),
        ({"name": "resnet18", "args": "{}"}, "resnet18 is no plain ViT"),
        ({"name": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"method__decoder": "{embed_dim: 32, depth: 1, num_heads: 5}"}, "num_heads 5 does not divide"),
        ({"method__decoder": "{embed_dim: 30, depth: 1, num_heads: 2}"}, "multiple of 4"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        _small(**overrides)
