"""Jobs as a user launches them: started through accelerate, watched, killed, and found again with all their processes.

A launcher starts each rank in a session of its own, and ranks take their loader workers from fork servers, so neither
process groups nor parents tell who belongs to a job. An entry in the environment, which all of them inherit, does.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

_TAG = "FORESEEN_LAUNCHED_JOB"
_LOOK_EVERY_S = 0.002
_GONE_WITHIN_S = 60.0


class LaunchedJob:
    """One start of a `foreseen` command on some ranks; entered, it runs, and left, no process of it is alive.

    Args:
        arguments: of `foreseen`.
        run: the run folder that they name, where progress is seen.
        log: file that its output is added to.
        ranks: processes; one is started without a launcher.
        on_cpu: keep to the CPU even where there are GPUs.
        environment: entries that the processes get besides.

    Attributes:
        command: what is run, words of a command line.
        launcher: the process that was started: the launcher of several ranks, or the one rank itself.
    """

    def __init__(
        self, arguments: Sequence[str], *, run: Path, log: Path, ranks: int = 1, on_cpu: bool = True,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.run, self.log, self.ranks = run, log, ranks
        self._id = uuid.uuid4().hex
        # Nothing of a config of accelerate's own, which may be meant for several machines.
        launch = [
            "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks), "--num_machines", "1",
            "--machine_rank", "0", "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no",
        ]  # fmt: skip
        launcher = launch if ranks > 1 else []
        self.command = [sys.executable, *launcher, "-m", "foreseen", *arguments]
        self._environment = os.environ | (environment or {}) | {_TAG: self._id}
        if on_cpu:
            self._environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
            # All ranks of all topologies with as many threads: the order of sums within a product depends on them.
            self._environment.setdefault("OMP_NUM_THREADS", "1")

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._began = self.log.stat().st_size if self.log.is_file() else 0
        with open(self.log, "ab") as out:
            self.launcher = subprocess.Popen(
                self.command, env=self._environment, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def processes(self) -> list[psutil.Process]:
        """Launcher, ranks, fork servers and loader workers that are alive."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(_TAG) == self._id:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def rank_processes(self) -> list[psutil.Process]:
        """The ranks alone: processes of the job whose command is `foreseen`'s own."""
        launcher = self.launcher.pid
        ranks = []
        for process in self.processes():
            try:
                parent, words = process.ppid(), process.cmdline()
            except psutil.Error:
                continue
            if "foreseen" in words and (process.pid == launcher if self.ranks == 1 else parent == launcher):
                ranks.append(process)
        return ranks

    def signal_one(self, number: signal.Signals, choose: random.Random) -> None:
        """Send a signal to one rank; none is sent where all have ended."""
        if ranks := sorted(self.rank_processes(), key=lambda process: process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                choose.choice(ranks).send_signal(number)

    def kill(self, known: Sequence[psutil.Process] = ()) -> None:
        """SIGKILL every process at once, as a machine that loses power does, and wait until they are gone.

        Args:
            known: of `processes` a while ago, to be killed first: to find them takes longer than a short save.
        """
        while alive := known or self.processes():
            known = ()
            for process in alive:
                try:
                    process.kill()
                except psutil.Error:
                    continue
            # Not for the launcher: psutil would take its exit code away from us.
            psutil.wait_procs([process for process in alive if process.pid != self.launcher.pid], timeout=1)
        self.launcher.wait()

    def kill_launcher(self) -> None:
        """SIGKILL the launcher alone: its ranks and their workers must notice."""
        self.launcher.kill()
        self.launcher.wait()

    def kill_one_rank(self, choose: random.Random) -> None:
        """SIGKILL one rank, as the system does when memory runs out: the launcher must end the others."""
        self.signal_one(signal.SIGKILL, choose)

    def survivors(self) -> list[psutil.Process]:
        """Processes that are still alive a minute after they should have gone; none when all is well."""
        began = time.monotonic()
        while (alive := self.processes()) and time.monotonic() - began < _GONE_WITHIN_S:
            time.sleep(0.05)
        if not alive:
            self.launcher.wait()
        return alive

    def wait(self, timeout_s: float) -> int:
        """The exit code of the launcher, at its end."""
        return self.launcher.wait(timeout_s)

    def wait_while_it_moves(self, patience_s: float) -> int | None:
        """The exit code of the launcher, at its end; None if no step is logged for so long."""
        self._wait(lambda: False, patience_s, look_every_s=0.1)
        return self.launcher.poll()

    def wait_for_step(self, step: int, patience_s: float) -> bool:
        """Wait until `step` updates are logged; False if the job ends before, or logs no step for so long."""
        return self._wait(lambda: last_step(self.run) >= step, patience_s)

    def wait_for_save(self, patience_s: float) -> bool:
        """Wait until a checkpoint is being written; False if the job ends before, or logs no step for so long."""
        folder = self.run / "checkpoints"
        return self._wait(lambda: any(name.startswith(".tmp-") for name in _names(folder)), patience_s)

    def _wait(
        self, happened: Callable[[], bool], patience_s: float, *, look_every_s: float = _LOOK_EVERY_S
    ) -> bool:  # fmt: skip
        seen, since = last_step(self.run), time.monotonic()
        while not happened():
            step, now = last_step(self.run), time.monotonic()
            if step != seen:
                seen, since = step, now
            if self.launcher.poll() is not None or now - since > patience_s:
                return False
            time.sleep(look_every_s)
        return True

    def output(self) -> str:
        """What this start has printed."""
        with open(self.log, "rb") as out:
            out.seek(self._began)
            return out.read().decode("utf-8", "replace")


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path) -> int:
    """Updates that the newest line of metrics.jsonl tells of; 0 where there is none."""
    try:
        with open(run / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
            lines = file.read().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    for line in reversed([line for line in lines if line.endswith(b"\n")]):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError):  # the first line read may be cut
            continue
    return 0


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []
