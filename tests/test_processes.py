"""No rank outlives its launcher, whatever stands between the two."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

RANK = """
import time
from foreseen.processes import exit_with_the_launcher
exit_with_the_launcher()
exit_with_the_launcher()  # as a second session in the process does
print("watching", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("between", [[], ["sh", "-c", '"$@"; true', "sh"]], ids=["nothing", "a script"])
@pytest.mark.parametrize("name", ["torchrun", "program.py"])
def test_a_rank_ends_with_its_launcher_and_with_no_other_parent(tmp_path: Path, name: str, between: list[str]) -> None:
    launcher = tmp_path / name
    launcher.write_text("import subprocess, sys; subprocess.run(sys.argv[1:])", encoding="utf-8")
    command = [sys.executable, str(launcher), *between, sys.executable, "-c", RANK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "watching\n"
        below = psutil.Process(started.pid).children(recursive=True)
        rank = next(process for process in below if RANK in process.cmdline() and "sh" not in process.cmdline())
        try:
            started.kill()
            ended, _ = psutil.wait_procs([rank], timeout=20 if name == "torchrun" else 2)
            assert bool(ended) == (name == "torchrun")
        finally:
            for process in below:
                if process.is_running():
                    process.kill()
