"""The main job as it is launched: two gloo processes, killed or told to stop at an observed step, and started again."""

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from foreseen.commands.launched import LaunchedJob, last_step, metrics

pytestmark = pytest.mark.slow

Recipe = Callable[..., list[str]]
DEADLINE_S = 300


@contextmanager
def launched(overrides: list[str], ranks: int) -> Iterator[LaunchedJob]:
    folder = Path(next(o.removeprefix("run.dir=") for o in reversed(overrides) if o.startswith("run.dir=")))
    log = folder.with_name(f"{folder.name}.log")
    with LaunchedJob(["pretrain", "mae_cpu_minutes", *overrides], run=folder, log=log, ranks=ranks) as job:
        yield job


def finish(overrides: list[str], ranks: int) -> str:
    with launched(overrides, ranks) as job:
        assert job.wait(DEADLINE_S) == 0, job.output()
        assert not job.survivors()
        return job.output()


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(folder)}


def weights(folder: Path) -> bytes:
    return (folder / "checkpoints/step-200/model.safetensors").read_bytes()


LONG = {
    "run__steps": 200, "run__save_every": 100, "run__log_every": 5, "optim__warmup_steps": 20,
    "batch__global_size": 32, "batch__micro_size": 2, "data__workers": 1,
}  # fmt: skip


def test_two_hundred_steps_on_two_ranks_survive_kills_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    common = {**LONG, "run__save_every": 20, "batch__global_size": 8}
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    finish(recipe(**common, run__dir=unbroken), ranks=2)
    starts = json.loads((unbroken / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert starts[0]["machine"]["ranks"] == 2  # not one process in disguise

    for step in (45, 130):
        with launched(recipe(**common, run__dir=killed), ranks=2) as job:
            assert job.wait_for_step(step, DEADLINE_S), job.output()
            assert len(job.processes()) > len(job.rank_processes()) + 1 == 3  # workers; the launcher and two ranks
            job.kill()
            assert not job.survivors()
    assert last_step(killed) < 200
    assert "going on from step" in finish(recipe(**common, run__dir=killed), ranks=2)
    assert losses(killed) == losses(unbroken)
    assert weights(killed) == weights(unbroken)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_term_signal_to_the_group_saves_everywhere_and_the_run_goes_on(
    recipe: Recipe, tmp_path: Path, ranks: int
) -> None:
    folder = tmp_path / "run"
    with launched(recipe(**LONG, run__dir=folder), ranks=ranks) as job:
        assert job.wait_for_step(10, DEADLINE_S), job.output()
        if ranks == 1:
            for process in job.processes():  # workers too, as schedulers do
                process.send_signal(signal.SIGTERM)
        else:
            job.launcher.send_signal(signal.SIGTERM)  # the launcher passes it on to the group of each rank
        code = job.wait(DEADLINE_S)
        output = job.output()
        assert not job.survivors()
    assert code == (85 if ranks == 1 else 1), output
    assert "told to stop" in output
    assert "exited unexpectedly" not in output
    assert json.loads((folder / "PREEMPTED").read_text(encoding="utf-8"))["step"] >= 10
    assert "going on from step" in finish(recipe(**LONG, run__dir=folder), ranks=1)
    assert not (folder / "PREEMPTED").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_alone_saves_on_both(recipe: Recipe, tmp_path: Path, number: signal.Signals) -> None:
    folder = tmp_path / "run"
    with launched(recipe(**LONG, run__dir=folder), ranks=2) as job:
        assert job.wait_for_step(10, DEADLINE_S), job.output()
        job.signal_one(number, random.Random(0))
        code = job.wait(DEADLINE_S)
        output = job.output()
        assert not job.survivors()
    assert code == 1, output
    assert output.count("exitcode  : 85") == 2 or "exitcode: 85" in output  # what the launcher says of its ranks
    step = json.loads((folder / "PREEMPTED").read_text(encoding="utf-8"))["step"]
    assert (folder / f"checkpoints/step-{step}").is_dir()


def test_no_process_survives_a_launcher_that_was_killed(recipe: Recipe, tmp_path: Path) -> None:
    with launched(recipe(**LONG, run__dir=tmp_path / "run"), ranks=2) as job:
        assert job.wait_for_step(5, DEADLINE_S), job.output()
        assert len(job.rank_processes()) == 2
        job.kill_launcher()
        assert not job.survivors()


def test_torchrun_starts_a_job_again_whose_rank_was_killed(recipe: Recipe, tmp_path: Path) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    common = {**LONG, "run__save_every": 20, "batch__global_size": 8}
    finish(recipe(**common, run__dir=unbroken), ranks=2)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    arguments = ["pretrain", "mae_cpu_minutes", *recipe(**common, run__dir=killed)]
    # Else the ranks of a second attempt find the addresses of the first in the store that they share with the launcher.
    fresh_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    job = LaunchedJob(arguments, run=killed, log=tmp_path / "killed.log", ranks=2, environment=fresh_store)
    job.command = [sys.executable, *torchrun, "-m", "foreseen", *arguments]
    with job:
        assert job.wait_for_step(45, DEADLINE_S), job.output()
        job.kill_one_rank(random.Random(0))
        assert job.wait(DEADLINE_S) == 0, job.output()
        assert not job.survivors()
        assert "going on from step 40" in job.output()
    assert losses(killed) == losses(unbroken)
    assert weights(killed) == weights(unbroken)


def test_a_second_process_on_the_same_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    common = {**LONG, "run__steps": 2000, "run__save_every": 1000, "batch__global_size": 8}
    arguments = recipe(**common, run__dir=tmp_path / "run")
    with launched(arguments, ranks=1) as first:
        assert first.wait_for_step(5, DEADLINE_S), first.output()
        second = subprocess.run(
            [sys.executable, "-m", "foreseen", "pretrain", "mae_cpu_minutes", *arguments],
            env=os.environ | {"ACCELERATE_USE_CPU": "true"},
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
    assert second.returncode == 2
    assert "is in use by process" in second.stderr
    assert "Traceback" not in second.stderr
