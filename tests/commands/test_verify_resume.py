"""`foreseen verify-resume` passes what is sound and catches what is not."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foreseen.commands.launched import LaunchedJob
from foreseen.commands.verify_resume import Topology, Verdict, make_plan, verify
from foreseen.errors import BadInput

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

def lose_the_place_on_one_rank(module):
    real = module.BatchLayout.positions
    module.BatchLayout.positions = lambda self, step, rank, micro: real(self, step + (self.ranks == 1), rank, micro)

TARGETS = {
    "optimizer": ("foreseen.engine.checkpoint", lose_the_optimizer),
    "position": ("foreseen.data.batch", lose_the_place_on_one_rank),
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
    arguments = _plan(recipe, tmp_path / "verify", kills=1, saves=0, steps=16)
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


def test_the_plan_cuts_the_batch_in_two_ways(recipe: Recipe, tmp_path: Path) -> None:
    options = {"kills": 3, "saves": None, "steps": None, "ranks": 2, "out": tmp_path, "seed": 0}
    plan = make_plan("mae_cpu_minutes", recipe(), **options)  # type: ignore[arg-type]
    assert (plan.usual, plan.other) == (Topology(2, 2, 1), Topology(1, 4, 3))
    assert plan.arguments[0] == "pretrain"
    assert make_plan("cpu_minutes", [], **options).arguments[0] == "finetune"  # type: ignore[arg-type]
    for overrides, sentence in (
        (["batch.global_size=7"], "batch.global_size 7 is no multiple of 2 ranks"),
        (["batch.global_size=2"], None),
    ):
        if sentence is None:
            make_plan("mae_cpu_minutes", overrides, **options)  # type: ignore[arg-type]
            continue
        with pytest.raises(BadInput, match=sentence):
            make_plan("mae_cpu_minutes", overrides, **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="there is no recipe 'mea'"):
        make_plan("mea", [], **options)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="--saves is 4, more than the 3 of --kills"):
        make_plan("mae_cpu_minutes", [], **options | {"saves": 4})  # type: ignore[arg-type]


def test_a_job_that_cannot_run_at_all_is_a_failed_verdict_with_its_last_words(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = LaunchedJob.__enter__

    def in_a_broken_way(self: LaunchedJob) -> LaunchedJob:
        self.command = [sys.executable, "-c", "print('no shards here'); raise SystemExit(2)"]
        return start(self)

    monkeypatch.setattr(LaunchedJob, "__enter__", in_a_broken_way)
    plan = make_plan("mae_cpu_minutes", recipe(), kills=1, saves=0, steps=8, ranks=1, out=tmp_path / "out", seed=0)
    verdict: Verdict = verify(plan)
    assert not verdict.passed
    assert "ended with exit code 2: no shards here" in verdict.text()
