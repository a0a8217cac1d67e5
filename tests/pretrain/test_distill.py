"""Feature distillation: what is learned, from which pixels, by which students."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from foreseen.commands.verbs import load_recipe, method_options
from foreseen.config import recipe_names, resolve
from foreseen.data.batch import Batch
from foreseen.data.views import finish
from foreseen.device_keys import as_tensor
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing, load_encoder, save_encoder
from foreseen.handoff.frozen import frozen_encoder
from foreseen.keys import sample_keys
from foreseen.pretrain.distill import FeatureDistill
from foreseen.pretrain.methods import METHODS
from tests.engine.driver import drive, loss_distance, norm_distance, weight_distance
from tests.tiny_teacher import save_teacher, tiny_teacher

OPTIONS = method_options("pretrain")
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5.0, seed=0)
STUDENTS = {
    "vit_tiny_patch16_224": TINY,
    "deit_tiny_distilled_patch16_224": TINY,
    "swin_tiny_patch4_window7_224": {
        "window_size": 4, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4],
    },
    "test_resnet": {},
    "test_convnext": {},
    "mobilenetv3_small_050": {},
}  # fmt: skip


def recipe(*, model=None, method=None, views=None, **sections):
    return resolve(
        {
            "run": {"dir": "runs/x", "steps": 10},
            "model": {"name": "vit_tiny_patch16_224", "args": TINY, **(model or {})},
            "method": {"name": "feature_distill", "teacher": str(tiny_teacher()), **(method or {})},
            "views": {"size": [32, 32], **(views or {})},
            "optim": {"base_lr": 3e-3, "lr_scaling": "none", "warmup_steps": 0},
            "batch": {"global_size": 8},
            **sections,
        },
        OPTIONS,
    )


def build(seed=0, **sections):
    torch.manual_seed(seed)
    config = recipe(**sections)
    return METHODS[config.method.name].build(config)


def batch_of(objective, n=8, start=0, dtype=torch.float32):
    positions = np.arange(start, start + n, dtype=np.int64)
    images = {}
    for view in objective.request.views:
        rows, columns = (np.linspace(0, 1, side) for side in view.size)
        pictures = [
            np.stack([120 + 110 * np.sin((1 + p % 5) * (rows[:, None] + (c + 1) * columns[None])) for c in range(3)])
            for p in positions
        ]
        images[view.name] = torch.from_numpy(np.stack(pictures).astype(np.uint8))
    number = torch.from_numpy(positions)
    batch = Batch(number, as_tensor(sample_keys(0, positions)), number, images)
    return finish(batch, objective.request, torch.device("cpu"), dtype)


def step(objective, batch):
    (prepared,) = objective.prepare([batch], PROGRESS)
    return objective(batch, prepared, PROGRESS)


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("loss", ["cosine", "smooth_l1"])
def test_a_student_of_any_architecture_learns_the_teachers_features(name, loss):
    objective = build(model={"name": name, "args": STUDENTS[name]}, method={"loss": loss}).train()
    config = recipe()
    optimizer = SteppedOptimizer(
        objective, objective.parameter_rules(None), config.optim, global_size=8, total_steps=25
    )
    batch, losses = batch_of(objective), []
    for number in range(25):
        out = step(objective, batch)
        assert out.keys() == {"loss", "pooled", "places"}
        out["loss"].backward()
        assert all(p.grad is not None for n, p in objective.named_parameters() if "teacher" not in n)
        optimizer.step(number, torch.tensor(True))
        losses.append(out["loss"].item())
    assert losses[-1] < 0.6 * losses[0]


def test_the_targets_are_the_teachers_own_features_at_the_students_places():
    objective = build(method={"loss": "smooth_l1"})
    (teacher_view,) = [view for view in objective.request.views if view.name == "teacher"]
    assert (teacher_view.size, teacher_view.window_of, teacher_view.mean) == ((24, 24), "image", (0.5, 0.4, 0.3))
    batch = batch_of(objective)
    (found,) = objective.prepare([batch], PROGRESS)
    model = frozen_encoder(str(tiny_teacher())).model
    tokens = model.forward_features(batch.images["teacher"])
    torch.testing.assert_close(found.pooled, F.layer_norm(tokens[:, 0], (24,)))  # it reads its class token
    places = tokens[:, 1:].transpose(1, 2).unflatten(2, (3, 3))
    assert found.places.shape == (8, 24, 4, 4)
    resized = F.interpolate(places, size=(4, 4), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.places, F.layer_norm(resized.movedim(1, -1), (24,)).movedim(-1, 1))
    assert any("3×3 features are interpolated to the student's 4×4" in note for note in objective.notes)


def test_each_loss_is_what_its_name_says():
    for loss in ("cosine", "smooth_l1"):
        objective = build(method={"loss": loss, "pooled_weight": 0.5, "patch_weight": 2.0})
        batch = batch_of(objective)
        (said,) = objective.prepare([batch], PROGRESS)
        out = objective(batch, said, PROGRESS)
        tokens = objective.model.forward_features(batch.images["image"])
        pooled = objective.projectors["pooled"](tokens[:, 0])
        weight = objective.projectors["places"].weight[:, :, 0, 0]
        places = tokens[:, 1:] @ weight.T + objective.projectors["places"].bias
        pairs = ((pooled, said.pooled), (places, said.places.flatten(2).transpose(1, 2)))
        if loss == "cosine":
            expected = [1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1).mean() for a, b in pairs]
        else:
            gaps = [(a - b).abs() for a, b in pairs]
            expected = [torch.where(gap < 1, gap**2 / 2, gap - 0.5).mean() for gap in gaps]
        torch.testing.assert_close(out["loss"], 0.5 * expected[0] + 2.0 * expected[1])


def test_a_loss_that_is_left_out_costs_no_weights_and_no_forward():
    objective = build(method={"patch_weight": 0.0})
    assert set(objective.projectors) == {"pooled"}
    assert step(objective, batch_of(objective)).keys() == {"loss", "pooled"}
    with pytest.raises(BadInput, match="both 0"):
        recipe(method={"patch_weight": 0.0, "pooled_weight": 0.0})


def test_the_teacher_stays_as_it_is_and_is_in_no_checkpoint():
    objective = build()
    before = copy.deepcopy(objective.teacher.network.state_dict())
    objective.train()
    assert not objective.teacher.network.training
    assert not any("teacher" in name for name in objective.state_dict())
    step(objective, batch_of(objective))["loss"].backward()
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), objective.teacher.network.state_dict().values(), strict=True)
    )
    assert objective.frozen_inputs() == {"teacher": load_encoder(tiny_teacher()).weights}


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_other_networks_teach_too(tmp_path, name):
    teacher = save_teacher(tmp_path / "teacher", name=name, size=(32, 32))
    objective = build(method={"teacher": str(teacher)})
    assert [view.name for view in objective.request.views] == ["image"]
    assert torch.isfinite(step(objective, batch_of(objective))["loss"])


def test_a_run_does_not_depend_on_accumulation():
    def make():
        return build(seed=3, model={"drop_path_rate": 0.5}, method={"loss": "smooth_l1"})

    whole, split = drive(make, 16), drive(make, 2)
    assert loss_distance(whole, split) < 1e-13
    assert norm_distance(whole, split) < 1e-13
    assert weight_distance(whole, split) < 1e-11


def test_it_ends_in_the_students_encoder_folder(tmp_path):
    objective = build(model={"name": "mobilenetv3_small_050", "args": {}})
    seen = Preprocessing.of_view(objective.request.views[0])
    save_encoder(objective.encoder(), tmp_path / "encoder", preprocessing=seen, lineage={})
    assert load_encoder(tmp_path / "encoder").architecture == "mobilenetv3_small_050"


def test_a_distilled_vit_begins_from_a_plain_one_and_says_so(tmp_path):
    encoder = save_teacher(tmp_path / "encoder", num_classes=0)
    objective = build(model={"name": "deit_tiny_distilled_patch16_224", "init_from": str(encoder)})
    assert "has no distillation token" in objective.notes[-1]


def test_a_teacher_that_is_not_there_is_a_sentence():
    with pytest.raises(BadInput, match=r"method\.teacher nowhere: nowhere is no encoder folder"):
        build(method={"teacher": "nowhere"})


@pytest.mark.parametrize("name", [n for n in recipe_names("pretrain") if n.startswith("feature_distill")])
def test_every_recipe_is_built_at_full_size(name):
    config = load_recipe("pretrain", name, [f"method.teacher={tiny_teacher()}"])
    with torch.device("meta"):
        objective = FeatureDistill.build(config)
    assert objective.projectors.keys() == {"pooled", "places"}
