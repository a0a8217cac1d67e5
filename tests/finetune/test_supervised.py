import copy

import numpy as np
import pytest
import torch

from foreseen.commands.verbs import method_options
from foreseen.config import RECIPES, load, resolve
from foreseen.data.batch import Batch
from foreseen.data.views import finish
from foreseen.device_keys import as_tensor
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.finetune.methods import METHODS
from foreseen.handoff.encoder import Preprocessing, load_encoder, save_encoder
from foreseen.keys import sample_keys
from foreseen.models.backbone import create_backbone
from foreseen.models.initialise import initialise
from tests.engine.driver import drive, loss_distance, norm_distance, weight_distance
from tests.golden_cases import load_case, weights
from tests.tiny_teacher import tiny_teacher

OPTIONS = method_options("finetune")
TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PROGRESS = Progress(step=0, total_steps=10, steps_per_epoch=5.0, seed=0)
PLAIN = {"mixup": 0.0, "cutmix": 0.0}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    # Work this small is ten times slower on threads that other processes want too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def recipe(*, model=None, method=None, views=None, **sections):
    return resolve(
        {
            "run": {"dir": "runs/x", "steps": 10},
            "model": {"name": "vit_tiny_patch16_224", "args": TINY, **(model or {})},
            "method": {"name": "supervised", **(method or {})},
            "views": {"size": [32, 32], **(views or {})},
            "optim": {"base_lr": 1e-3, "lr_scaling": "none", "warmup_steps": 0},
            "batch": {"global_size": 8},
            **sections,
        },
        OPTIONS,
    )


def build(num_classes=5, seed=0, **sections):
    torch.manual_seed(seed)
    config = recipe(**sections)
    return METHODS[config.method.name].build(config, num_classes)


def batch_of(objective, n=8, start=0, dtype=torch.float32):
    """What a worker would hand over for positions start..start + n, with made-up pixels."""
    positions = np.arange(start, start + n, dtype=np.int64)
    view = objective.view
    pixels = [np.random.default_rng(p).integers(0, 256, (3, *view.size), dtype=np.uint8) for p in positions.tolist()]
    draws = {}
    for draw in objective.request.draws:
        owners = positions - positions % draw.group
        draws[draw.name] = torch.from_numpy(np.stack([draw.function(np.random.default_rng(p), p) for p in owners]))
    batch = Batch(
        position=torch.from_numpy(positions),
        key=as_tensor(sample_keys(0, positions)),
        sample=torch.from_numpy(positions),
        images={"image": torch.from_numpy(np.stack(pixels))},
        draws=draws,
        label=torch.from_numpy(positions) % 5,
    )
    return finish(batch, objective.request, torch.device("cpu"), dtype)


