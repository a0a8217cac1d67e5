"""iBOT computes what the authors' code computes, and keeps what the recipe promises."""

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foreseen.commands.verbs import load_recipe
from foreseen.config import Config
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.models.projection_head import ProjectionHead
from foreseen.models.take import take
from foreseen.pretrain.crop_masks import IndependentMasks
from foreseen.pretrain.distillation_losses import koleo
from foreseen.pretrain.distilled_network import Encoded
from foreseen.pretrain.ibot import IBOT, from_official
from tests.engine.driver import assert_the_same_however_cut
from tests.golden_cases import authors_answer, load_case, weights
from tests.small_methods import small_method

ARGS = "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"
PROGRESS = Progress(0, 20, 5.0, 0)
Dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _config(**more: Any) -> Config:
    overrides = small_method(load_recipe("pretrain", "ibot_vit_s16")) | {
        "views.size": 32, "model.args": ARGS, "batch.global_size": 16, "run.epochs": "null", "run.steps": 20,
        "optim.warmup_epochs": "null", "optim.warmup_steps": 0,
    }  # fmt: skip
    overrides |= {key.replace("__", "."): value for key, value in more.items()}
    return load_recipe("pretrain", "ibot_vit_s16", [f"{k}={v}" for k, v in overrides.items()])


def _small(**more: Any) -> IBOT:
    torch.manual_seed(0)
    return IBOT.build(_config(**more).with_length(64)).train()


def _batch(objective: IBOT, count: int = 4) -> Batch:
    key = torch.arange(count) * 7919 + 1
    generator = torch.Generator().manual_seed(1)
    images = {
        view.name: torch.randn(view.count * count, 3, *view.size, generator=generator)
        for view in objective.request.views
    }
    (draw,) = objective.request.draws
    drawn = np.stack([draw.function(np.random.default_rng(number), number) for number in range(count)])
    return Batch(key, key, key, images, {draw.name: torch.from_numpy(drawn)})


@pytest.mark.parametrize("chunk", ["null", 9])
@Dtypes
def test_losses_gradients_and_centres_equal_the_authors_call_after_call(chunk: str | int, dtype: torch.dtype) -> None:
    case, tensors = load_case("ibot", "loss")
    c = case["config"]
    objective = _small(
        method__out_dim=c["out_dim"],
        method__patch_out_dim=c["patch_out_dim"],
        method__shared_head="false",
        method__bottleneck_dim=c["patch_out_dim"],
        method__crops=f"{{local_count: {c['nlcrops']}, local_size: 16}}",
        method__warmup_teacher_temp=c["warmup_teacher_temp"],
        method__teacher_temp=c["teacher_temp"],
        method__warmup_teacher_patch_temp=c["warmup_teacher_temp2"],
        method__teacher_patch_temp=c["teacher_temp2"],
        method__warmup_teacher_temp_epochs=c["warmup_teacher_temp_epochs"],
        method__student_temp=c["student_temp"],
        method__center_momentum=c["center_momentum"],
        method__patch_center_momentum=c["center_momentum2"],
        method__class_weight=c["lambda1"],
        method__patch_weight=c["lambda2"],
        method__mask_ratio="[0.0, 1.0]",
        method__mask_ratio_spread="[0.0, 0.0]",
        method__logits_chunk=chunk,
    ).to(dtype)
    # With axes for prototypes a bottleneck is its own logits; the teacher's MLP is passed by.
    for network in (objective.student, objective.teacher):
        network.head.last_layer.weight_v.data.copy_(torch.eye(c["patch_out_dim"])[: c["out_dim"]])
        network.head.last_layer2.weight_v.data.copy_(torch.eye(c["patch_out_dim"]))
    objective.teacher.patch_bottleneck = lambda tokens: tokens  # type: ignore[method-assign]

    def widened(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows.to(dtype), (0, c["patch_out_dim"] - c["out_dim"]))

    for call, epoch in enumerate(c["epochs_at"]):
        progress = Progress(epoch, c["nepochs"], 1.0, 0)
        assert objective.teacher_temperature(progress) == pytest.approx(case["values"]["teacher_temp_schedule"][epoch])
        mask = tensors["in/masks"][call].flatten(1)
        with torch.no_grad():
            (classes,) = objective.class_targets([widened(tensors["in/teacher_cls"][call])], progress)
            taught = tensors["in/teacher_patch"][call].to(dtype)
            rows = objective.patch_rows(taught, objective.hidden_places(mask), mask)
            (patches,) = objective.patch_targets([rows], progress)
        student_cls = tensors["in/student_cls"][call].to(dtype).requires_grad_()
        student_patch = tensors["in/student_patch"][call].to(dtype).requires_grad_()
        crops = torch.cat([widened(student_cls), widened(tensors["in/student_local_cls"][call])])
        found = {
            "loss_cls": objective.class_terms(crops, classes)["loss"],
            "loss_patch": objective.patch_terms(take(student_patch, patches.places).flatten(0, 1), patches)[
                "patch_loss"
            ],
        }
        found["loss"] = found["loss_cls"] + found["loss_patch"]
        found["loss"].backward()
        objective.centre.move(torch.tensor(True))
        objective.patch_centre.move(torch.tensor(True))
        found |= {
            "center": objective.centre.center[None], "center2": objective.patch_centre.center[None, None],
            "grad_student_cls": student_cls.grad, "grad_student_patch": student_patch.grad,
        }  # fmt: skip
        for name, ours in found.items():
            expected, tolerance = authors_answer(case, tensors, f"{name}.{call}", dtype)
            torch.testing.assert_close(ours, expected, **tolerance)


@pytest.mark.parametrize("shared", [True, False])
@Dtypes
def test_the_head_equals_the_authors(shared: bool, dtype: torch.dtype) -> None:
    case, tensors = load_case("ibot", "head_shared" if shared else "head_separate")
    c = case["config"]
    head = ProjectionHead(
        c["in_dim"], c["out_dim"], hidden_dim=c["hidden_dim"], bottleneck_dim=c["bottleneck_dim"],
        patch_prototypes=None if shared else c["patch_out_dim"],
    )  # fmt: skip
    official = {"student": {f"head.{name}": value for name, value in weights(tensors).items()}}
    renamed = from_official(official, shared_head=shared)
    head.load_state_dict({name.removeprefix("student.head."): value for name, value in renamed.items()})
    head.to(dtype)
    tokens = tensors["in/tokens"].to(dtype)
    bottleneck = head(tokens.flatten(0, 1)).view(*tokens.shape[:2], -1)
    found = {
        "cls_out": bottleneck[:, 0] @ head.prototypes().mT,
        "patch_out": bottleneck[:, 1:] @ head.patch_prototypes().mT,
        "cls_only_out": head(tokens[:, 0]) @ head.prototypes().mT,
    }
    for name, ours in found.items():
        expected, tolerance = authors_answer(case, tensors, name, dtype)
        torch.testing.assert_close(ours, expected, **tolerance)


@Dtypes
def test_masked_features_equal_the_authors(dtype: torch.dtype) -> None:
    case, tensors = load_case("ibot", "masked_vit")
    objective = _small().eval()
    official = {"student": {f"backbone.{name}": value for name, value in weights(tensors).items()}}
    missing, unexpected = objective.load_state_dict(from_official(official, shared_head=True), strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith(("student.backbone", "student.mask_token"))]
    objective.to(dtype)
    mask = tensors["in/mask"].flatten(1)
    expected, tolerance = authors_answer(case, tensors, "tokens", dtype)
    every = torch.arange(mask.shape[1]).expand_as(mask)
    for wanted, places in (("none", every[:, :0]), ("all", every), (every[:, 3:5], every[:, 3:5])):
        pooled, patches, _ = objective.student.encode(tensors["in/images"].to(dtype), mask=mask, patches=wanted)
        found = torch.cat([pooled[:, None], patches], dim=1)
        torch.testing.assert_close(found, torch.cat([expected[:, :1], take(expected[:, 1:], places)], 1), **tolerance)


@pytest.mark.parametrize("name", ["block_mask_official", "block_mask_fixed", "rand_mask"])
def test_masks_have_the_authors_statistics(name: str) -> None:
    case, tensors = load_case("ibot", name)
    c, values = case["config"], case["values"]
    listed = isinstance(c["pred_ratio"], list)
    masks = IndependentMasks(
        (14, 14), 2, "block" if c["pred_shape"] == "block" else "random",
        tuple(c["pred_ratio"]) if listed else (c["pred_ratio"],),
        tuple(c["pred_ratio_var"]) if listed else (c["pred_ratio_var"],),
    )  # fmt: skip
    generator = np.random.default_rng(5)
    drawn = np.concatenate([masks(generator, 0) for _ in range(c["draws"] // 2)])
    ratios = drawn.mean(1)
    error = values["std_ratio"] / c["draws"] ** 0.5
    assert abs(ratios.mean() - values["mean_ratio"]) < 5 * 2**0.5 * error
    assert ratios.std() == pytest.approx(values["std_ratio"], rel=0.12)
    assert ratios.max() <= masks.most / 196
    assert abs((ratios == 0).mean() - values["fraction_unmasked_images"]) < 0.06
    assert np.abs(drawn.mean(0).reshape(14, 14) - tensors["out/position_frequency"].numpy()).max() < 0.07


HARDER = {
    "shared": {"method__teacher_patch_temp": 0.05},
    "separate": {"method__shared_head": "false", "method__patch_out_dim": 40, "method__logits_chunk": 23},
    "sinkhorn": {"method__centering": "sinkhorn", "method__mask_shape": "random"},
    "koleo": {"method__koleo_weight": 0.3, "method__koleo_group": 2},
}


@pytest.mark.parametrize("more", HARDER.values(), ids=HARDER)
def test_a_run_does_not_depend_on_accumulation(more: dict[str, Any]) -> None:
    def make() -> IBOT:
        return IBOT.build(_config(model__drop_path_rate=0.2, **more).with_length(37))

    assert_the_same_however_cut(make)


def test_every_trained_weight_takes_part_even_where_no_patch_is_hidden() -> None:
    objective = _small(method__shared_head="false")
    batch = _batch(objective)
    batch.draws["mask"].fill_(False)
    with torch.no_grad():
        (prepared,) = objective.prepare([batch], PROGRESS)
    found = objective(batch, prepared, PROGRESS)
    found["loss"].backward()
    assert found["patch_loss"].detach() == 0.0
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


def test_koleo_is_added_for_each_large_crop_where_it_is_wanted() -> None:
    koleo_on = {"method__koleo_weight": 0.3, "method__koleo_group": 2}
    found = {}
    for name, more in (("without", {}), ("with", koleo_on)):
        objective = _small(model__drop_path_rate=0, **more)
        batch = _batch(objective)
        with torch.no_grad():
            (prepared,) = objective.prepare([batch], PROGRESS)
        found[name] = objective(batch, prepared, PROGRESS)
    large = batch.images[objective.large.name]
    pooled = objective.student.encode(large, mask=prepared.mask, patches=prepared.patches.places).pooled
    expected = sum(koleo(crop, 2) for crop in pooled.chunk(2))
    assert "koleo" not in found["without"]
    torch.testing.assert_close(found["with"]["koleo"], expected)
    torch.testing.assert_close(found["with"]["loss"], found["without"]["loss"] + 0.3 * expected)


def test_hidden_pixels_reach_the_teacher_alone() -> None:
    objective = _small().eval()
    images = torch.randn(1, 3, 32, 32)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, :8] = True
    changed = images.clone()
    changed[:, :, :16] += 1.0
    student = [objective.student.encode(each, mask=mask, patches="all").patches for each in (images, changed)]
    teacher = [objective.teacher.encode(each, patches="all").patches for each in (images, changed)]
    assert torch.equal(*student)
    assert not torch.equal(*teacher)
    assert objective.teacher.mask_token is None


def test_pictures_show_what_is_hidden() -> None:
    objective = _small()
    pictures = objective.pictures(_batch(objective), PROGRESS)
    assert pictures["global, masked"].shape == pictures["global"].shape == (4, 3, 32, 64)
    assert not torch.equal(pictures["global, masked"], pictures["global"])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model__name": "resnet18", "model__args": "{}", "model__drop_path_rate": 0, "views__size": 64,
          "method__crops": "{local_count: 2, local_size: 32}"}, "resnet18 is no plain ViT.*method.name=dino"),
        ({"model__name": "swin_tiny_patch4_window7_224", "model__args": "{window_size: 4}", "views__size": 48},
         r"views.size \[48, 48\] is no multiple of 32, .*swin_tiny_patch4_window7_224.*views.size=\[64, 64\] fits"),
        ({"method__head_batch_norm": "true"}, "method.head_batch_norm is true"),
        ({"method__teacher_patch_temp": 0.2}, "method.teacher_patch_temp 0.2 is above method.student_temp 0.1"),
        ({"method__mask_ratio": "[0.3]"}, "must be as many"),
        ({"method__mask_ratio": "[0.0, 0.9]"}, "leaves"),
        ({"method__mask_ratio": "[0.01]", "method__mask_ratio_spread": "[0.0]"}, "hide no patch"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_a_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        _small(**overrides)


SWINS = {
    "swin_tiny_patch4_window7_224": "{depths: [1, 1], embed_dim: 24, num_heads: [2, 2], window_size: 4}",
    "swinv2_tiny_window8_256": "{depths: [1, 1], embed_dim: 24, num_heads: [2, 2], window_size: 4}",
}


def _swin(name: str, **more: Any) -> IBOT:
    return _small(model__name=name, model__args=SWINS[name], **more)


@pytest.mark.parametrize("name", SWINS)
def test_a_swin_is_masked_on_its_last_map_and_trained_whole(name: str) -> None:
    objective = _swin(name, model__drop_path_rate=0.1)
    batch = _batch(objective)
    assert batch.draws["mask"].shape == (4, 2, 4 * 4)  # places of 8 px
    with torch.no_grad():
        (prepared,) = objective.prepare([batch], PROGRESS)
    found = objective(batch, prepared, PROGRESS)
    assert float(found["patch_loss"].detach()) > 0
    found["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    objective.after_step(PROGRESS, torch.tensor(True))
    assert all(float(value) == float(value) for value in objective.health().values())
    shown = objective.pictures(batch, PROGRESS)
    hidden = (shown["global, masked"] != shown["global"]).float().mean()
    assert float(hidden) == pytest.approx(float(batch.draws["mask"].float().mean()), abs=0.02)


@pytest.mark.parametrize("name", SWINS)
def test_a_swins_hidden_places_cannot_be_seen_and_without_a_mask_it_is_timms(name: str) -> None:
    network = _swin(name).student.eval()
    images = torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2, 1:] = True
    changed = images.clone()
    changed[:, :, :16, 8:] += 1.0
    three = (images, changed, images + 1.0)
    seen = [network.encode(each, mask=mask.flatten(1), patches="all").patches for each in three]
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])
    pooled, tokens, _ = network.encode(images, patches="all")
    torch.testing.assert_close(pooled, network.backbone(images))
    torch.testing.assert_close(pooled, tokens.mean(1))


