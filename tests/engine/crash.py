"""A run of MeanColour that SIGKILLs itself at a named moment of its n-th save; `-m tests.engine.crash ...`."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from foreseen.engine import checkpoint
from foreseen.engine.checkpoint import Checkpoints
from tests.engine.test_train import configure, run

MOMENTS = ("writing", "written", "before the rename", "after the rename", "in retention", "before the best is marked")


def main(shards: Path, folder: Path, moment: str, save: int) -> None:
    torch.set_num_threads(1)
    count = 0

    def die_when(armed: Callable[[], bool], real: Callable[..., Any], *, after: bool = False) -> Callable[..., Any]:
        def patched(*args: Any, **more: Any) -> Any:
            if armed() and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **more)
            if armed() and after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return patched

    save_checkpoint = Checkpoints.save

    def counted(self: Checkpoints, *args: Any, **more: Any) -> None:
        nonlocal count
        count += 1
        save_checkpoint(self, *args, **more)

    Checkpoints.save = counted  # type: ignore[method-assign]

    def now() -> bool:
        return count == save

    if moment == "writing":  # half of the tensors are there
        real = checkpoint.save_file

        def half(tensors: Any, file: Path) -> None:
            real(tensors, file)
            if now():
                os.truncate(file, file.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.save_file = half
    elif moment == "written":
        checkpoint.sync = die_when(now, checkpoint.sync)
    elif moment in ("before the rename", "after the rename"):
        os.rename = die_when(now, os.rename, after=moment == "after the rename")
    elif moment == "in retention":
        shutil.rmtree = die_when(now, shutil.rmtree)
    elif moment == "before the best is marked":
        Checkpoints.mark_best = die_when(now, Checkpoints.mark_best)  # type: ignore[method-assign]
    run(shards, configure(folder, **LENGTH), validate=True)


LENGTH = {"run__steps": 12, "run__save_every": 3, "run__keep_last": 1}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
