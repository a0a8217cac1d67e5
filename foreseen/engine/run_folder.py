"""The run folder: who holds it, and what made it.

config.yaml        the resolved config
environment.json   each start of the run: command, versions, machine
metrics.jsonl      the source of truth of every number
tensorboard/       the same numbers and pictures
checkpoints/       step-<n>/
ledger/            which samples each step consumed, with run.ledger
PREEMPTED          the run was told to stop before its end, and saved
encoder/           the hand-off
result.json        the scores of fine-tuning
report/            what a fine-tuned classifier gets wrong
tokenizer/         the tokenizer that was trained; or pixel clusters, fitted by a method that names no tokenizer
tokenizer_health.* how the tokenizer codes the pictures, numbers and a contact sheet, at the first start
"""

import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from foreseen.errors import BadInput
from foreseen.files import read_json, write_atomically
from foreseen.masked import masked_argument

PREEMPTED = "PREEMPTED"
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_PACKAGES = ("foreseen", "torch", "torchvision", "timm", "accelerate", "webdataset", "numpy", "pillow")


class RunLock:
    """Holds a run folder for one job; a second one is refused. The kernel frees it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, "a+", encoding="utf-8")
        except OSError as error:
            raise BadInput(f"run.dir {self._path.parent} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise BadInput(f"run.dir {self._path.parent} is in use by {holder}; wait for it or take another") from error
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()


def mark_preempted(folder: Path, step: int) -> None:
    """Say in the run folder that the run was told to stop and goes on from `step`: launchers hide the exit code."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    write_atomically(folder / PREEMPTED, json.dumps({"step": step, "time": now}) + "\n")


def clear_preempted(folder: Path) -> None:
    """Take the mark away; for a run that goes on."""
    (folder / PREEMPTED).unlink(missing_ok=True)


@contextmanager
def disk_trouble(folder: Path) -> Iterator[None]:
    """Turn a disk that is full, read-only or failing into a sentence.

    Raises:
        BadInput: something inside could not be written, or read, for want of a working disk.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        what, whose = f"run.dir {folder} cannot be written", "its checkpoints"
        if isinstance(error.filename, str) and not Path(error.filename).absolute().is_relative_to(folder.absolute()):
            what = f"{error.filename} cannot be read or written"  # such as the pictures
            whose = f"the checkpoints in run.dir {folder}"
        raise BadInput(
            f"{what}: {error.strerror}; {whose} are intact, and the same command goes on from the newest of them once "
            "the disk works"
        ) from error


def describe_start(devices: Mapping[str, Any]) -> dict[str, Any]:
    """What a later reader must know of this start to repeat it: command, versions, machine, date."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["foreseen", *map(masked_argument, sys.argv[1:])],
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "machine": {"system": platform.platform(), "cpu": _cpu_name(), "cores": os.cpu_count(), **devices},
    }


def record_start(folder: Path, start: Mapping[str, Any]) -> None:
    """Add a start to environment.json.

    Raises:
        BadInput: it holds something else.
    """
    path = folder / "environment.json"
    try:
        starts = list(read_json(path)["starts"]) if path.is_file() else []
    except (KeyError, TypeError):
        raise BadInput(f"{path} is not what was written: move it away") from None
    write_atomically(path, json.dumps({"starts": [*starts, start]}, indent=2) + "\n")


def cpu_info() -> str:
    """What Linux says of the first CPU; empty elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return ""


def _cpu_name() -> str:
    names = (line.partition(":")[2].strip() for line in cpu_info().splitlines() if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
