"""The main job as it is launched: two gloo processes, killed at an observed step, and started again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Recipe = Callable[..., list[str]]
DEADLINE_S = 300
TAG = "FORESEEN_TEST_RUN"  # in the environment of every process of a job, loader workers included


def _launch(overrides: list[str], ranks: int) -> subprocess.Popen[str]:
    """`accelerate launch` in a session of its own, so that nothing outlives the test."""
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
    port = ["--main_process_port", "0"]
    command = [sys.executable, *(launcher + port if ranks > 1 else []), "-m", "foreseen"]
    return subprocess.Popen(
        [*command, "pretrain", "mae_cpu_minutes", *overrides],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", TAG: _run_dir(overrides)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _run_dir(overrides: list[str]) -> str:
    return next(o.removeprefix("run.dir=") for o in reversed(overrides) if o.startswith("run.dir="))


def _finish(job: subprocess.Popen[str]) -> str:
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    return output


def _members(folder: Path, entry: str = "environ") -> list[int]:
    """Processes of the job of a run folder; with "cmdline" only the launcher and the ranks."""
    found = []
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and str(folder).encode() in (process / entry).read_bytes():
                found.append(int(process.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


def _wait_for_step(folder: Path, step: int, job: subprocess.Popen[str]) -> None:
    began = time.monotonic()
    while time.monotonic() - began < DEADLINE_S:
        lines = (
            (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            if (folder / "metrics.jsonl").is_file()
            else []
        )
        if any(json.loads(line)["step"] >= step for line in lines if line.endswith("}")):
            return
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.05)
    raise AssertionError(f"no step {step} within {DEADLINE_S} s")


def _wait_until_gone(folder: Path) -> None:
    """No loader worker outlives its ranks."""
    began = time.monotonic()
    while _members(folder):
        assert time.monotonic() - began < 60, _members(folder)
        time.sleep(0.2)


def _losses(folder: Path) -> dict[int, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def _weights(folder: Path) -> bytes:
    return (folder / "checkpoints/step-200/model.safetensors").read_bytes()


def test_two_hundred_steps_on_two_ranks_survive_kills_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    common = {
        "run__steps": 200, "run__save_every": 20, "run__log_every": 5, "optim__warmup_steps": 20,
        "batch__global_size": 8, "batch__micro_size": 2, "data__workers": 1,
    }  # fmt: skip
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    _finish(_launch(recipe(**common, run__dir=unbroken), ranks=2))
    starts = json.loads((unbroken / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert starts[0]["machine"]["ranks"] == 2  # not one process in disguise

    for step in (45, 130):
        job = _launch(recipe(**common, run__dir=killed), ranks=2)
        _wait_for_step(killed, step, job)
        assert len(_members(killed)) > len(_members(killed, "cmdline")) >= 3  # workers; the launcher and two ranks
        for pid in _members(killed, "cmdline"):
            os.kill(pid, signal.SIGKILL)
        job.communicate(timeout=DEADLINE_S)
        _wait_until_gone(killed)
    assert max(_losses(killed)) < 200
    output = _finish(_launch(recipe(**common, run__dir=killed), ranks=2))
    assert "going on from step" in output
    assert _losses(killed) == _losses(unbroken)
    assert _weights(killed) == _weights(unbroken)
    _wait_until_gone(killed)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_term_signal_to_the_group_saves_everywhere_and_the_run_goes_on(
    recipe: Recipe, tmp_path: Path, ranks: int
) -> None:
    common = {
        "run__steps": 200, "run__save_every": 100, "run__log_every": 5, "optim__warmup_steps": 20,
        "batch__global_size": 32, "batch__micro_size": 2, "data__workers": 1,
    }  # fmt: skip
    folder = tmp_path / "run"
    job = _launch(recipe(**common, run__dir=folder), ranks=ranks)
    _wait_for_step(folder, 10, job)
    if ranks == 1:
        os.killpg(job.pid, signal.SIGTERM)  # workers too, as schedulers do
    else:
        job.send_signal(signal.SIGTERM)  # the launcher passes it on to the group of each rank
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == (85 if ranks == 1 else 1), output
    assert "told to stop" in output
    assert "exited unexpectedly" not in output
    assert "going on from step" in _finish(_launch(recipe(**common, run__dir=folder), ranks=1))


def test_a_second_process_on_the_same_folder_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    common = {
        "run__steps": 2000, "run__save_every": 1000, "run__log_every": 5, "optim__warmup_steps": 20,
        "batch__global_size": 8,
    }  # fmt: skip
    folder = tmp_path / "run"
    first = _launch(recipe(**common, run__dir=folder), ranks=1)
    _wait_for_step(folder, 5, first)
    second = _launch(recipe(**common, run__dir=folder), ranks=1)
    output, _ = second.communicate(timeout=DEADLINE_S)
    assert second.returncode == 2
    assert "is in use by process" in output
    assert "Traceback" not in output
    first.kill()
    first.communicate()
