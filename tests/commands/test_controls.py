"""`finetune --controls`: what is run, what is chosen, and what is said of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands import controls
from foreseen.commands.jobs import Jobs
from foreseen.commands.verbs import load_recipe
from foreseen.config import Config
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput
from tests.tiny_teacher import CLASSES, save_teacher

Recipe = Callable[..., list[str]]


def _config(*overrides: str) -> Config:
    return load_recipe("finetune", "cpu_minutes", ["run.dir=study", "views.mean=[0,0,0]", *overrides])


def _write(config: Config, *, validation: float, test: float) -> None:
    """A finished run's result, as `controls` reads it."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    result = {
        "step": 5, "training_samples": 120, "validation": {"top1": validation, "count": 60}, "test": {"top1": test},
        "test_data": {"path": config.data.path, "split": "test"},
    }  # fmt: skip
    (config.run.dir / "result.json").write_text(json.dumps(result), encoding="utf-8")
    resolved = config.with_length(120).to_yaml()
    (config.run.dir / "config.yaml").write_text(resolved, encoding="utf-8")


def test_scratch_is_the_same_recipe_and_three_rates_of_its_own_without_layer_decay() -> None:
    plan = controls.make_plan(_config("optim.base_lr=2e-3", "optim.layer_decay=0.8"), seeds=2)
    recipes = [(arm.config.optim.base_lr, arm.config.optim.layer_decay) for arm in plan.scratch]
    assert recipes == [(2e-3, 0.8), (5e-4, None), (1.4e-3, None), (4e-3, None)]
    assert all(arm.config.model.init_from is None for arm in plan.scratch)
    assert all(arm.config.run.steps == plan.pretrained.config.run.steps for arm in plan.scratch)
    assert controls.tripled(plan.scratch[1]).config.run.steps == 3 * plan.pretrained.config.run.steps


def test_every_side_of_a_seed_has_the_same_labels_and_each_seed_its_own() -> None:
    plan = controls.make_plan(_config("seed=7"), seeds=2)
    for seed in plan.seeds:
        runs = [arm.seeded(seed) for arm in (plan.pretrained, *plan.scratch)]
        assert {(run.seed, run.data.subset_seed) for run in runs} == {(seed, seed)}
        assert len({run.run.dir for run in runs}) == len(runs)
    assert plan.seeds == (7, 8)


def test_validation_chooses_scratch_and_test_does_not(tmp_path: Path) -> None:
    plan = controls.make_plan(_config(f"run.dir={tmp_path}"), seeds=3, tuning_seeds=2)
    for place, arm in enumerate(plan.scratch):
        for seed in plan.seeds[:2]:
            _write(arm.seeded(seed), validation=0.5 if place == 2 else 0.4, test=0.1 if place == 2 else 0.9)
    assert plan.chosen() is plan.scratch[2]
    remaining = plan.remaining_scratch(plan.chosen())
    assert [config.seed for config in remaining] == [2, 0, 1, 2]
    steps = plan.pretrained.config.run.steps
    assert steps is not None
    assert [config.run.steps for config in remaining] == [steps] + 3 * [3 * steps]


def _study(
    tmp_path: Path,
    shards: Path,
    *,
    pretrained: list[float],
    scratch: list[float],
    lineage: dict[str, Any] | None = None,
) -> str:
    """The report of a study whose runs came out at these test scores; scratch is worse on all other recipes."""
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/README.md").write_text("# a card\n", encoding="utf-8")
    config = _config(f"run.dir={tmp_path / 'study'}", f"model.init_from={tmp_path / 'encoder'}", f"data.path={shards}")
    plan = controls.make_plan(config, seeds=len(pretrained), triple_seeds=1)
    for seed, (above, below) in enumerate(zip(pretrained, scratch, strict=True)):
        _write(plan.pretrained.seeded(seed), validation=above, test=above)
        for arm in plan.scratch:
            _write(arm.seeded(seed), validation=below if arm is plan.scratch[0] else 0.0, test=below)
    _write(controls.tripled(plan.scratch[0]).seeded(0), validation=0.3, test=0.3)
    return controls.conclude(plan, plan.chosen(), lineage or {})


def test_a_clear_gain_is_told_with_its_interval_and_goes_into_the_model_card(
    small_shards: Path, tmp_path: Path
) -> None:
    report = _study(tmp_path, small_shards, pretrained=[0.50, 0.52, 0.54], scratch=[0.40, 0.43, 0.43])
    # Differences 10, 9, 11: mean 10, sd 1, t(0.975, 2) / sqrt(3) = 2.484.
    assert report.startswith("Pretrained against scratch:\n\n| begins from |")
    assert "Pretraining helped by 10.0 points against scratch, same recipe" in report
    assert "95 % interval +7.5 to +12.5 over 3 seeds of labels and fine-tuning, one pretraining run" in report
    assert "3× the passes" in report
    assert "on one seed, so without an interval" in report
    card = (tmp_path / "encoder/README.md").read_text(encoding="utf-8")
    assert card.startswith("# a card")
    assert "120 labels to train on and 60 to choose by" in card
    assert "Whether pretraining saw the test pictures could not be checked" in card
    assert "helped by 10.0 points" in card
    record = json.loads((tmp_path / "study/controls.json").read_text(encoding="utf-8"))
    assert record["differences"]["scratch"]["each"] == pytest.approx([10, 9, 11])


def test_no_gain_and_a_loss_are_told_as_such(small_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "loss").mkdir()
    none = _study(tmp_path / "none", small_shards, pretrained=[0.50, 0.42, 0.46], scratch=[0.40, 0.50, 0.47])
    assert "did not help measurably" in none
    loss = _study(tmp_path / "loss", small_shards, pretrained=[0.30, 0.33, 0.34], scratch=[0.40, 0.43, 0.43])
    assert "did not help: it lost" in loss


def test_an_encoder_that_saw_the_test_pictures_is_labelled(small_shards: Path, tmp_path: Path) -> None:
    # The two splits of the fixture hold the same pictures, under other names and fingerprints.
    fingerprint = ShardSet.open(small_shards, "train").fingerprint
    assert fingerprint != ShardSet.open(small_shards, "test").fingerprint
    data = {"path": str(small_shards), "split": "train", "fingerprint": fingerprint}
    child = {"data": data | {"path": str(small_shards)}, "parents": [{"source": "x", "lineage": {"data": data}}]}
    report = _study(tmp_path, small_shards, pretrained=[0.50, 0.52], scratch=[0.40, 0.43], lineage=child)
    assert "TRANSDUCTIVE: pretraining saw 37 of the 37 test pictures" in report
    record = json.loads((tmp_path / "study/controls.json").read_text(encoding="utf-8"))
    assert record["test_pictures_seen"] == 37


def test_a_rate_at_the_end_of_the_grid_is_told(small_shards: Path, tmp_path: Path) -> None:
    plan = controls.make_plan(_config(f"run.dir={tmp_path}", f"data.path={small_shards}"), seeds=1)
    assert [controls._edge_of_grid(plan, arm) is None for arm in plan.scratch] == [True, False, True, False]


def test_a_second_report_replaces_the_first_in_the_card(tmp_path: Path) -> None:
    from foreseen.handoff.card import add_section

    (tmp_path / "README.md").write_text("# card\n\nwords\n", encoding="utf-8")
    add_section(tmp_path, "One", "first")
    add_section(tmp_path, "Two", "other")
    add_section(tmp_path, "One", "second")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "first" not in card
    assert card.count("## One") == card.count("## Two") == 1
    assert card.index("words") < card.index("second") < card.index("other")


def _foreseen(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _small(recipe: Recipe, **more: object) -> list[str]:
    return recipe(
        run__steps=2, optim__warmup_steps=1, batch__global_size=8, run__save_every=2, data__shots=4, **more
    )  # fmt: skip


def test_controls_run_end_to_end_and_finished_runs_are_not_made_again(
    recipe: Recipe, small_shards: Path, tmp_path: Path
) -> None:
    encoder = tmp_path / "pretrain/encoder"
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=encoder.parent))
    study = tmp_path / "study"
    command = ["finetune", "cpu_minutes", *_small(recipe, run__dir=study, model__init_from=encoder)]
    report = _foreseen(*command, "--controls", "--seeds", "2")
    assert "against scratch" in report
    assert "2 seeds" in report
    runs = sorted(study.rglob("result.json"))
    # 2 seeds × (pretrained, 4 of scratch, the chosen one three times as long)
    assert len(runs) == 12
    before = [run.stat().st_mtime_ns for run in runs]
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=encoder.parent))
    assert "Did pretraining help?" in (encoder / "README.md").read_text(encoding="utf-8"), "the same weights, handed on"
    again = _foreseen(*command, "--controls", "--seeds", "2")
    assert [run.stat().st_mtime_ns for run in runs] == before
    assert again.strip().splitlines()[-1] == report.strip().splitlines()[-1]
    assert "Did pretraining help?" in (encoder / "README.md").read_text(encoding="utf-8")
    other = tmp_path / "other"
    shutil.copytree(small_shards, other)
    labels = np.load(other / "train.labels.npy")
    np.save(other / "train.labels.npy", labels[::-1].copy())
    with pytest.raises(BadInput, match=r"the labels of split 'train' .* changed"):
        CliRunner().invoke(
            cli.app, [*command, f"data.path={other}", "--controls", "--seeds", "3"], catch_exceptions=False
        )
    with pytest.raises(BadInput, match=r"holds a checkpoint of another job \(optim.base_lr was"):
        CliRunner().invoke(
            cli.app, [*command, "optim.base_lr=3e-4", "--controls", "--seeds", "2"], catch_exceptions=False
        )


def test_a_distilled_student_is_compared_with_itself_on_labels_alone(recipe: Recipe, tmp_path: Path) -> None:
    teacher = save_teacher(tmp_path / "teacher", class_names=CLASSES)
    study = tmp_path / "study"
    overrides = _small(recipe, run__dir=study, method__teacher=teacher)
    report = _foreseen("finetune", "cpu_minutes_distill", *overrides, "--controls", "--seeds", "2")
    said = report[report.index("Distilled against labels alone:\n\n| learns from |") :].lower()
    assert "| labels and the teacher |" in said
    assert "whether the teacher saw the test pictures" in said
    assert not any(word in said for word in ("pretrain", "scratch"))
    assert "against labels alone, " in report
    assert "one teacher" in report
    record = json.loads((study / "controls.json").read_text(encoding="utf-8"))
    assert record["arms"].keys() == {"distilled", "labels_alone", "labels_alone_3x"}
    assert {path.name for path in study.iterdir() if path.is_dir()} >= {"distilled", "labels-alone-same"}
    names = {
        folder.name: json.loads((folder / "seed-0/encoder/lineage.json").read_text(encoding="utf-8"))["method"]
        for folder in study.iterdir()
        if folder.is_dir()
    }
    assert {method for name, method in names.items() if name != "distilled"} == {"supervised"}
    assert names["distilled"] == "distill"
    student = json.loads((study / "distilled/seed-0/encoder/config.json").read_text(encoding="utf-8"))
    assert student["label_names"] == list(CLASSES)  # it can be a teacher itself
    assert "Did distillation help?" in (teacher / "README.md").read_text(encoding="utf-8")
    table = tmp_path / "table.md"
    _foreseen("results", str(study / "distilled/seed-0"), "--out", str(table))
    assert f"| scratch, with the teacher {teacher} |" in table.read_text(encoding="utf-8")


def test_a_study_of_another_encoder_in_the_same_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    first, second = (
        _config(f"run.dir={tmp_path / 'study'}", f"model.init_from={tmp_path / n}") for n in ("one", "two")
    )
    controls.claim_folder(first)
    controls.claim_folder(first)
    with pytest.raises(BadInput, match="holds the controls of another encoder"):
        controls.claim_folder(second)


def test_a_study_of_another_teacher_or_start_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two", "teacher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())

    def study(teacher: str, begin: str) -> Config:
        overrides = [f"method.teacher={tmp_path / teacher}", f"model.init_from={tmp_path / begin}"]
        return load_recipe("finetune", "cpu_minutes_distill", [f"run.dir={tmp_path / 'study'}", *overrides])

    controls.claim_folder(study("teacher", "one"))
    controls.claim_folder(study("teacher", "one"))
    for teacher, begin in (("two", "one"), ("teacher", "two")):
        with pytest.raises(BadInput, match="holds the controls of another teacher or encoder"):
            controls.claim_folder(study(teacher, begin))


def test_controls_without_an_encoder_are_refused() -> None:
    with pytest.raises(BadInput, match=r"model\.init_from is null; give an encoder"), Jobs() as jobs:
        controls.run_controls(_config("model.init_from=null"), jobs, seeds=2)


def test_several_jobs_under_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="--jobs 2"):
        Jobs(2)


@pytest.mark.slow
def test_runs_side_by_side_come_out_as_one_after_another(recipe: Recipe, tmp_path: Path) -> None:
    scores = []
    for processes in (1, 2):
        config = load_recipe("finetune", "cpu_minutes", _small(recipe, run__dir=tmp_path / str(processes)))
        plan = controls.make_plan(config, seeds=1)
        with Jobs(processes) as jobs:
            controls.make_runs(jobs, plan.tuning())
        scores.append([controls._result(c) | {"seconds": 0} for c in plan.tuning()])
        assert (plan.tuning()[0].run.dir / "log.txt").is_file() == (processes == 2)
    assert scores[0] == scores[1]


