"""What launches a run on several devices and nodes: accelerate's configs, and the Slurm script, rehearsed."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from foreseen.commands.verbs import VERBS, load_recipe

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "configs/slurm/pretrain.sbatch"
# machines, and processes in all
LAYOUTS = {"one_gpu": (1, 1), "eight_gpus": (1, 8), "two_nodes": (2, 16), "two_cpu_processes": (1, 2)}
DEADLINE_S = 300


def test_every_accelerate_config_is_known_here() -> None:
    assert {path.stem for path in (ROOT / "configs/accelerate").iterdir()} == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_accelerate_reads_its_config_and_the_command_at_its_head(name: str) -> None:
    path = ROOT / f"configs/accelerate/{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.num_machines, config.num_processes) == LAYOUTS[name]
    assert config.distributed_type == ("NO" if name == "one_gpu" else "MULTI_GPU")
    assert config.mixed_precision == "no"  # precision is the recipe's
    command = re.search(r"#   (?:\w+=\w+ )?accelerate launch (.*)", path.read_text(encoding="utf-8"))
    assert command
    launch = launch_command_parser().parse_args(shlex.split(command[1]))
    assert launch.config_file == str(path.relative_to(ROOT))
    assert launch.module
    verb, recipe, *overrides = launch.training_script_args
    assert launch.training_script == "foreseen"
    load_recipe(next(known for known in VERBS if known == verb), recipe, overrides)
    assert (launch.main_process_ip is not None) == (launch.machine_rank is not None) == (config.num_machines > 1)


def test_the_slurm_script_is_valid_and_its_example_too() -> None:
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    text = SBATCH.read_text(encoding="utf-8")
    example = re.search(r"#   sbatch configs/slurm/pretrain.sbatch (.*)", text)
    assert example
    recipe, *overrides = shlex.split(example[1])
    load_recipe("pretrain", recipe, overrides)
    launched = re.search(r"exec accelerate launch (.*?)'", text, flags=re.DOTALL)
    assert launched
    words = shlex.split(launched[1].replace("\\\n", " "))
    words = [re.sub(r"^\$.*", "1", word) if word != "$@" else recipe for word in words]
    launch = launch_command_parser().parse_args(words)
    assert (launch.training_script, launch.training_script_args) == ("foreseen", ["pretrain", recipe])
    assert (launch.module, launch.multi_gpu) == (True, True)


SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf '127.0.0.1\\nlocalhost\\n' ;;
    requeue) echo "$2" >> requeued ;;
esac
"""
JOB = str(20000 + os.getpid())
Submit = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def submit(tmp_path: Path) -> Submit:
    """What `sbatch` does, with stand-ins for Slurm's commands and two nodes of one CPU rank each on this machine."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def sbatch(*arguments: str, srun: str) -> subprocess.Popen[str]:
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (commands / name).write_text(text, encoding="utf-8")
            (commands / name).chmod(0o755)
        environment = {
            **os.environ,
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
            "SLURM_JOB_ID": JOB, "SLURM_JOB_NODELIST": "here[1-2]", "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(SBATCH), *arguments],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return sbatch


@pytest.mark.parametrize(
    ("then", "code", "requeued"),
    [
        ("sleep 60 & kill -USR1 $PPID; wait; exit 1", 0, True),  # ranks saved and left
        ("sleep 60 & kill -USR1 $PPID; wait; exit 0", 0, False),  # the run was done just then
        ("exit 3", 3, False),
        ("exit 0", 0, False),
    ],
)
def test_the_slurm_script_requeues_what_ran_out_of_time_and_nothing_else(
    submit: Submit, tmp_path: Path, then: str, code: int, requeued: bool
) -> None:
    # The sleep ends with the signal that the script hands back to srun.
    srun = f'#!/usr/bin/env bash\ntrap \'kill $!\' USR1\necho $# "$MAIN_NODE" "$@"\nsleep 0.3\n{then}\n'
    job = submit("mae_vit_b16", "run.dir=a folder", srun=srun)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == code, output
    assert "8 127.0.0.1 --cpus-per-task=1" in output  # a word with a space stays one
    assert output.rstrip().endswith("launch mae_vit_b16 run.dir=a folder")
    asked = (tmp_path / "requeued").read_text(encoding="utf-8").split() if (tmp_path / "requeued").exists() else []
    assert asked == [JOB] * requeued


# Runs the command once for each node, in a session of its own, and hands USR1 to every process of every node, as
# Slurm does with a job step.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys

command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tag = f"STAND_IN_STEP={{os.getpid()}}"

def hand_on(number, frame):
    for process in pathlib.Path("/proc").iterdir():
        try:
            if process.name.isdigit() and tag.encode() in (process / "environ").read_bytes():
                os.kill(int(process.name), number)
        except OSError:
            continue

signal.signal(signal.SIGUSR1, hand_on)
nodes = []
for node in range(int(os.environ["SLURM_NNODES"])):
    environment = os.environ | dict([tag.split("=")]) | {{"SLURM_NODEID": str(node)}}
    nodes.append(subprocess.Popen(command, env=environment, start_new_session=True))
sys.exit(max(abs(node.wait()) for node in nodes))
"""


@pytest.mark.slow
def test_a_slurm_job_that_runs_out_of_time_saves_on_both_nodes_and_goes_on(
    submit: Submit, recipe: Callable[..., list[str]], tmp_path: Path
) -> None:
    overrides = recipe(
        run__steps=400, run__save_every=400, run__log_every=5, optim__warmup_steps=20, batch__global_size=8,
        data__workers=1,
    )  # fmt: skip
    job = submit("mae_cpu_minutes", *overrides, srun=SRUN)
    metrics = tmp_path / "run/metrics.jsonl"
    began = time.monotonic()
    while not metrics.is_file() or len(metrics.read_text(encoding="utf-8").splitlines()) < 3:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() - began < DEADLINE_S
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    assert "told to stop" in output
    assert "exited unexpectedly" not in output
    assert (tmp_path / "requeued").read_text(encoding="utf-8").split() == [JOB]
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    assert 0 < int(saved.name.removeprefix("step-")) < 400

    job = submit("mae_cpu_minutes", *overrides, srun=SRUN)
    output, _ = job.communicate(timeout=DEADLINE_S)
    assert job.returncode == 0, output
    assert "going on from step" in output
    assert (tmp_path / "requeued").read_text(encoding="utf-8").split() == [JOB]
    assert (tmp_path / "run/encoder/model.safetensors").is_file()
    starts = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["starts"]
    assert [start["machine"]["ranks"] for start in starts] == [2, 2]
