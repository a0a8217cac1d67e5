"""Distillation: the authors' numbers, what student and teacher see, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foreseen.commands.verbs import method_options
from foreseen.config import Optim, resolve
from foreseen.data.batch import Batch
from foreseen.data.views import finish
from foreseen.device_keys import as_tensor
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.errors import BadInput
from foreseen.finetune.distill import Shown, from_official
from foreseen.finetune.methods import METHODS
from foreseen.finetune.mixing import scale_mixing
from foreseen.finetune.supervised import Supervised
from foreseen.handoff.encoder import Preprocessing, load_encoder, save_encoder
from foreseen.keys import sample_keys
from tests.engine.driver import drive, loss_distance, norm_distance, weight_distance
from tests.golden_cases import load_case, weights
from tests.tiny_teacher import save_teacher, tiny_teacher

OPTIONS = method_options("finetune")
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5.0, seed=0)
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}
DISTILLED = "deit_tiny_distilled_patch16_224"


def recipe(*, model=None, method=None, views=None, **sections):
    return resolve(
        {
            "run": {"dir": "runs/x", "steps": 10},
            "model": {"name": "vit_tiny_patch16_224", "args": TINY, **(model or {})},
            "method": {"name": "distill", "teacher": str(tiny_teacher()), **(method or {})},
            "views": {"size": [32, 32], **(views or {})},
            "optim": {"base_lr": 1e-3, "lr_scaling": "none", "warmup_steps": 0},
            "batch": {"global_size": 8},
            **sections,
        },
        OPTIONS,
    )


def build(num_classes=3, names=("a", "b", "c"), seed=0, **sections):
    torch.manual_seed(seed)
    config = recipe(**sections)
    return METHODS[config.method.name].build(config, num_classes, names)


def batch_of(objective, n=8, start=0, dtype=torch.float32):
    """What a worker would hand over for positions start..start + n, with made-up smooth pixels."""
    positions = np.arange(start, start + n, dtype=np.int64)
    images = {}
    for view in objective.request.views:
        ramp = np.linspace(0, 1, view.size[0])[:, None] + np.linspace(0, 1, view.size[1])[None]
        images[view.name] = torch.from_numpy(
            np.stack([np.stack([ramp * (20 * (p % 7) + 5 * c) for c in range(3)]).astype(np.uint8) for p in positions])
        )
    draws = {}
    for draw in objective.request.draws:
        owners = positions - positions % draw.group
        draws[draw.name] = torch.from_numpy(np.stack([draw.function(np.random.default_rng(p), p) for p in owners]))
    batch = Batch(
        position=torch.from_numpy(positions),
        key=as_tensor(sample_keys(0, positions)),
        sample=torch.from_numpy(positions),
        images=images,
        draws=draws,
        label=torch.from_numpy(positions) % objective.num_classes,
    )
    return finish(batch, objective.request, torch.device("cpu"), dtype)


def loss_of(objective, batch):
    (prepared,) = objective.prepare([batch], PROGRESS)
    return objective(batch, prepared, PROGRESS)


# -- the authors' numbers


@pytest.mark.parametrize("row", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_equals_that_of_the_authors(row, dtype, tmp_path):
    described, tensors = load_case("deit", "distillation_loss")
    kind, base, weight, tau = described["config"]["rows"][row]
    method = PLAIN | {
        "teacher": str(save_teacher(tmp_path / "teacher", num_classes=10)), "soft_mean": "logits", "tau": tau,
        "distillation": "hard" if kind == "hard" else "soft", "weight": 0.0 if kind == "none" else weight,
    }  # fmt: skip
    if base == "smooth":
        method["label_smoothing"] = described["config"]["smoothing"]
    objective = build(10, None, method=method)
    given = {name: tensors[f"in/{name}"].to(dtype) for name in ("outputs", "outputs_kd", "teacher_logits")}
    leaves = [given[name].requires_grad_() for name in ("outputs", "outputs_kd")]
    objective.model = Logits(*leaves)
    batch = replace(batch_of(objective, 4), label=tensors["in/labels"])
    if base == "soft":  # what mixing would have made of the labels
        objective.label_loss = lambda logits, _: -(tensors["in/soft_labels"] * logits.log_softmax(1)).sum(1).mean()
    loss = objective(batch, Shown(batch.images["image"], given["teacher_logits"]), PROGRESS)["loss"]
    loss.backward()
    kinds = ("out64", 1e-6 if base == "soft" else 1e-8, 1e-10) if dtype == torch.float64 else ("out", 1e-4, 1e-5)
    for name, value in {"loss": loss, "grad_outputs": leaves[0].grad, "grad_outputs_kd": leaves[1].grad}.items():
        key = f"{kinds[0]}/{name}.{row}"
        if key in tensors:
            torch.testing.assert_close(value.detach(), tensors[key], rtol=kinds[1], atol=kinds[2])


class Logits(torch.nn.Module):
    """A student that says what it is told to, with both heads."""

    def __init__(self, labels, teacher):
        super().__init__()
        self.logits = labels, teacher

    def forward(self, images):
        return self.logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distilled_vit_equals_that_of_the_authors_from_official_keys(dtype, tmp_path):
    described, tensors = load_case("deit", "distilled_vit")
    shape = described["config"]
    teacher = save_teacher(tmp_path / "teacher", num_classes=shape["num_classes"])
    objective = build(
        shape["num_classes"],
        None,
        model={
            "name": DISTILLED,
            "args": {key: shape[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")},
        },
        method={**PLAIN, "teacher": str(teacher)},
        views={"size": shape["img_size"]},
    )
    objective.load_state_dict(from_official(weights(tensors)))
    model, images = objective.to(dtype).model, tensors["in/images"].to(dtype)
    labels, distilled = model.train()(images)
    features = model.forward_features(images)
    found = {
        "train_cls": labels, "train_dist": distilled, "eval_logits": model.eval()(images),
        "features_cls": features[:, 0], "features_dist": features[:, 1],
    }  # fmt: skip
    kind, rtol, atol = ("out64", 1e-8, 1e-10) if dtype == torch.float64 else ("out", 1e-4, 1e-5)
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[f"{kind}/{name}"], rtol=rtol, atol=atol)
    undecayed = {name for name, rule in objective.parameter_rules(None).items() if not rule.decay}
    assert {f"model.{name}" for name in ("cls_token", "dist_token", "pos_embed")} <= undecayed


# -- what each sees


def test_the_teacher_sees_the_students_pixels_in_its_own_normalisation_and_mixed_alike(tmp_path):
    teacher = save_teacher(tmp_path / "teacher", size=(32, 32), class_names=["a", "b", "c"])
    objective = build(method={"teacher": str(teacher)}, views={"erase": 0.5})
    assert [view.name for view in objective.request.views] == ["image"]
    batch = batch_of(objective)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (objective.view.mean, objective.view.std))
    augmented = objective.augment(batch)
    pixels, seen = augmented * std + mean, objective.teacher_images(batch, augmented)
    wanted_mean, wanted_std = torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1), torch.tensor((0.2, 0.3, 0.4)).view(3, 1, 1)
    torch.testing.assert_close(seen * wanted_std + wanted_mean, pixels, rtol=1e-5, atol=1e-6)


def test_at_another_size_the_teacher_sees_the_same_windows_and_the_same_boxes():
    objective = build(method={"mixup": 0.0, "cutmix": 1.0}, views={"rand_augment": "rand-m9"})
    student, teacher = objective.request.views
    assert (teacher.size, teacher.window_of) == ((24, 24), student.name)
    assert (teacher.mean, teacher.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert teacher.transform is not None
    draws = torch.tensor([[0.75, 0, 16, 8, 24], [0.75, 0, 16, 8, 24], [0.3, 0, 0, 0, 0], [0.3, 0, 0, 0, 0]]).double()
    assert scale_mixing(draws, (32, 32), (24, 24))[0].tolist() == [0.75, 0, 12, 6, 18]
    batch = replace(batch_of(objective, 4), draws={"mix": draws})
    seen, plain = objective.teacher_images(batch, objective.augment(batch)), batch.images["teacher"]
    assert torch.equal(seen[0, :, :12, 6:18], plain[1, :, :12, 6:18])
    assert torch.equal(seen[0, :, 12:], plain[0, :, 12:])
    torch.testing.assert_close(seen[2], 0.3 * plain[2] + 0.7 * plain[3])


def test_crops_are_erased_and_mixed_once_for_both(tmp_path, monkeypatch):
    teacher = save_teacher(tmp_path / "teacher", size=(32, 32), class_names=["a", "b", "c"])
    objective = build(method={"teacher": str(teacher)}, views={"erase": 1.0})
    batch, augment, seen = batch_of(objective), objective.augment, []
    monkeypatch.setattr(objective, "augment", lambda batch: seen.append(batch) or augment(batch))
    shown = []
    objective.model.patch_embed.register_forward_pre_hook(lambda _, images: shown.append(images[0]))
    loss_of(objective, batch)
    assert len(seen) == 1  # it costs as much as a small network's forward
    assert torch.equal(shown[0], augment(batch))


def test_the_teacher_is_still_and_is_in_no_checkpoint():
    objective = build(model={"name": DISTILLED})
    objective.train()
    assert not objective.teacher.network.training
    assert not any("teacher" in name for name in objective.state_dict())
    objective.load_state_dict(objective.state_dict())
    loss_of(objective, batch_of(objective))["loss"].backward()
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert set(objective.parameter_rules(0.75)) == {n for n, p in objective.named_parameters() if p.requires_grad}
    assert all(parameter.grad is not None for name, parameter in objective.model.named_parameters())
    assert objective.frozen_inputs() == {"teacher": load_encoder(tiny_teacher()).weights}


def test_a_frozen_student_learns_from_its_teacher_with_what_is_left():
    objective = build(model={"name": DISTILLED}, method={"freeze": 1}).train()
    before = {name: value.clone() for name, value in objective.named_parameters()}
    rules = objective.parameter_rules(None)
    optimizer = SteppedOptimizer(objective, rules, Optim(base_lr=1e-2), global_size=8, total_steps=10)
    for step in range(3):
        loss_of(objective, batch_of(objective, start=8 * step))["loss"].backward()
        optimizer.drop_frozen()
        optimizer.step(step, torch.ones((), dtype=torch.bool))
    stays = {name for name, value in objective.named_parameters() if torch.equal(value, before[name])}
    own = [f"model.{name}" for name in ("cls_token", "dist_token", "pos_embed")]
    assert {n for n in stays if not n.startswith(("teacher.", "model.patch_embed.", "model.blocks.0."))} == {*own}
    assert all(name in stays for name in before if name.startswith("teacher."))


def test_the_weights_of_the_student_do_not_depend_on_the_teacher(tmp_path):
    other = save_teacher(tmp_path / "teacher", name="test_resnet", num_classes=3)
    one, two = build(), build(method={"teacher": str(other)})
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))


# -- students


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        ({"name": DISTILLED}, 2),
        ({}, 1),
        ({"name": "test_resnet", "args": {}}, 1),
        ({"name": "test_convnext", "args": {}}, 1),
    ],
)
@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_a_student_learns_labels_and_teacher_with_the_heads_that_it_has(model, heads, kind):
    objective = build(model=model, method={**PLAIN, "distillation": kind, "weight": 0.3, "tau": 2.0}).train()
    batch = batch_of(objective)
    (shown,) = objective.prepare([batch], PROGRESS)
    out, said = objective(batch, shown, PROGRESS), shown.logits
    found = objective.model(batch.images["image"])
    for_labels, for_teacher = found if heads == 2 else (found, found)
    labels = F.cross_entropy(for_labels, batch.label)
    if kind == "hard":
        teacher = F.cross_entropy(for_teacher, said.argmax(1))
    else:
        q = (said / 2).softmax(1)
        teacher = 4 * (q * (q.log() - (for_teacher / 2).log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(out["loss"], 0.7 * labels + 0.3 * teacher)
    torch.testing.assert_close(out["teacher_top1"], (said.argmax(1) == batch.label).float().mean())


def test_a_distilled_student_begins_from_a_plain_vit_and_says_what_is_new(tmp_path):
    encoder = save_teacher(tmp_path / "encoder", num_classes=0)
    config = recipe(model={"name": DISTILLED, "init_from": str(encoder)})
    alone = config.model_copy(update={"method": config.method.control()[0]})
    for each in (config, alone):
        objective = METHODS[each.method.name].build(each, 3, ("a", "b", "c"))
        begun = load_encoder(encoder).state
        assert torch.equal(objective.model.blocks[1].mlp.fc1.weight, begun["blocks.1.mlp.fc1.weight"])
        assert f"{encoder} has no distillation token: the token and its head are new" in objective.notes[-1]
        assert 0 < objective.model.head_dist.weight.abs().max() < 1e-3  # drawn as MAE draws a new head


def test_a_distilled_student_is_scored_and_handed_on_by_the_mean_of_both_heads(tmp_path):
    objective = build(model={"name": DISTILLED}).eval()
    batch = batch_of(objective)
    features = objective.model.forward_features(batch.images["image"])
    both = (objective.model.head(features[:, 0]) + objective.model.head_dist(features[:, 1])) / 2
    expected = (both.argmax(1) == batch.label).sum()
    assert objective.evaluate(batch)["top1"] == expected
    seen = Preprocessing.of_view(objective.evaluation_request().views[0])
    save_encoder(objective.encoder(), tmp_path / "student", preprocessing=seen, lineage={}, class_names=["a", "b", "c"])
    kept = load_encoder(tmp_path / "student")
    assert (kept.num_classes, kept.class_names) == (3, ("a", "b", "c"))


def test_the_control_is_the_same_student_on_labels_alone():
    config = recipe(model={"name": DISTILLED}, method={"mixup": 0.3})
    method, teacher = config.method.control()
    assert teacher == str(tiny_teacher())
    control = config.model_copy(update={"method": method})
    assert control.method.name == "supervised"
    assert (control.method.mixup, control.method.pool) == (0.3, None)
    torch.manual_seed(0)
    objective = METHODS["supervised"].build(control, 3)
    assert type(objective) is Supervised
    batch = batch_of(objective)
    objective(batch, None, PROGRESS)["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.model.parameters())
    student = build(model={"name": DISTILLED}, method={"mixup": 0.3}).model
    assert all(torch.equal(a, b) for a, b in zip(objective.model.parameters(), student.parameters(), strict=True))


def test_a_run_does_not_depend_on_accumulation():
    def make():
        return build(
            5, None, seed=3, model={"name": DISTILLED, "drop_path_rate": 0.5}, views={"erase": 0.5},
            method={"teacher": str(tiny_teacher(5)), "distillation": "soft", "tau": 2.0},
        )  # fmt: skip

    whole, split = drive(make, 16), drive(make, 2)
    assert loss_distance(whole, split) < 1e-13
    assert norm_distance(whole, split) < 1e-13
    assert weight_distance(whole, split) < 1e-11


# -- what is refused


def test_a_teacher_of_other_classes_is_refused_with_the_difference(tmp_path):
    with pytest.raises(BadInput, match="tells 3 classes apart and the data has 5"):
        build(5, None)
    with pytest.raises(BadInput, match="it lacks cat and has b instead"):
        build(names=("a", "c", "cat"))
    with pytest.raises(BadInput, match="another order; class 0 is 'a' there and 'b' here"):
        build(names=("b", "a", "c"))
    save_teacher(tmp_path / "nameless")
    (note,) = build(method={"teacher": str(tmp_path / "nameless")}).notes[1:]
    assert "believed to have the data's" in note


def test_a_teacher_that_cannot_teach_is_refused_in_words(tmp_path):
    with pytest.raises(BadInput, match=r"method\.teacher nowhere: nowhere is no encoder folder.*foreseen finetune"):
        build(method={"teacher": "nowhere"})
    save_teacher(tmp_path / "headless", num_classes=0)
    with pytest.raises(BadInput, match="has no classes yet: fine-tune it first"):
        build(method={"teacher": str(tmp_path / "headless")})
    with pytest.raises(BadInput, match=r"teacher"):
        recipe(method={"teacher": None})


def test_bce_and_smoothing_are_refused_together():
    with pytest.raises(BadInput, match="set it to 0"):
        recipe(method={"loss": "bce", "label_smoothing": 0.1})