def _fail_beside(long: Config, bad: Config) -> None:
    with Jobs(2) as jobs:
        running = jobs.submit("finetune", long)
        while not list(long.run.dir.glob("checkpoints/step-*")):
            assert not running.done(), running.exception()
            time.sleep(0.1)
        list(jobs.wait([running, jobs.submit("finetune", bad)]))


@pytest.mark.slow
def test_when_one_run_fails_the_others_save_and_stop(recipe: Recipe, tmp_path: Path) -> None:
    common = _small(recipe, model__init_from="null")
    long = load_recipe("finetune", "cpu_minutes", [*common, f"run.dir={tmp_path / 'long'}", "run.steps=1000000"])
    bad = load_recipe("finetune", "cpu_minutes", [*common, f"run.dir={tmp_path / 'bad'}", "data.split=nowhere"])
    with pytest.raises(BadInput, match="nowhere"):
        _fail_beside(long, bad)
    assert "told to stop: saved" in (tmp_path / "long/log.txt").read_text(encoding="utf-8")


def test_starting_weights_are_compared_only_while_they_are_the_same(recipe: Recipe, tmp_path: Path) -> None:
    start, encoder = tmp_path / "start/encoder", tmp_path / "pretrain/encoder"
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=start.parent))
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=encoder.parent, model__init_from=start))
    command = ["finetune", "cpu_minutes", *_small(recipe, model__init_from=encoder), "--controls", "--seeds", "1"]
    with_start = _foreseen(*command, f"run.dir={tmp_path / 'one'}")
    assert f"gainst starting weights ({start})" in with_start
    assert (tmp_path / "one/start/seed-0/result.json").is_file()
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=tmp_path / "other", seed=5))
    shutil.copy(tmp_path / "other/encoder/model.safetensors", start / "model.safetensors")
    without = _foreseen(*command, f"run.dir={tmp_path / 'two'}")
    assert "not there or changed since" in without
    assert not (tmp_path / "two/start").exists()


def test_a_set_without_test_labels_is_refused_before_the_first_run(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    small = _small(recipe, model__init_from=tmp_path / "encoder", data__test_split="nowhere")
    with pytest.raises(BadInput, match="nowhere"):
        CliRunner().invoke(cli.app, ["finetune", "cpu_minutes", *small, "--controls"], catch_exceptions=False)
    assert not (tmp_path / "run").exists()


def test_options_of_controls_without_controls_are_refused(recipe: Recipe) -> None:
    with pytest.raises(BadInput, match="--seeds and --jobs belong to --controls"):
        CliRunner().invoke(
            cli.app, ["finetune", "cpu_minutes", *_small(recipe), "--seeds", "2"], catch_exceptions=False
        )


@pytest.mark.slow
def test_told_to_stop_the_runs_side_by_side_save_and_the_command_exits_with_85(recipe: Recipe, tmp_path: Path) -> None:
    small = _small(recipe, run__dir=tmp_path / "study", model__init_from=tmp_path / "pretrain/encoder")
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=tmp_path / "pretrain"))
    command = [*small, "run.steps=1000000", "--controls", "--seeds", "1", "--jobs", "2"]
    job = subprocess.Popen([sys.executable, "-m", "foreseen", "finetune", "cpu_minutes", *command])
    while len(list((tmp_path / "study").glob("*/seed-0/checkpoints/step-*/manifest.json"))) < 2:
        assert job.poll() is None
        time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=60) == 85
    logs = [log.read_text(encoding="utf-8") for log in (tmp_path / "study").rglob("log.txt")]
    assert sum("told to stop: saved" in log for log in logs) >= 2


@pytest.mark.slow
def test_two_ranks_make_the_same_study_as_one(recipe: Recipe, tmp_path: Path) -> None:
    _foreseen("pretrain", "mae_cpu_minutes", *_small(recipe, run__dir=tmp_path / "pretrain"))
    verdicts = []
    for ranks in (1, 2):
        study = tmp_path / f"study{ranks}"
        small = _small(recipe, run__dir=study, model__init_from=tmp_path / "pretrain/encoder")
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        command = [sys.executable, *(launcher if ranks > 1 else []), "-m", "foreseen", "finetune", "cpu_minutes"]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, *small, "--controls", "--seeds", "1"], env=environment, check=True, timeout=300)
        verdicts.append(json.loads((study / "controls.json").read_text(encoding="utf-8"))["differences"])
    assert verdicts[0] == verdicts[1]
