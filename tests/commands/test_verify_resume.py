"""`foreseen verify-resume` passes what is sound and catches what is not."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foreseen.commands.launched import LaunchedJob
from foreseen.commands.verify_resume import Topology, Verdict, _kill_at, make_plan, verify
from foreseen.errors import BadInput
from tests.tiny_teacher import save_teacher

Recipe = Callable[..., list[str]]

# Runs in every process of a job before anything else, loader workers too, and breaks one module as it is imported.
SABOTAGE = """
import importlib.abc, importlib.machinery, os, sys

def lose_the_optimizer(module):
    real = module.Checkpoints.load

    def load(self, step):
        found = real(self, step)
        found.optimizer.update({key: value * 0 for key, value in found.optimizer.items() if "exp_avg" in key})
        return found

    module.Checkpoints.load = load

def lose_the_place_in_small_micro_batches(module):
    real = module.BatchLayout.positions
    module.BatchLayout.positions = lambda self, step, *more: real(self, step + (self.accumulation == 4), *more)

TARGETS = {
    "optimizer": ("foreseen.engine.checkpoint", lose_the_optimizer),
    "position": ("foreseen.data.batch", lose_the_place_in_small_micro_batches),
}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        wanted, sabotage = TARGETS[os.environ["SABOTAGE"]]
        if name != wanted:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        real = spec.loader.exec_module

        def exec_module(module):
            real(module)
            sabotage(module)

        spec.loader.exec_module = exec_module
        return spec

if "SABOTAGE" in os.environ:
    sys.meta_path.insert(0, Finder())