STEM = {"patch_size": 2, "embed_dim": 24, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize("more", [{}, {"class_token": False}])
@pytest.mark.parametrize("side", [32, 16])
def test_a_convolutional_stem_hides_tokens_and_without_a_mask_it_is_timms(more: dict[str, bool], side: int) -> None:
    network = _small(model__name="vit_tiny_r_s16_p8_224", model__args=STEM | more).student.eval()
    images = torch.randn(2, 3, side, side)
    every = network.encode(images, patches="all")
    if side == 32:  # timm interpolates positions otherwise
        torch.testing.assert_close(every.pooled, network.backbone(images))
    count = (side // 8) ** 2
    assert every.patches is not None
    assert every.patches.shape == (2, count, 24)
    places = torch.tensor([[0, count - 1], [1, 2]])
    some = network.encode(images, patches=places)
    torch.testing.assert_close(some.patches, every.patches[torch.arange(2)[:, None], places])
    hidden = torch.ones(2, count, dtype=torch.bool)
    one, other = (network.encode(each, mask=hidden).pooled for each in (images, images + 1.0))
    assert torch.equal(one, other)


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_accumulation_keeps_no_teachers_tokens(centering: str) -> None:
    objective = _small(method__centering=centering)
    generator, alive = np.random.default_rng(0), []
    num_features, count = objective.student.backbone.num_features, objective.student.backbone.patch_embed.num_patches

    def encode(images: Tensor, patches: Tensor | str) -> Encoded:
        assert not [each for each in alive if each() is not None]
        tokens = generator.standard_normal((len(images), 1 + count, num_features), dtype=np.float32)
        alive.append(weakref.ref(tokens))  # memory that tensors and views of them share
        of_torch = torch.from_numpy(tokens)
        found = of_torch[:, 1:]
        return Encoded(of_torch[:, 0], found if isinstance(patches, str) else take(found, patches), found)

    objective.teacher.encode = encode
    (view, *_), (draw,) = objective.request.views, objective.request.draws
    mask = torch.from_numpy(np.stack([draw.function(generator, number) for number in range(4)]))
    key = torch.arange(4)
    batch = Batch(key, key, key, {view.name: torch.zeros(view.count * 4, 3, *view.size)}, {"mask": mask})
    with torch.no_grad():
        prepared = objective.prepare([batch] * 3, Progress(0, 10, 1.0, 0))
    assert len(prepared) == len(alive) == 3
    assert not [each for each in alive if each() is not None]