@pytest.mark.parametrize(("case", "pool"), [("true", "mean"), ("false", "token")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_equal_those_of_maes_code_from_official_keys(case, pool, dtype):
    described, tensors = load_case("mae", f"finetune_global_pool_{case}")
    shape = described["config"]
    objective = build(
        shape["num_classes"],
        model={"args": {key: shape[key] for key in ("patch_size", "embed_dim", "depth", "num_heads")}},
        method={"pool": pool},
        views={"size": shape["img_size"]},
    )
    done = initialise(objective.model, weights(tensors), img_size=(shape["img_size"],) * 2, source="official")
    assert done.fresh == done.unused == ()
    logits = objective.to(dtype).eval().model(tensors["in/images"].to(dtype))
    if dtype == torch.float32:
        torch.testing.assert_close(logits, tensors["out/logits"], rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(logits, tensors["out64/logits"], rtol=1e-8, atol=1e-10)


def test_the_whole_recipe_gives_the_same_however_the_batch_is_cut():
    objective = build(
        model={"drop_path_rate": 0.5}, views={"erase": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}
    ).double()
    assert objective.group == 2
    whole = objective(batch_of(objective, 8, dtype=torch.float64), None, PROGRESS)["loss"]
    parts = [
        objective(batch_of(objective, n, start, torch.float64), None, PROGRESS)["loss"] * n
        for start, n in ((0, 2), (2, 4), (6, 2))
    ]
    torch.testing.assert_close(sum(parts) / 8, whole, rtol=1e-13, atol=0)


def test_a_run_of_the_whole_recipe_does_not_depend_on_accumulation():
    def make():
        return build(
            seed=3, model={"drop_path_rate": 0.5}, views={"erase": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}
        )

    whole, split = drive(make, 16), drive(make, 2)
    assert loss_distance(whole, split) < 1e-13
    assert norm_distance(whole, split) < 1e-13
    assert weight_distance(whole, split) < 1e-11


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_without_mixing_the_loss_is_torchs_cross_entropy(smoothing):
    objective = build(method={**PLAIN, "label_smoothing": smoothing})
    assert objective.group == 1
    batch = batch_of(objective)
    out = objective(batch, None, PROGRESS)
    logits = objective.model(batch.images["image"])
    expected = torch.nn.functional.cross_entropy(logits, batch.label, label_smoothing=smoothing)
    torch.testing.assert_close(out["loss"], expected)
    assert out["top1"] == (logits.argmax(1) == batch.label).float().mean()


def test_bce_asks_of_each_class_by_itself_whether_it_is_there():
    objective = build(method={"loss": "bce", "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 1.0})
    batch = batch_of(objective)
    loss = objective(batch, None, PROGRESS)["loss"]
    logits = objective.model(objective.augment(batch))
    there = torch.nn.functional.one_hot(batch.label, 5).float()
    partner = there.view(4, 2, 5).flip(1).view(8, 5)
    mixed = (batch.draws["mix"][:, :1] < 1).float()
    targets = (there + partner * mixed).clamp(max=1)
    expected = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), targets)
    torch.testing.assert_close(loss, expected)


def test_the_loss_falls_on_one_batch():
    config = recipe(optim={"base_lr": 5e-3, "lr_scaling": "none", "warmup_steps": 0})
    objective = build(method={**PLAIN, "label_smoothing": 0.0}).train()
    optimizer = SteppedOptimizer(
        objective, objective.parameter_rules(0.75), config.optim, global_size=8, total_steps=30
    )
    batch, losses = batch_of(objective), []
    for step in range(30):
        loss = objective(batch, None, PROGRESS)["loss"]
        loss.backward()
        optimizer.step(step, torch.tensor(True))
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_every_trained_weight_takes_part():
    objective = build(model={"drop_path_rate": 0.1})
    objective(batch_of(objective), None, PROGRESS)["loss"].backward()
    assert all(parameter.grad is not None for parameter in objective.parameters())
    assert objective.model.pos_embed.requires_grad
    assert set(objective.parameter_rules(0.75)) == {name for name, _ in objective.named_parameters()}


@pytest.mark.parametrize("num_classes", [3, 5, 9])
def test_evaluation_counts_what_is_right(num_classes):
    objective = build(num_classes).eval()
    batch = batch_of(objective)
    batch.label[:] = torch.arange(8) % num_classes
    batch.label[6] = -1
    sums = objective.evaluate(batch)
    logits, known = objective.model(batch.images["image"]), batch.label >= 0
    ranks = (logits > logits.gather(1, batch.label.clamp(min=0)[:, None])).sum(1)[known]
    assert sums["count"] == 7
    assert sums["top1"] == (ranks == 0).sum()
    assert sums["top5"] == (ranks < 5).sum()
    torch.testing.assert_close(
        sums["loss"], torch.nn.functional.cross_entropy(logits[known], batch.label[known], reduction="sum")
    )


@pytest.mark.parametrize(("size", "fraction"), [(32, 0.875), (224, 0.875), (384, 1.0)])
def test_evaluation_sees_the_middle_of_the_image_and_no_augmentation(size, fraction):
    objective = build(views={"size": size, "rand_augment": "rand-m9", "erase": 0.3})
    (view,) = objective.evaluation_request().views
    assert (view.crop, view.centre_fraction, view.transform, view.flip) == ("centre", fraction, None, 0.0)
    assert objective.evaluation_request().draws == ()
    assert objective.evaluation_request().labels


def saved_encoder(folder, **options):
    torch.manual_seed(7)
    encoder = create_backbone("vit_tiny_patch16_224", img_size=(32, 32), args=TINY, **options)
    preprocessing = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.875, (32, 32))
    save_encoder(encoder, folder, preprocessing=preprocessing, lineage={})
    return encoder


def test_an_encoder_is_begun_from_at_another_size_with_a_small_new_head(tmp_path):
    encoder = saved_encoder(tmp_path / "encoder")
    objective = build(
        model={"name": None, "args": {}, "init_from": str(tmp_path / "encoder")}, views={"size": [48, 32]}
    )
    assert torch.equal(objective.model.blocks[1].mlp.fc2.weight, encoder.blocks[1].mlp.fc2.weight)
    assert objective.model.pos_embed.shape == (1, 1 + 6 * 4, 24)
    assert 1e-5 < objective.model.head.weight.std().item() < 3e-5
    assert (objective.view.mean, objective.view.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert build().model.head.weight.std().item() > 0.01


def test_a_tiny_new_head_and_an_optimizer_whose_steps_follow_the_norm_are_told_of(tmp_path):
    saved_encoder(tmp_path / "encoder")

    def notes(name, begin=True, **method):
        optim = {"name": name, "base_lr": 1e-3, "lr_scaling": "none", "warmup_steps": 0}
        return build(model={"init_from": str(tmp_path / "encoder")} if begin else {}, method=method, optim=optim).notes

    for name in ("lamb", "lambc", "lars"):
        (note,) = notes(name)
        assert f"optim.name {name} makes steps in proportion to a weight's norm" in note
        assert "method.head_init_std 2e-05 hardly moves: set it to 0.02" in note
    assert not notes("adamw")
    assert not notes("lamb", head_init_std=0.02)
    assert not notes("lamb", begin=False)


def test_a_tuned_encoder_is_handed_on_with_its_head(tmp_path):
    objective = build(method=PLAIN)
    objective(batch_of(objective), None, PROGRESS)["loss"].backward()
    preprocessing = Preprocessing.of_view(objective.evaluation_request().views[0])
    save_encoder(objective.encoder(), tmp_path / "tuned", preprocessing=preprocessing, lineage={})
    again = build(seed=1, model={"init_from": str(tmp_path / "tuned")})
    assert load_encoder(tmp_path / "tuned").num_classes == 5
    assert torch.equal(again.model.head.weight, objective.model.head.weight)
    assert preprocessing.crop_fraction == 0.875


def test_normalisation_is_the_configs_where_it_is_given(tmp_path):
    saved_encoder(tmp_path / "encoder")
    objective = build(model={"init_from": str(tmp_path / "encoder")}, views={"mean": [0.1, 0.2, 0.3]})
    assert objective.view.mean == (0.1, 0.2, 0.3)
    assert objective.view.std == (0.2, 0.3, 0.4)


def test_pictures_show_what_the_network_sees():
    objective = build(method=PLAIN)
    batch = batch_of(objective)
    shown = objective.pictures(batch, PROGRESS)["inputs"]
    raw = np.random.default_rng(3).integers(0, 256, (3, 32, 32), dtype=np.uint8)
    assert torch.equal(shown[3], torch.from_numpy(raw))


def test_other_backbones_are_tuned_too():
    objective = build(model={"name": "test_resnet", "args": {}}, method=PLAIN)
    objective(batch_of(objective), None, PROGRESS)["loss"].backward()
    copy.deepcopy(objective)


@pytest.mark.parametrize("name", sorted(path.stem for path in (RECIPES / "finetune").glob("*.yaml")))
def test_every_recipe_parses_and_is_built(name):
    config = load("finetune", name, ["model.init_from=null"], OPTIONS)
    if hasattr(config.method, "teacher"):
        config = config.model_copy(
            update={"method": config.method.model_copy(update={"teacher": str(tiny_teacher(37))})}
        )
    with torch.device("meta"):
        objective = METHODS[config.method.name].build(config, 37)
    assert objective.num_classes == 37
    assert len(config.with_length(3300).to_yaml()) > 0
    assert config.batch.global_size % objective.group == 0