"""


def _plan(recipe: Recipe, out: Path, **more: int) -> list[str]:
    overrides = recipe(batch__global_size=8, data__workers=1, model__drop_path_rate=0.2)
    return ["verify-resume", "mae_cpu_minutes", *overrides, "--out", str(out), *(f"--{k}={v}" for k, v in more.items())]


def _verify(arguments: list[str], **environment: str) -> tuple[int, str, dict[str, object]]:
    command = [sys.executable, "-m", "foreseen", *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, timeout=1500, check=False
    )
    out = Path(arguments[arguments.index("--out") + 1])
    return done.returncode, done.stdout + done.stderr, json.loads((out / "verify.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_sound_job_passes_after_kills_and_on_another_topology(recipe: Recipe, tmp_path: Path) -> None:
    code, output, facts = _verify(_plan(recipe, tmp_path / "verify", kills=2, saves=1, steps=30))
    assert code == 0, output
    assert output.endswith("verdict: the job is the same whatever happens to it\n")
    assert facts["passed"] is True
    kills = facts["kills"]
    assert isinstance(kills, list)
    assert len(kills) == 2
    assert all(kill["step"] > 0 and kill["survivors"] == 0 for kill in kills)
    assert sum(kill["in_save"] for kill in kills) >= 1
    assert "30 steps × 8 places are the same, element for element" in output
    assert "epochs of 37: none comes twice in one" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lost", "sentence"),
    [
        ("optimizer", "FAIL  killed: losses and gradient norms differ by up to"),
        ("position", "FAIL  other topology: samples of 16 steps × 8 places differ in"),
    ],
)
def test_a_job_that_loses_something_is_caught(recipe: Recipe, tmp_path: Path, lost: str, sentence: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(SABOTAGE, encoding="utf-8")
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    arguments = _plan(recipe, tmp_path / "verify", kills=1, saves=0, steps=16, ranks=1)
    code, output, facts = _verify(arguments, PYTHONPATH=path, SABOTAGE=lost)
    assert code == 1, output
    assert sentence in output
    assert "this job cannot be trusted to go on" in output
    assert facts["passed"] is False


@pytest.mark.proof
def test_twenty_kills_seven_of_them_in_a_save(recipe: Recipe, tmp_path: Path) -> None:
    code, output, facts = _verify(_plan(recipe, tmp_path / "verify", kills=21, saves=7))
    assert code == 0, output
    kills = facts["kills"]
    assert isinstance(kills, list)
    assert len(kills) == 21
    assert sum(kill["in_save"] for kill in kills) >= 7


FROM_NOTHING = "model.init_from=null"
OPTIONS = {"kills": 3, "saves": None, "steps": None, "ranks": 2, "out": Path("verify"), "seed": 0}


def _cuts(name: str, overrides: list[str], **more: object) -> tuple[Topology, Topology]:
    plan = make_plan(name, overrides, **OPTIONS | more)  # type: ignore[arg-type]
    return plan.usual, plan.other


def test_the_plan_cuts_the_batch_in_two_ways(recipe: Recipe) -> None:
    # Other micro-batches, too, or a mistake that is made in each of them would not show.
    assert _cuts("mae_cpu_minutes", recipe()) == (Topology(2, 2, 1), Topology(1, 8, 3))
    assert _cuts("mae_cpu_minutes", [], ranks=8) == (Topology(8, 2, 1), Topology(4, 8, 3))
    assert _cuts("mae_cpu_minutes", [], ranks=1) == (Topology(1, 2, 1), Topology(1, 4, 3))
    assert _cuts("mae_cpu_minutes", ["batch.global_size=2"]) == (Topology(2, 1, 1), Topology(1, 1, 3))
    with pytest.raises(BadInput, match="batch.global_size 7 is no multiple of 2 ranks: give"):
        _cuts("mae_cpu_minutes", ["batch.global_size=7"])
    with pytest.raises(BadInput, match="batch.global_size 1 cannot be cut in two ways"):
        _cuts("mae_cpu_minutes", ["batch.global_size=1"], ranks=1)


def test_the_plan_makes_no_micro_batch_larger_than_the_recipe_or_against_the_method() -> None:
    assert _cuts("mae_vit_b16", ["batch.micro_size=64"]) == (Topology(2, 32, 4), Topology(1, 128, 6))
    mixes = ["method.mixup=0.8", "batch.global_size=8", FROM_NOTHING]
    assert _cuts("cpu_minutes", mixes) == (Topology(2, 2, 1), Topology(1, 2, 3))  # micro-batches of 2, then of 4
    with pytest.raises(BadInput, match="batch.global_size 6 is no multiple of 2 ranks in groups of 2"):
        _cuts("cpu_minutes", [*mixes, "batch.global_size=6"])
    with pytest.raises(BadInput, match=r"groups of 32: give another --ranks, or set method.koleo_group \(now 32\) to"):
        _cuts("dino_cpu_minutes", [], ranks=4)
    # Statistics are over a micro-batch.
    resnet = [
        FROM_NOTHING,
        "model.name=resnet10t",
        "model.drop_path_rate=0",
        "optim.layer_decay=null",
        "method.mixup=0",
    ]
    assert _cuts("pets", resnet) == (Topology(2, 2, 8), Topology(1, 4, 10))
    assert _cuts("pets", resnet, ranks=1) == (Topology(1, 2, 8), Topology(1, 2, 10))


@pytest.mark.parametrize("name", ["dino_cpu_minutes", "ibot_cpu_minutes", "dinov2_cpu_minutes", "dinov2_vit_l16_short"])
def test_methods_that_fit_themselves_to_the_length_have_a_plan(name: str) -> None:
    usual, other = _cuts(name, [])
    assert (usual.ranks, other.ranks) == (2, 1)


def test_continued_pretraining_has_a_plan(tmp_path: Path) -> None:
    begun = [f"model.init_from={save_teacher(tmp_path / 'encoder', size=(48, 48))}", "method.head_warmup_steps=2"]
    own = ["model.name=null", "model.args=null", "method.koleo_group=8", "method.crops.local_size=[24,24]"]
    usual, other = _cuts("dino_cpu_minutes", [*begun, *own])
    assert usual.accumulation != other.accumulation


def test_the_plan_is_of_the_recipes_verb_and_refuses_what_cannot_be_done(tmp_path: Path) -> None:
    plan = make_plan("cpu_minutes", [FROM_NOTHING], **OPTIONS)  # type: ignore[arg-type]
    assert plan.arguments[0] == "finetune"
    for name, more, sentence in (
        ("mea", {}, "there is no recipe 'mea'"),
        ("pets", {}, "runs/mae_pets/encoder is no encoder folder"),
        ("mae_cpu_minutes", {"saves": 4}, "--saves is 4, more than the 3 of --kills"),
        ("mae_cpu_minutes", {"steps": 11}, "--steps is 11, too few for 3 kills: give at least 12"),
    ):
        with pytest.raises(BadInput, match=sentence):
            make_plan(name, [], **OPTIONS | more)  # type: ignore[arg-type]


@pytest.mark.parametrize("kills", [1, 3, 21])
def test_there_are_more_saves_than_kills_in_a_save(kills: int) -> None:
    plan = make_plan("mae_cpu_minutes", [], **OPTIONS | {"kills": kills})  # type: ignore[arg-type]
    every = next(int(a.removeprefix("run.save_every=")) for a in plan.arguments if a.startswith("run.save_every="))
    assert plan.steps // every >= 2 * kills


def _break_jobs(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    start = LaunchedJob.__enter__

    def in_a_broken_way(self: LaunchedJob) -> LaunchedJob:
        self.command = [sys.executable, "-c", code]
        return start(self)

    monkeypatch.setattr(LaunchedJob, "__enter__", in_a_broken_way)


def test_a_job_that_cannot_run_at_all_is_a_failed_verdict_with_its_last_words(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_jobs(monkeypatch, "print('no shards here'); raise SystemExit(2)")
    plan = make_plan("mae_cpu_minutes", recipe(), kills=1, saves=0, steps=8, ranks=1, out=tmp_path / "out", seed=0)
    verdict: Verdict = verify(plan)
    assert not verdict.passed
    assert "ended with exit code 2: no shards here" in verdict.text()


def test_what_lies_beside_the_runs_of_an_earlier_time_stays(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for name in ("unbroken/checkpoints", "killed", "my own run"):
        (out / name).mkdir(parents=True)
    _break_jobs(monkeypatch, "raise SystemExit(2)")
    verify(make_plan("mae_cpu_minutes", recipe(), kills=1, saves=0, steps=8, ranks=1, out=out, seed=0))
    assert sorted(path.name for path in out.iterdir()) == ["my own run", "unbroken.log", "verify.json"]


def test_a_job_that_ends_before_it_is_killed_is_no_kill(tmp_path: Path) -> None:
    run = tmp_path / "a run: #1"
    with LaunchedJob(["recipes"], run=run, log=tmp_path / "log") as job:
        assert job.wait_while_it_moves(60.0) == 0
        assert _kill_at(job, 1, False, random.Random(0)) is None
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
        job.run, job.ranks = run, 2
        for number in range(4):  # whichever victim is drawn, none is left
            (run / "metrics.jsonl").write_text(f'{{"step": {number}}}\n', encoding="utf-8")
            assert _kill_at(job, 1, False, random.Random(number)) is None


def test_a_job_that_makes_no_step_is_waited_for_no_longer_than_patience_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_jobs(monkeypatch, "import time; time.sleep(60)")
    with LaunchedJob(["recipes"], run=tmp_path / "run", log=tmp_path / "log") as job:
        assert job.wait_while_it_moves(0.3) is None
        assert not job.wait_for_step(1, 0.1)
    assert job.launcher.poll() == -9
