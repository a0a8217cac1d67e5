"""DINOv2 computes what the authors' code computes, and keeps what the recipe promises."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.config import Config
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.models.drop_path import drop_path_modules
from foreseen.models.position import resample_pos_embed
from foreseen.models.projection_head import ProjectionHead
from foreseen.models.take import take
from foreseen.pretrain.crop_masks import StratifiedMasks
from foreseen.pretrain.dinov2 import DINOv2, from_official
from foreseen.pretrain.distillation_losses import koleo
from foreseen.pretrain.target_balance import row_sum, scaled_logits, sinkhorn_shift
from tests.engine.any_order import AnyOrder
from tests.engine.driver import assert_the_same_however_cut
from tests.golden_cases import authors_answer, load_case, weights
from tests.small_methods import small_method

ARGS = "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, init_values: 0.1}"
PROGRESS = Progress(0, 20, 5.0, 0)
Dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def _config(**more: Any) -> Config:
    overrides = small_method(load_recipe("pretrain", "dinov2_vit_l16_short")) | {
        "views.size": 32, "model.args": ARGS, "batch.global_size": 16, "run.epochs": "null", "run.steps": 20,
        "optim.warmup_epochs": "null", "optim.warmup_steps": 0,
    }  # fmt: skip
    overrides |= {key.replace("__", "."): value for key, value in more.items()}
    return load_recipe("pretrain", "dinov2_vit_l16_short", [f"{k}={v}" for k, v in overrides.items()])


def _small(**more: Any) -> DINOv2:
    torch.manual_seed(0)
    return DINOv2.build(_config(**more).with_length(64)).train()


def test_koleo_adds_in_one_order_on_a_gpu_too() -> None:
    # The second is the nearest to both others.
    features = torch.tensor([[1.0, 0.1], [1.0, 0.0], [1.0, -0.12]], requires_grad=True)
    with AnyOrder() as any_order:
        koleo(features, 3).backward()
    assert any_order.found == []


@Dtypes
def test_koleo_equals_the_authors(dtype: torch.dtype) -> None:
    case, tensors = load_case("dinov2", "koleo")
    features = tensors["in/x"].to(dtype).requires_grad_()
    loss = koleo(features, len(features))
    loss.backward()
    for name, ours in (("loss", loss), ("grad_x", features.grad)):
        expected, tolerance = authors_answer(case, tensors, name, dtype)
        torch.testing.assert_close(ours, expected, **tolerance)


def test_koleo_looks_within_consecutive_groups_and_survives_duplicates() -> None:
    features = torch.randn(8, 5, dtype=torch.float64)
    groups = torch.stack([koleo(part, 4) for part in features.chunk(2)]).mean()
    torch.testing.assert_close(koleo(features, 4), groups, rtol=1e-12, atol=0)
    same = torch.ones(4, 5, requires_grad=True)
    koleo(same, 4).backward()
    assert same.grad.isfinite().all()
    assert koleo(torch.ones(4, 5, dtype=torch.bfloat16), 4).dtype == torch.float32


@pytest.mark.parametrize("at_once", [None, 3])
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_sinkhorn_equals_the_authors_in_pieces_and_beside_empty_places(iterations: int, at_once: int | None) -> None:
    case, tensors = load_case("dinov2", "sinkhorn")
    c = case["config"]
    rows = tensors["in/teacher"]
    axes = torch.eye(c["K"])  # so that a bottleneck is its own logits
    padded = torch.cat([rows[5:], 3 * torch.ones(2, c["K"])])
    shift = sinkhorn_shift(
        [rows[:5], padded], axes, c["teacher_temp"], iterations=iterations, at_once=at_once,
        weights=[torch.ones(5), torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0])],
    )  # fmt: skip
    targets = (scaled_logits(rows, axes, c["teacher_temp"]) + shift).softmax(-1)
    for name in ("sinkhorn", "sinkhorn_patch"):
        torch.testing.assert_close(targets, tensors[f"out/{name}.{iterations}"], **case["tolerance"])


def test_sinkhorn_does_not_overflow() -> None:
    rows = torch.tensor([[300.0, 0.0, -300.0], [-300.0, 0.0, 300.0], [0.0, 200.0, 0.0]])
    shift = sinkhorn_shift([rows], torch.eye(3), 0.04)
    targets = (scaled_logits(rows, torch.eye(3), 0.04) + shift).softmax(-1)
    torch.testing.assert_close(targets, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]))


@pytest.mark.parametrize("chunk", ["null", 4])
@Dtypes
def test_class_loss_and_centre_equal_the_authors_call_after_call(chunk: str | int, dtype: torch.dtype) -> None:
    """Theirs adds up what all crops given make of all targets; ours is a mean over pairs of different crops.

    So two crops of even logits go before theirs, and what they add, ln K for each of their two pairs, is taken away.
    """
    case, tensors = load_case("dinov2", "cls_loss")
    c = case["config"]
    objective = _with_logits_for_bottlenecks(c, crops=c["n_student"]).to(dtype)
    for call in range(2):
        with torch.no_grad():
            (targets,) = objective.class_targets([tensors["in/teacher"][call].to(dtype)], PROGRESS)
        softmax = (scaled_logits(targets.bottleneck, targets.prototypes, targets.temperature) + targets.shift).softmax(
            -1
        )
        expected, tolerance = authors_answer(case, tensors, f"teacher_softmax.{call}", dtype)
        torch.testing.assert_close(softmax.flatten(0, 1), expected, **tolerance)
        student = tensors["in/student"][call].to(dtype).requires_grad_()
        objective.options = objective.options.model_copy(
            update={"student_temp": c["student_temp"], "logits_chunk": None if chunk == "null" else chunk}
        )
        before = torch.zeros(4, c["K"], dtype=dtype)
        objective.num_crops = c["n_student"] + 2
        mean = objective.class_terms(torch.cat([before, student]), targets)["loss"]
        uniform = torch.log(torch.tensor(float(c["K"]), dtype=dtype))
        pairs = 2 * (objective.num_crops - 1)
        loss = mean * pairs - 2 * uniform
        loss.backward()
        objective.centre.move(torch.tensor(True))
        for name, ours in ((f"loss.{call}", loss), (f"grad_student.{call}", student.grad)):
            expected, tolerance = authors_answer(case, tensors, name, dtype)
            torch.testing.assert_close(ours, expected, **tolerance)
    expected, tolerance = authors_answer(case, tensors, "center", dtype)
    torch.testing.assert_close(objective.centre.center[None], expected, **tolerance)


def _with_logits_for_bottlenecks(config: dict[str, Any], crops: int = 2) -> DINOv2:
    objective = _small(
        method__out_dim=config["K"], method__bottleneck_dim=config["K"], method__patch_bottleneck_dim=config["K"],
        method__separate_heads="true", method__teacher_temp=config["teacher_temp"], method__student_temp=0.1,
        method__warmup_teacher_temp=config["teacher_temp"], method__mask_ratio="[0.0, 1.0]",
        method__crops=f"{{local_count: {crops}, local_size: 16}}", method__norm_last_layer="true",
    )  # fmt: skip
    for network in (objective.student, objective.teacher):
        for head in (network.head, network.patch_head):
            head.last_layer.weight_v.data.copy_(torch.eye(config["K"]))
    return objective


@pytest.mark.parametrize("chunk", ["null", 5])
@Dtypes
def test_patch_loss_and_centre_equal_the_authors(chunk: str | int, dtype: torch.dtype) -> None:
    case, tensors = load_case("dinov2", "patch_loss")
    objective = _with_logits_for_bottlenecks(case["config"]).to(dtype)
    objective.options = objective.options.model_copy(update={"logits_chunk": None if chunk == "null" else chunk})
    objective.teacher.patch_bottleneck = lambda tokens: tokens
    mask = tensors["in/masks"]
    with torch.no_grad():
        places = objective.hidden_places(mask)
        rows = objective.patch_rows(take(tensors["in/teacher"].to(dtype), places), places, mask)
        (targets,) = objective.patch_targets([rows], PROGRESS)
        objective.patch_centre.observe([row_sum(tensors["in/teacher"].to(dtype).flatten(0, 1))], targets.prototypes)
    objective.patch_centre.move(torch.tensor(True))
    expected, tolerance = authors_answer(case, tensors, "center", dtype)
    torch.testing.assert_close(objective.patch_centre.center[None, None], expected, **tolerance)
    hidden = targets.weights > 0
    torch.testing.assert_close(
        targets.weights[hidden].float(), tensors["out/default_masks_weight"], **case["tolerance"]
    )  # fmt: skip
    # Theirs are in float32 in every run.
    for name, given in (
        ("loss_full", targets.weights[hidden]),
        ("loss_masked_default_weight", tensors["out/default_masks_weight"].to(dtype)),
        ("loss_masked_given_weight", tensors["in/masks_weight"].to(dtype)),
    ):
        student = tensors["in/student"].to(dtype).requires_grad_()
        weighted = targets._replace(weights=torch.zeros_like(targets.weights).masked_scatter(hidden, given))
        loss = objective.patch_terms(take(student, targets.places).flatten(0, 1), weighted)["patch_loss"]
        expected, tolerance = authors_answer(case, tensors, name, dtype)
        torch.testing.assert_close(loss, expected, **tolerance)
    loss.backward()
    expected, tolerance = authors_answer(case, tensors, "grad_student", dtype)
    torch.testing.assert_close(student.grad, expected, **tolerance)


@pytest.mark.parametrize("name", ["vit_plain", "vit_registers", "vit_swiglu"])
@Dtypes
def test_features_equal_the_authors(name: str, dtype: torch.dtype) -> None:
    case, tensors = load_case("dinov2", name)
    c = case["config"]
    registers = c["num_register_tokens"]
    swiglu = c["ffn_layer"] != "mlp"
    model = ("vit_giant_patch14_reg4_dinov2" if swiglu else "vit_large_patch14_reg4_dinov2") if registers else (
        "vit_large_patch16_224"
    )  # fmt: skip
    args = (
        f"{{patch_size: {c['patch_size']}, embed_dim: {c['embed_dim']}, depth: {c['depth']}, "
        f"num_heads: {c['num_heads']}, init_values: {c['init_values']}"
    )
    objective = _small(
        model__name=model, model__args=args + (f", reg_tokens: {registers}}}" if registers else "}"),
        views__size=c["img_size"], method__crops="{local_count: 2, local_size: 28}",
        method__position_resize="antialias" if c["interpolate_antialias"] else "offset",
    ).eval().to(dtype)  # fmt: skip
    official = {"student": {f"backbone.{key}": value.to(dtype) for key, value in weights(tensors).items()}}
    vit: Any = objective.student.backbone
    missing, unexpected = objective.load_state_dict(from_official(official, vit), strict=False)
    assert not unexpected
    assert not [key for key in missing if key.startswith(("student.backbone", "student.mask_token"))]
    mask = tensors["in/masks"]
    pooled, patches, _ = objective.student.encode(tensors["in/images"].to(dtype), mask=mask, patches="all")
    small, small_patches, _ = objective.student.encode(tensors["in/images_small"].to(dtype), patches="all")
    places = objective.hidden_places(mask)
    alone = objective.student.encode(tensors["in/images"].to(dtype), mask=mask, patches=places)
    torch.testing.assert_close(alone[:2], (pooled, take(patches, places)))
    found = {
        "x_norm_clstoken": pooled, "x_norm_patchtokens": patches,
        "small_clstoken": small, "small_patchtokens": small_patches,
    }  # fmt: skip
    for key, ours in found.items():
        # They interpolate positions in float32 in every run.
        expected, tolerance = authors_answer(case, tensors, key, torch.float32 if key.startswith("small") else dtype)
        torch.testing.assert_close(ours.to(expected.dtype), expected, **tolerance)
    layers = vit.forward_intermediates(
        tensors["in/images"].to(dtype), indices=2, norm=True, intermediates_only=True, return_prefix_tokens=True,
        output_fmt="NLC",
    )  # fmt: skip
    for number, (of_patches, prefix) in enumerate(layers):
        for key, ours in ((f"intermediate_patch.{number}", of_patches), (f"intermediate_cls.{number}", prefix[:, 0])):
            expected, tolerance = authors_answer(case, tensors, key, dtype)
            torch.testing.assert_close(ours, expected, **tolerance)


def test_positions_are_interpolated_in_the_authors_four_ways() -> None:
    case, tensors = load_case("dinov2", "pos_embed_interpolation")
    c, table = case["config"], tensors["in/pos_embed"]
    names = {
        "plain_offset": "offset", "aa_size": "antialias", "plain_size": "exact", "aa_offset": "antialias_offset",
    }  # fmt: skip
    for height, width in c["targets"]:
        for theirs, ours in names.items():
            resized = resample_pos_embed(table, (c["grid"], c["grid"]), (height, width), 1, ours)  # type: ignore[arg-type]
            torch.testing.assert_close(resized, tensors[f"out/pos.{theirs}_{height}x{width}"], **case["tolerance"])


@Dtypes
def test_the_head_equals_the_authors(dtype: torch.dtype) -> None:
    case, tensors = load_case("dinov2", "head")
    c = case["config"]
    head = ProjectionHead(
        c["in_dim"], c["out_dim"], hidden_dim=c["hidden_dim"], bottleneck_dim=c["bottleneck_dim"], trains_gain=True
    )
    head.load_state_dict(weights(tensors))
    head.to(dtype)
    expected, tolerance = authors_answer(case, tensors, "y", dtype)
    torch.testing.assert_close(head(tensors["in/x"].to(dtype)) @ head.prototypes().mT, expected, **tolerance)
    assert head.last_layer.weight_g.requires_grad


def test_parameter_groups_equal_the_authors() -> None:
    case, _ = load_case("dinov2", "param_groups")
    c = case["config"]
    m = c["model"]
    objective = _small(
        model__name="vit_large_patch14_reg4_dinov2", views__size=m["img_size"],
        model__args=f"{{patch_size: {m['patch_size']}, embed_dim: {m['embed_dim']}, depth: {m['depth']}, num_heads: "
        f"{m['num_heads']}, reg_tokens: {m['num_register_tokens']}}}",
        method__patch_embed_lr_scale=c["patch_embed_lr_mult"], method__crops="{local_count: 2, local_size: 14}",
    )  # fmt: skip
    rules = objective.parameter_rules(c["layerwise_decay"])
    ours = {
        name.removeprefix("student.").removeprefix("backbone.").replace("reg_token", "register_tokens"): (
            pytest.approx(rule.lr_scale), float(rule.decay)
        )
        for name, rule in rules.items() if not name.startswith(("student.head", "student.patch_head"))
    }  # fmt: skip
    theirs = {name: (lr, decay) for name, (lr, decay, _) in case["values"]["per_parameter"].items()}
    assert theirs == ours
    groups = {rule.clip_group for rule in rules.values()}
    assert groups == {"backbone", "head"}


def test_masks_have_the_authors_statistics() -> None:
    case, _ = load_case("dinov2", "mask_collate")
    c, values = case["config"], case["values"]
    masks = StratifiedMasks((c["grid"],) * 2, 2, c["batch"], 3, c["mask_probability"], tuple(c["mask_ratio"]))
    generator = np.random.default_rng(1)
    ratios = []
    for step in range(c["batches"]):
        drawn = np.concatenate([masks(generator, step * c["batch"] + place) for place in range(c["batch"])])
        hidden = drawn.mean(1)[drawn.any(1)]
        assert len(hidden) == values["max_masked_images"] == values["min_masked_images"]
        assert drawn.sum(1).max() <= masks.most == 128
        # One ratio from each of eight bins, less what blocks fall short of it.
        bins = np.linspace(*c["mask_ratio"], len(hidden) + 1)
        assert (np.sort(hidden) <= bins[1:]).all()
        ratios.extend(hidden)
    assert np.mean(ratios) == pytest.approx(values["mean_ratio_of_masked_images"], abs=0.012)


HARDER = {
    "short": {"method__koleo_group": 4},
    "long": {"method__centering": "sinkhorn", "method__separate_heads": "true", "method__patch_out_dim": 40,
             "method__logits_chunk": 23, "method__koleo_group": 2},
}  # fmt: skip


@pytest.mark.parametrize("more", HARDER.values(), ids=HARDER)
def test_a_run_does_not_depend_on_accumulation(more: dict[str, Any]) -> None:
    def make() -> DINOv2:
        return DINOv2.build(_config(model__drop_path_rate=0.2, **more).with_length(37))

    assert_the_same_however_cut(make)


def test_every_trained_weight_takes_part_and_drop_path_is_uniform() -> None:
    objective = _small(
        model__name="vit_giant_patch14_reg4_dinov2", model__drop_path_rate=0.3, method__separate_heads="true",
        model__args="{patch_size: 8, embed_dim: 48, depth: 3, num_heads: 3}", method__koleo_group=2,
    )  # fmt: skip
    rates = [module.rate for module in drop_path_modules(objective.student)]
    assert rates == [0.3] * 6
    key = torch.arange(4) * 7919 + 1
    images = {view.name: torch.randn(view.count * 4, 3, *view.size) for view in objective.request.views}
    (draw,) = objective.request.draws
    mask = np.stack([draw.function(np.random.default_rng(number), number) for number in range(4)])
    batch = Batch(key, key, key, images, {"mask": torch.from_numpy(mask)})
    with torch.no_grad():
        (prepared,) = objective.prepare([batch], PROGRESS)
    found = objective(batch, prepared, PROGRESS)
    assert {"loss", "class_loss", "patch_loss", "koleo"} <= found.keys()
    found["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"method__koleo_group": 1}, "method.koleo_group"),
        ({"method__mask_probability": 0.001}, "method.mask_probability 0.001 masks none of the 2 × "),
        ({"method__mask_ratio": "[0.5, 0.1]"}, "method.mask_ratio must be two rising shares"),
        (
            {"model__name": "convnext_atto", "model__args": "null", "method__crops": "{local_count: 0}"},
            "is no plain ViT",
        ),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        _small(**overrides)


@pytest.mark.parametrize(
    ("micro_size", "sentence"),
    [
        (6, "batch.micro_size 6 is no multiple of 4, the size of the groups in which dinov2 relates images to each "
            "other; micro sizes that fit batch.global_size 12 are 4, 12; or set method.koleo_group (now 4) to 2, 3, 6, "
            "or method.koleo_weight=0, without KoLeo"),
        (1, "batch.micro_size 1 is no multiple of 4, .* are 4, 12; or set method.koleo_weight=0, without KoLeo"),
    ],
)  # fmt: skip
def test_a_micro_batch_that_groups_do_not_divide_is_refused_with_what_fits(
    micro_size: int, sentence: str, small_shards: Path, tmp_path: Path
) -> None:
    config = _config(
        method__koleo_group=4, batch__global_size=12, batch__micro_size=micro_size, data__path=small_shards,
        run__dir=tmp_path, data__workers=0,
    )  # fmt: skip
    with pytest.raises(BadInput, match=sentence if "*" in sentence else re.escape(sentence)):
        pretrain.run(config)


def test_without_koleo_there_are_no_groups() -> None:
    assert _small(method__koleo_weight=0).group == 1
