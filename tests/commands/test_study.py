"""`foreseen study`: what it runs and leaves out, whose labels a teacher knows, and what is said of the result."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.jobs import Jobs
from foreseen.commands.study import check_sources, run_study
from foreseen.commands.study_cells import Key, Plan
from foreseen.commands.study_findings import find
from foreseen.commands.study_options import load_study
from foreseen.commands.study_plan import make_plan
from foreseen.config import RECIPES, Config, recipe_names
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput
from foreseen.handoff.encoder import load_encoder
from tests.tiny_teacher import CLASSES, save_teacher

VIT = "{name: vit_tiny_patch16_224, args: {patch_size: 8, embed_dim: 24, depth: 1, num_heads: 3}}"
CNN = "{name: resnet10t, args: {layers: [1, 1, 1, 1], channels: [4, 4, 8, 8], stem_width: 4}}"
STUDY = f"""
seed: 0
run: {{dir: study, steps: 2, save_every: 2, log_every: 2}}
data: {{path: null, workers: 0}}
method: {{name: supervised, pool: null, mixup: 0.0, cutmix: 0.0}}
views: {{size: 16}}
optim: {{base_lr: 1.0e-3, lr_scaling: none}}
batch: {{global_size: 4}}
compute: {{precision: fp32}}
study:
  seeds: 2
  labels: {{k2: {{}}}}
  models:
    vit: {{family: ViT, model: {VIT}, method: {{pool: mean}}}}
    resnet: {{family: CNN, model: {CNN}}}
  starts: {{scratch: {{}}, pretrained: {{}}, hard: {{}}}}
  augmentations: {{plain: {{}}, deit: {{method: {{mixup: 0.8}}}}}}
