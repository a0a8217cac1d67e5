"""DINO computes what the authors' code computes, and keeps what the recipe promises."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foreseen.commands.verbs import load_recipe
from foreseen.config import Config, Optim
from foreseen.data.batch import Batch
from foreseen.engine.clip import clip
from foreseen.engine.objective import ParameterRule, Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.engine.schedule import cosine, warmup_cosine
from foreseen.engine.teacher import move_teacher
from foreseen.errors import BadInput
from foreseen.models.projection_head import ProjectionHead
from foreseen.pretrain.dino import DINO, from_official
from foreseen.pretrain.distillation_losses import koleo
from tests.engine.driver import assert_the_same_however_cut
from tests.golden_cases import authors_answer, load_case, weights
from tests.small_methods import small_method

ARGS = "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"
PROGRESS = Progress(0, 20, 5.0, 0)
KOLEO = {"method__koleo_weight": 0.3, "method__koleo_group": 2}


def _config(**more: Any) -> Config:
    overrides = small_method(load_recipe("pretrain", "dino_vit_s16")) | {
        "views.size": 32, "model.args": ARGS, "batch.global_size": 16, "run.epochs": "null", "run.steps": 20,
        "optim.warmup_epochs": "null", "optim.warmup_steps": 0,
    }  # fmt: skip
    overrides |= {key.replace("__", "."): value for key, value in more.items()}
    return load_recipe("pretrain", "dino_vit_s16", [f"{k}={v}" for k, v in overrides.items()])


def _crops(size: int, scale: str = "[0.05, 0.4]") -> str:
    return f"{{local_count: 2, local_size: {size}, local_scale: {scale}}}"


def _small(**more: Any) -> DINO:
    torch.manual_seed(0)
    return DINO.build(_config(**more).with_length(64))


def _batch(objective: DINO, count: int = 4) -> Batch:
    key = torch.arange(count) * 7919 + 1
    generator = torch.Generator().manual_seed(1)
    images = {
        view.name: torch.randn(view.count * count, 3, *view.size, generator=generator)
        for view in objective.request.views
    }
    return Batch(key, key, key, images)


def _step(objective: DINO, batch: Batch, progress: Progress = PROGRESS) -> dict[str, Tensor]:
    with torch.no_grad():
        (prepared,) = objective.prepare([batch], progress)
    return objective(batch, prepared, progress)


Dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@Dtypes
def test_features_equal_the_authors_at_any_size(dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", "vit")
    objective = _small().eval().to(dtype)
    official = {f"backbone.{name}": value for name, value in weights(tensors).items()}
    missing, unexpected = objective.load_state_dict(from_official({"student": official}), strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("student.backbone")]
    for size in ("native", "small", "rect", "large"):
        expected, tolerance = authors_answer(case, tensors, f"cls.{size}", dtype)
        for patches in ("none", "all"):
            encoded = objective.student.encode(tensors[f"in/images_{size}"].to(dtype), patches=patches)
            torch.testing.assert_close(encoded.pooled, expected, **tolerance)


@pytest.mark.parametrize("name", ["head", "head_bn"])
@Dtypes
def test_the_head_equals_the_authors(name: str, dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", name)
    c = case["config"]
    head = ProjectionHead(
        c["in_dim"], c["out_dim"], hidden_dim=c["hidden_dim"], bottleneck_dim=c["bottleneck_dim"],
        num_layers=c["nlayers"], batch_norm=c["use_bn"], trains_gain=not c["norm_last_layer"],
    )  # fmt: skip
    head.load_state_dict(weights(tensors))
    head.train().to(dtype)
    logits = head(tensors["in/x"].to(dtype)) @ head.prototypes().mT
    expected, tolerance = authors_answer(case, tensors, "y", dtype)
    torch.testing.assert_close(logits, expected, **tolerance)
    logits.square().sum().backward()
    expected, tolerance = authors_answer(case, tensors, "grad_weight_v", dtype)
    torch.testing.assert_close(head.last_layer.weight_v.grad, expected, **tolerance)
    if "trainable" in case["values"]:
        trained = {n for n, p in head.named_parameters() if p.requires_grad}
        assert trained == set(case["values"]["trainable"])


def _with_logits_for_bottlenecks(count: int, **more: Any) -> DINO:
    """An objective whose prototypes are the axes, so that what is given as a bottleneck is the logits."""
    objective = _small(method__out_dim=count, method__bottleneck_dim=count, **more)
    for network in (objective.student, objective.teacher):
        network.head.last_layer.weight_v.data.copy_(torch.eye(count))
    return objective


@pytest.mark.parametrize("chunk", ["null", 9])
@Dtypes
def test_loss_gradient_and_centre_equal_the_authors_call_after_call(chunk: str | int, dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", "loss")
    c = case["config"]
    objective = _with_logits_for_bottlenecks(
        c["out_dim"],
        method__crops=f"{{local_count: {c['ncrops'] - 2}, local_size: 16}}",
        method__warmup_teacher_temp=c["warmup_teacher_temp"],
        method__teacher_temp=c["teacher_temp"],
        method__warmup_teacher_temp_epochs=c["warmup_teacher_temp_epochs"],
        method__student_temp=c["student_temp"],
        method__center_momentum=c["center_momentum"],
        method__logits_chunk=chunk,
    ).to(dtype)
    temperatures = [objective.teacher_temperature(Progress(epoch, c["nepochs"], 1.0, 0)) for epoch in range(6)]
    assert temperatures == pytest.approx(case["values"]["teacher_temp_schedule"], rel=1e-12)
    for call, epoch in enumerate(c["epochs_at"]):
        progress = Progress(epoch, c["nepochs"], 1.0, 0)
        student = tensors["in/student"][call].to(dtype).requires_grad_()
        with torch.no_grad():
            (targets,) = objective.class_targets([tensors["in/teacher"][call].to(dtype)], progress)
        found = objective.class_terms(student, targets)
        found["loss"].backward()
        objective.centre.move(torch.tensor(True))
        expected, tolerance = authors_answer(case, tensors, "loss", dtype)
        torch.testing.assert_close(found["loss"], expected[call], **tolerance)
        torch.testing.assert_close(found["teacher_entropy"] + found["kl"], found["loss"], **case["tolerance"])
        for name, ours in ((f"grad_student.{call}", student.grad), (f"center.{call}", objective.centre.center[None])):
            expected, tolerance = authors_answer(case, tensors, name, dtype)
            torch.testing.assert_close(ours, expected, **tolerance)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum", "warm_start"])
def test_schedules_equal_the_authors(name: str) -> None:
    case, _ = load_case("dino", f"schedule_{name}")
    args = case["config"]["args"]
    per_epoch = args["niter_per_ep"]
    total, warmup = args["epochs"] * per_epoch, args.get("warmup_epochs", 0) * per_epoch
    base, final = args["base_value"], args["final_value"]
    if warmup:
        ours = [
            warmup_cosine(
                step, peak=base, end=final, warmup_steps=warmup, total_steps=total,
                start=args.get("start_warmup_value", 0.0), ends_at_peak=True,
            ) for step in range(total)
        ]  # fmt: skip
    else:
        ours = [cosine(step, start=base, end=final, total_steps=total) for step in range(total)]
    assert ours == pytest.approx(case["values"]["schedule"], rel=1e-12, abs=1e-15)


def test_the_optimizer_follows_the_authors_schedules() -> None:
    lr, decay = (load_case("dino", f"schedule_{name}")[0] for name in ("lr", "weight_decay"))
    optim = Optim(
        base_lr=1e-3, lr_scaling="none", min_lr=1e-6, warmup_steps=4, warmup_ends_at_peak=True, weight_decay=0.04,
        weight_decay_end=0.4,
    )  # fmt: skip
    module = nn.Linear(2, 2)
    rules = {"weight": ParameterRule(), "bias": ParameterRule(decay=False)}
    optimizer = SteppedOptimizer(module, rules, optim, global_size=8, total_steps=20)
    for step in range(20):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(step, torch.tensor(True))
        groups = {len(g["params"][0].shape): g for g in optimizer.optimizer.param_groups}
        assert groups[2]["lr"] == pytest.approx(lr["values"]["schedule"][step], rel=1e-12)
        assert groups[2]["weight_decay"] == pytest.approx(decay["values"]["schedule"][step], rel=1e-12)
        assert groups[1]["weight_decay"] == 0.0


@Dtypes
def test_crops_of_one_size_run_together_and_the_head_once(dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", "multicrop")
    objective = _small(method__crops="{local_count: 3, local_size: 16}").eval().to(dtype)
    official = from_official({"student": weights(tensors), "teacher": weights(tensors)})
    missing, unexpected = objective.load_state_dict(official, strict=False)
    assert (missing, unexpected) == (["centre.center"], [])
    crops = [tensors[f"in/{name}"].to(dtype) for name in case["config"]["order"]]
    key = torch.arange(2)
    batch = Batch(key, key, key, {"global": torch.cat(crops[:2]), "local": torch.cat(crops[2:])})
    calls: list[list[int]] = []
    objective.student.backbone.patch_embed.register_forward_pre_hook(lambda _, args: calls.append(list(args[0].shape)))
    features = [objective.student.encode(batch.images[view.name]).pooled for view in objective.request.views]
    logits = objective.student.head(torch.cat(features)) @ objective.student.head.prototypes().mT
    expected, tolerance = authors_answer(case, tensors, "output", dtype)
    torch.testing.assert_close(logits, expected, **tolerance)
    assert calls == case["values"]["backbone_calls"]
    rules = objective.parameter_rules(None)
    for what, decays in (("regularized", True), ("not_regularized", False)):
        ours = {name.removeprefix("student.") for name, rule in rules.items() if rule.decay == decays}
        theirs = set(case["values"][what]) | ({"head.last_layer.weight_g"} if decays else set())
        assert ours == theirs, "of ViT-S the gains are trained, too"


@Dtypes
def test_gradients_are_clipped_tensor_by_tensor_and_the_last_layer_waits(dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", "clip_and_cancel")
    c = case["config"]
    names = {"fc_w": "fc.weight", "fc_b": "fc.bias", "last_w": "last_layer.weight"}
    gradients = {short: tensors[f"in/g_{short}"].to(dtype) for short in names}
    for short, gradient in gradients.items():
        expected, tolerance = authors_answer(case, tensors, "norms", dtype)
        torch.testing.assert_close(gradient.norm(), expected[list(names).index(short)], **tolerance)
    clip({"": list(gradients.values())}, c["clip"], "parameter")
    for short, gradient in gradients.items():
        expected, tolerance = authors_answer(case, tensors, f"clipped_{short}", dtype)
        torch.testing.assert_close(gradient, expected, **tolerance)

    objective = _small(method__freeze_last_layer_epochs=1)  # of 64 / 16 = 4 steps
    rules = objective.parameter_rules(None)
    optim = Optim(base_lr=1e-3, lr_scaling="none", warmup_steps=0)
    optimizer = SteppedOptimizer(objective, rules, optim, global_size=16, total_steps=20)
    last, other = objective.student.head.last_layer.weight_v, objective.student.head.mlp[0].weight
    for step in range(0, 16, 4):
        for parameter in optimizer.parameters.values():
            parameter.grad = torch.ones_like(parameter)
        before = last.clone(), other.clone()
        optimizer.step(step, torch.tensor(True))
        epoch, waits, _ = case["values"]["cancelled"][step // 4]
        assert epoch == step // 4
        assert torch.equal(last, before[0]) == waits
        assert not torch.equal(other, before[1])
        assert ("step/student.head.last_layer.weight_v" in optimizer.state()[0]) == (not waits)


@Dtypes
def test_the_teacher_moves_as_the_authors_does(dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", "ema")
    c = case["config"]

    def module(values: Tensor) -> nn.Module:
        made = nn.Module()
        made.weight = nn.Parameter(values.to(dtype))
        return made

    teacher = module(tensors["in/teacher"].clone())
    for step in range(c["steps"]):
        momentum = cosine(step, start=c["momentum"], end=1.0, total_steps=c["epochs"] * c["niter"])
        assert momentum == pytest.approx(case["values"]["momentum"][step], rel=1e-12)
        student = module(tensors["in/student"][step])
        move_teacher(teacher, student, momentum, torch.tensor(True))
        expected, tolerance = authors_answer(case, tensors, f"teacher_after.{step}", dtype)
        torch.testing.assert_close(teacher.weight.detach(), expected, **tolerance)
        kept = teacher.weight.clone()
        move_teacher(teacher, student, 0.5, torch.tensor(False))
        assert torch.equal(teacher.weight, kept)


HARDER = {
    "centre": {},
    "sinkhorn": {"method__centering": "sinkhorn"},
    "pieces": {"method__logits_chunk": 40},
    "layer decay": {"method__head_warmup_steps": 0, "method__out_dim": 100},
    "koleo": KOLEO,
}


@pytest.mark.parametrize("more", HARDER.values(), ids=HARDER)
def test_a_run_does_not_depend_on_accumulation(more: dict[str, Any]) -> None:
    def make() -> DINO:
        return DINO.build(_config(model__drop_path_rate=0.2, **more).with_length(37))

    assert_the_same_however_cut(make)


class _Widest(TorchDispatchMode):
    """Notes the most rows that any tensor with K columns had."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns, self.rows = columns, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.shape[-1] == self.columns:
                self.rows = max(self.rows, tensor.numel() // self.columns)
        return out


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
def test_never_more_logits_than_asked_for_are_held_and_results_stay(centering: str) -> None:
    results = []
    for chunk in ("null", 12):
        objective = (
            _small(method__out_dim=997, method__logits_chunk=chunk, method__centering=centering).double().train()
        )
        batch = _batch(objective, 16)
        batch = batch.with_images({name: image.double() for name, image in batch.images.items()})
        with _Widest(997) as widest:
            _step(objective, batch)["loss"].backward()
        results.append((widest.rows, {n: p.grad for n, p in objective.named_parameters() if p.requires_grad}))
    (all_rows, whole), (rows, cut) = results
    assert all_rows == 4 * 16
    assert rows <= 16  # which prototypes have too, when they are turned: d rows of K
    for name, gradient in whole.items():
        torch.testing.assert_close(gradient, cut[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kinds", [1, 2, 8])
def test_target_information_is_the_log_of_how_many_kinds_of_pictures_targets_tell_apart(kinds: int) -> None:
    objective = _small()
    with torch.no_grad():
        rows = objective.teacher.head.prototypes()[:kinds].repeat(16 // kinds, 1)
        objective.class_targets([rows[:4], rows[4:]], PROGRESS)
        numbers = objective.health()
    assert float(numbers["target_information"]) == pytest.approx(math.log(kinds), abs=0.05)
    assert float(numbers["prototypes_used"]) >= kinds


def test_koleo_is_added_for_each_large_crop_where_it_is_wanted() -> None:
    plain, spread = (_small(model__drop_path_rate=0, **more) for more in ({}, KOLEO))
    assert (plain.group, spread.group) == (1, 2)
    batch = _batch(plain)
    without, found = _step(plain, batch), _step(spread, batch)
    one, other = spread.student.encode(batch.images[spread.large.name]).pooled.chunk(2)
    expected = koleo(one, 2) + koleo(other, 2)
    torch.testing.assert_close(found["koleo"], expected)
    torch.testing.assert_close(found["loss"], without["loss"] + 0.3 * expected)
    assert "koleo" not in without


def test_one_crop_of_an_image_alone_is_refused() -> None:
    with pytest.raises(BadInput, match="method.crops.global_count 1 and method.crops.local_count 0 leave no two crops"):
        _small(method__crops="{global_count: 1, local_count: 0}")


BACKBONES = {
    "resnet18": ("{layers: [1, 1, 1, 1], channels: [8, 16, 16, 32]}", 64, 32),
    "convnext_atto": ("{depths: [1, 1, 1, 1], dims: [8, 16, 16, 32]}", 64, 32),
    "swin_tiny_patch4_window7_224": ("{depths: [1, 1], embed_dim: 24, num_heads: [2, 2], window_size: 4}", 32, 16),
    "deit_tiny_distilled_patch16_224": (ARGS, 32, 16),
    "deit3_small_patch16_224": (ARGS, 32, 24),
    "vit_small_patch14_reg4_dinov2": (ARGS, 32, 16),
    "vit_medium_patch16_reg4_gap_256": (ARGS, 32, 16),
    "eva02_tiny_patch14_224": (ARGS, 32, 16),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_any_backbone_that_pools_features_is_trained_whole(name: str) -> None:
    args, large, small = BACKBONES[name]
    objective = _small(
        model__name=name, model__args=args, views__size=large, method__crops=_crops(small),
        model__drop_path_rate=0 if "resnet" in name else 0.1,
    ).train()  # fmt: skip
    batch = _batch(objective)
    found = _step(objective, batch)
    found["loss"].backward()
    assert [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None] == []
    objective.after_step(PROGRESS, torch.tensor(True))
    numbers = objective.health()
    assert all(math.isfinite(float(value)) for value in numbers.values())
    assert ("patch_diversity" in numbers) == (name.startswith(("vit", "deit", "swin")))


def test_batch_norm_of_the_teacher_counts_its_own_batches() -> None:
    args, large, small = BACKBONES["resnet18"]
    objective = _small(
        model__name="resnet18", model__args=args, views__size=large, method__crops=_crops(small),
        model__drop_path_rate=0,
    ).train()  # fmt: skip
    before = objective.encoder().bn1.running_mean.clone()
    _step(objective, _batch(objective))
    assert not torch.equal(objective.encoder().bn1.running_mean, before)
    assert not objective.eval().encoder().bn1.training
    with pytest.raises(BadInput, match=r"micro-batch of one picture.*batch.micro_size"):
        objective.prepare([_batch(objective, 1)], PROGRESS)


def test_the_encoder_is_the_teachers_and_follows_the_student() -> None:
    objective = _small().train()
    assert objective.encoder() is objective.teacher.backbone
    objective.student.backbone.pos_embed.data.add_(1.0)
    before = objective.encoder().pos_embed.clone()
    _step(objective, _batch(objective))
    objective.after_step(PROGRESS, torch.tensor(True))
    torch.testing.assert_close(objective.encoder().pos_embed, before + 0.004, rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in objective.teacher.parameters())


def test_heads_warm_up_before_a_backbone_that_has_learnt() -> None:
    from dataclasses import replace

    objective = _small()
    objective.plan = replace(objective.plan, frozen_steps=0, head_steps=7)
    rules = objective.parameter_rules(0.5)
    assert {(rule.frozen_steps, rule.ramp_steps) for name, rule in rules.items() if ".backbone." in name} == {(7, 7)}
    assert {rule.frozen_steps for name, rule in rules.items() if ".head." in name} == {0}
    assert rules["student.backbone.patch_embed.proj.weight"].lr_scale == 0.5**3
    assert rules["student.backbone.blocks.1.attn.qkv.weight"].lr_scale == 0.5
    assert rules["student.head.mlp.0.weight"].lr_scale == 1.0


def test_pictures_show_every_crop() -> None:
    objective = _small()
    pictures = objective.pictures(_batch(objective), PROGRESS)
    assert {name: tuple(picture.shape) for name, picture in pictures.items()} == {
        "global": (4, 3, 32, 64), "local": (4, 3, 16, 32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"method__teacher_temp": 0.2}, r"method.teacher_temp 0.2 is above method.student_temp 0.1"),
        ({"method__warmup_teacher_temp": 0.11}, r"method.warmup_teacher_temp 0.11 is above"),
        ({"method__crops": _crops(20)}, r"method.crops.local_size is \[20, 20\].*it takes.*\[16, 16\], \[24"),
        ({"model__name": "hiera_tiny_224", "model__args": "{}", "model__drop_path_rate": 0, "views__size": 224,
          "method__crops": _crops(96)}, r"method.crops.local_size is \[96, 96\].*it takes.*\[224, 224\]"),
        ({"method__crops": _crops(16, "[0.5, 0.1]")}, "method.crops.local_scale must be two rising shares"),
        ({"method__head_warmup_steps": 5}, "model.init_from null"),
        ({"method__head_layers": 1, "method__head_batch_norm": "true"}, "method.head_layers 1 is a linear head"),
        ({"method__crop": 1}, "did you mean 'method.crops'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_a_sentence(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        _small(**overrides)