"""
Planner = Callable[..., Plan]


@pytest.fixture
def plan(tmp_path: Path, small_shards: Path) -> Planner:
    """Plans the study above, with overrides."""
    recipe = tmp_path / "study.yaml"
    recipe.write_text(STUDY, encoding="utf-8")

    def make(*overrides: str) -> Plan:
        common = [f"data.path={small_shards}", f"run.dir={tmp_path / 'study'}"]
        return make_plan(*load_study(str(recipe), [*common, *overrides]))

    return make


def test_every_cell_is_made_but_those_that_cannot_be_and_the_reason_is_told(plan: Planner) -> None:
    found = plan("study.labels.k99={}", "study.leave_out=[{model: resnet, augmentation: deit}]")
    names = {key.name for key in found.keys}
    assert names == {"vit-scratch-plain", "vit-scratch-deit", "vit-hard-plain", "vit-hard-deit"} | {
        "resnet-scratch-plain", "resnet-hard-plain",
    }  # fmt: skip
    assert sum(map(found.fits, found.keys)) == 12
    reasons = dict(found.left_out)
    assert "study.models.vit.pretrained" in reasons["vit, pretrained"]
    assert "99 are asked for" in reasons["99 labels a class"]
    rules = "study.leave_out=[{model: resnet, augmentation: deit}]"
    assert plan(rules, "study.models.resnet=null", "study.starts.hard=null").left_out == [
        ("vit, pretrained", reasons["vit, pretrained"])
    ]


def test_pretrained_weights_that_do_not_fit_leave_the_cell_out(plan: Planner, tmp_path: Path) -> None:
    encoder = save_teacher(tmp_path / "encoder", class_names=CLASSES)
    wrong = plan(f"study.models.resnet.pretrained.init_from={encoder}")
    assert "is a vit_tiny_patch16_224, and the model a resnet10t" in dict(wrong.left_out)["resnet, pretrained"]
    right = plan(f"study.models.vit.pretrained.init_from={encoder}")
    (cell,) = (key for key in right.keys if key.name == "vit-pretrained-plain")
    assert {config.model.init_from for config in right.cell(cell).tuning()} == {str(encoder)}


def test_a_pretraining_recipe_sees_the_pictures_of_the_study_at_its_size(plan: Planner, small_shards: Path) -> None:
    found = plan(
        "study.models.vit.pretrained={recipe: mae_cpu_minutes, run: {steps: 3}}",
        "study.models.resnet.pretrained={recipe: feature_distill_cpu_minutes, features_of: vit}",
        "data.balance=full",
    )
    mae, distilled = found.pretraining["vit"], found.pretraining["resnet"]
    assert (mae.data.path, mae.views.size, mae.run.steps, mae.data.balance) == (str(small_shards), (16, 16), 3, None)
    assert mae.model.args["embed_dim"] == 24
    assert distilled.method.teacher == str(mae.run.dir / "encoder")  # type: ignore[attr-defined]


def test_all_sides_of_a_seed_have_the_same_labels_and_the_teacher_knows_no_others(plan: Planner) -> None:
    found = plan()
    student = found.cell(Key("k2", "resnet", "hard", "deit"), found.cell(Key("k2", "vit", "scratch", "deit")))
    fit = student.rates[0]
    for seed in student.seeds:
        mine, its = fit.seeded(seed), fit.teacher.seeded(seed)  # type: ignore[union-attr]
        assert mine.method.teacher == str(its.run.dir / "encoder")  # type: ignore[attr-defined]
        cut = [(c.data.shots, c.data.subset_seed, c.data.validation_fraction) for c in (mine, its)]
        assert cut[0] == cut[1] == (2, seed, 0.1)


def test_validation_on_the_first_seed_chooses_the_rate_of_a_cell(plan: Planner) -> None:
    cell = plan("study.rates=[0.5, 1.0]").cell(Key("k2", "vit", "scratch", "plain"))
    tried = cell.tuning()
    assert [(config.seed, config.optim.base_lr) for config in tried] == [(0, 5e-4), (0, 1e-3)]
    for config, validation in zip(tried, (0.3, 0.2), strict=True):
        config.run.dir.mkdir(parents=True)
        result = {"validation": {"top1": validation}, "test": {"top1": 1 - validation}}
        (config.run.dir / "result.json").write_text(json.dumps(result), encoding="utf-8")
    assert [(config.seed, config.optim.base_lr) for config in cell.others()] == [(1, 5e-4)]


@pytest.mark.parametrize("key", ["study.teacher", "study.models.vit.pretrained.init_from"])
def test_weights_that_know_other_labels_of_the_set_are_a_leak(
    plan: Planner, small_shards: Path, tmp_path: Path, key: str
) -> None:
    folder = save_teacher(tmp_path / "weights", class_names=CLASSES)
    start = "hard" if key == "study.teacher" else "pretrained"

    def cells(shots: int | None, *, seeds: int, child: str = "", held_out: float = 0.1) -> tuple[int, str]:
        """How many begin or learn from the folder, where it was trained on so many labels a class; what is left out."""
        data = {"fingerprint": ShardSet.open(small_shards, "train").fingerprint}
        lineage: dict[str, Any] = {
            "method": "supervised", "data": data, "result": {"training_samples": 33},
            "config": {"data": {"shots": shots, "subset_seed": 0, "validation_fraction": held_out}},
        }  # fmt: skip
        if child:
            lineage = {"method": "mae", "data": data, child: [{"lineage": lineage}]}
        (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
        found = plan(f"{key}={folder}", f"study.seeds={seeds}")
        return sum(cell.start == start for cell in found.keys), "\n".join(why for _, why in found.left_out)

    assert cells(2, seeds=1)[0] > 0, "the very labels of the cells"
    others: list[tuple[int | None, int, str, float]] = [
        (None, 1, "", 0.1), (2, 2, "", 0.1), (2, 1, "", 0.2), (None, 1, "parents", 0.1), (None, 1, "teachers", 0.1),
    ]  # fmt: skip
    for shots, seeds, child, held_out in others:
        made, said = cells(shots, seeds=seeds, child=child, held_out=held_out)
        assert made == 0
        assert "learned from labels of this very set (33), others than each seed has here: a leak" in said


def test_weights_that_a_recipe_makes_of_a_leaking_encoder_leak_as_well(
    plan: Planner, small_shards: Path, tmp_path: Path
) -> None:
    folder = save_teacher(tmp_path / "weights", class_names=CLASSES)
    data = {"fingerprint": ShardSet.open(small_shards, "train").fingerprint}
    lineage = {"method": "supervised", "data": data, "config": {"data": {"shots": None}}}
    (folder / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")
    vit = f"study.models.vit.pretrained={{recipe: mae_cpu_minutes, model: {{init_from: {folder}}}}}"
    resnet = "study.models.resnet.pretrained={recipe: feature_distill_cpu_minutes, features_of: vit}"
    found = plan(vit, resnet)
    assert not [key for key in found.keys if key.start == "pretrained"]
    assert {what for what, why in found.left_out if "a leak" in why} == {"vit, pretrained", "resnet, pretrained"}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("study.seeds=0", r"study\.seeds should be greater than or equal to 1, got 0"),
        ("study.seed=3", r"unknown key 'study\.seed'"),
        ("study.labels.five={}", "'five': it must be k and a number of labels a class, or all"),
        ("study.models.vit.model.name=vit_tny", "vit_tny"),
        ("study.starts.scratch=null", "no scratch"),
        ("study.starts.frozen={}", r"study\.starts\.frozen"),
        ("study.leave_out=[{model: vitt}]", "'vitt', which is not among study.models"),
        ("study.rates=[1.0, 1.0001]", "different factors above 0"),
        ("study.rates=[.nan]", "different factors above 0"),
        (
            "study.augmentations.deit.data.test_split=train",
            r"deit\.data\.test_split would give cells of one seed other",
        ),
        ("study.labels.k2.run.dir=here", r"study\.labels\.k2\.run\.dir: cells have folders below"),
        ("study.teacher=vit/hard/plain", "no cell MODEL/START/AUGMENTATION"),
        ("study.teacher=nowhere", "neither best, nor MODEL/START/AUGMENTATION of the study, nor an encoder folder"),
        ("study.models.vit.pretrained={}", "give one of them"),
        ("study.models.vit.pretrained={recipe: mae_cpu_minutes, features_of: resnet}", "stands before it"),
        (
            "study.models.vit.pretrained={recipe: mae_cpu_minutes, views: {erase: 0.2}}",
            r"the pretraining of vit .*views\.erase 0\.2 is of fine-tuning alone",
        ),
        ("optim.base_lr=-1", r"the cell vit, scratch, plain with 2 labels a class: optim\.base_lr"),
        ("views=5", "views must be a section"),
        ("data.test_split=nowhere", "nowhere"),
        ("optim.warmup_steps=9", "warm-up of 9 steps is not shorter"),
    ],
)
def test_bad_input_is_a_sentence_before_the_first_run(plan: Planner, tmp_path: Path, override: str, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        plan(override)
    assert not (tmp_path / "study").exists()


def test_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="plain `foreseen study`"):
        CliRunner().invoke(cli.app, ["study", "study_cpu_minutes"], catch_exceptions=False)


def test_a_study_is_made_once_and_ends_in_a_table_a_plot_and_an_answer(plan: Planner, tmp_path: Path) -> None:
    found = plan("study.seeds=1", "study.augmentations.deit=null", "study.models.resnet=null")
    with Jobs() as jobs:
        said = run_study(found, jobs)
    folder = tmp_path / "study"
    runs = sorted(folder.rglob("result.json"))
    assert [run.parent.parent.name for run in runs] == [
        "vit-hard-plain-from-vit-scratch-plain-lr-0.001-lr-0.001", "vit-scratch-plain-lr-0.001",
    ]  # fmt: skip
    assert "With 6 labels (2 labels a class) and 3 more to choose by, train vit" in said
    assert "on one seed, so without an interval" in said
    table = list(csv.DictReader((folder / "study.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["start"], row["taught_by"]) for row in table] == [("scratch", ""), ("hard", "vit, scratch, plain")]
    for name in ("study.md", "study.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "learned from the very labels of its student" in text
        assert "vit, pretrained: no pretrained weights" in text, "what is left out"
    assert "<script" not in text
    assert (folder / "study.png").read_bytes().startswith(b"\x89PNG")

    before = [run.stat().st_mtime_ns for run in runs]
    with Jobs() as jobs:
        again = run_study(plan("study.seeds=1", "study.augmentations.deit=null", "study.models.resnet=null"), jobs)
    assert (again, [run.stat().st_mtime_ns for run in runs]) == (said, before)


def test_a_study_that_goes_on_keeps_its_report_until_it_can_tell_as_much(
    plan: Planner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = ("study.starts.pretrained=null", "study.starts.hard=null", "study.augmentations.deit=null")
    levels = ("study.seeds=1", "study.labels.k3={}", *alone)
    with Jobs() as jobs:
        run_study(plan(*levels, "study.models.resnet=null"), jobs)
    report = tmp_path / "study" / "study.csv"
    whole = report.read_text(encoding="utf-8")

    class Stopped(Exception):
        pass

    with Jobs() as jobs:
        submit = jobs.submit

        def stop(kind: str, config: Config) -> Any:
            if "k3" in config.run.dir.parts:
                raise Stopped
            return submit(kind, config)

        monkeypatch.setattr(jobs, "submit", stop)
        with pytest.raises(Stopped):
            run_study(plan(*levels), jobs)
    assert report.read_text(encoding="utf-8") == whole, "k2 of both models is known, but k3 was told, too"
    with Jobs() as jobs:
        run_study(plan(*levels), jobs)
    told = [(row["labels"], row["model"]) for row in csv.DictReader(report.read_text(encoding="utf-8").splitlines())]
    assert told == [("k2", "vit"), ("k2", "resnet"), ("k3", "vit"), ("k3", "resnet")]


def _cell(name: str, test: list[float], validation: float, *, family: str = "ViT") -> dict[str, Any]:
    model, start, augmentation = name.split("/")
    return {
        "labels": "k5", "model": model, "start": start, "augmentation": augmentation, "family": family, "test": test,
        "validation": [validation] * len(test), "mean": sum(test) / len(test), "sd": 1.0, "seeds": range(len(test)),
        "chance": 100 / 37, "training_labels": 185, "validation_labels": 369, "taught_by": "vit, scratch, plain",
    }  # fmt: skip


def test_validation_chooses_and_the_folklore_is_judged_over_seeds() -> None:
    cells = [
        _cell("vit/scratch/plain", [10, 12, 14], 30),
        _cell("vit/pretrained/plain", [20, 21, 25], 50),
        _cell("cnn/scratch/plain", [6, 8, 9], 20, family="CNN"),
        _cell("cnn/scratch/deit", [30, 8, 40], 10, family="CNN"),
        _cell("cnn/hard/plain", [7, 9, 9], 12, family="CNN"),
        _cell("cnn/soft/plain", [9, 10, 11], 15, family="CNN"),
    ]
    found = find(cells)
    said = "\n".join(found["sentences"])
    assert found["best"] == "vit/pretrained/plain"
    assert "With 185 labels (5 labels a class) and 369 more to choose by, train vit, pretrained, plain: 22.0" in said
    # Differences -4, -4, -5: mean -4.33, sd 0.577, t(0.975, 2) / sqrt(3) = 2.484.
    cnn = "cnn, scratch, plain against vit, scratch, plain: worse, -4.3 points, 95 % interval -5.8 to -2.9"
    assert f"a small CNN beats a small ViT. Here, the best of either from scratch, {cnn}" in said
    assert "hard against soft (of cnn): worse, -1.7 points, 95 % interval -3.1 to -0.2" in said
    assert "Soft distillation from vit, scratch, plain, against labels alone (of cnn): better by +2.3 points" in said
    assert "Pretraining of vit, each side at its best augmentation: better by +10.0 points" in said
    assert "Against the best of another start, vit, scratch, plain: better" in said
    assert "Augmentation, deit against plain (of cnn): no difference that can be told, +18.3 points" in said
    assert "On test cnn, scratch, deit came out highest, at 26.0 % (no difference that can be told" in said
    assert "the highest of 6 is partly luck" in said
    assert "guessing" not in said


def test_a_best_cell_that_may_be_guessing_and_a_tie_are_no_advice() -> None:
    cells = [_cell("vit/scratch/plain", [2, 3, 4], 3), _cell("cnn/scratch/plain", [3, 3, 3], 2, family="CNN")]
    said = "\n".join(find(cells)["sentences"])
    assert "The best cell cannot be told from guessing (2.7 %): nothing here is to be taken." in said
    assert "highest" not in said


@pytest.mark.parametrize(
    ("key", "start"), [("study.teacher", "hard"), ("study.models.vit.pretrained.init_from", "pretrained")]
)
def test_a_finished_run_of_other_weights_than_its_source_holds_now_is_refused(
    plan: Planner, tmp_path: Path, key: str, start: str
) -> None:
    folder = save_teacher(tmp_path / "weights", class_names=CLASSES)
    made = plan(f"{key}={folder}")
    (config, *_) = made.cell(next(each for each in made.keys if each.start == start)).tuning()
    lineage = config.run.dir / "encoder" / "lineage.json"
    lineage.parent.mkdir(parents=True)
    kind = "teachers" if start == "hard" else "parents"
    lineage.write_text(json.dumps({kind: [{"weights_sha256": load_encoder(folder).weights}]}), encoding="utf-8")
    check_sources(config)
    lineage.write_text(json.dumps({kind: [{"weights_sha256": "of another time"}]}), encoding="utf-8")
    with pytest.raises(BadInput, match="seed-0 is finished, but with other weights than .*weights holds now"):
        check_sources(config)


@pytest.mark.parametrize("name", recipe_names("study"))
def test_every_shipped_study_can_be_made_and_says_what_it_does(name: str, small_shards: Path, tmp_path: Path) -> None:
    command = ["study", name, f"data.path={small_shards}", f"run.dir={tmp_path}", "study.labels.k2={}", "--plan"]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert "vit is pretrained here, by mae" in result.output
    assert not list(tmp_path.iterdir())
    text = (RECIPES / "study" / f"{name}.yaml").read_text(encoding="utf-8")
    assert f"#   foreseen study {name}" in text
    assert "# Expected" in text
    assert "# Cost" in text
    listed = CliRunner().invoke(cli.app, ["recipes"]).output
    assert f"foreseen study {name}" in listed
    printed = yaml.safe_load(CliRunner().invoke(cli.app, ["recipes", name]).output)
    assert {"vit", "mobilenet"} <= printed["study"]["models"].keys()
