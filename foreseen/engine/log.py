"""What a run tells: metrics.jsonl, TensorBoard, and a progress line. Only rank 0 speaks.

Numbers are summed on the device and fetched when they are logged, so no step waits for the device. A line covers the
steps since the line before; every checkpoint writes one, hence a resumed run writes the lines that the unbroken run
would have written.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torchvision.utils import make_grid

from foreseen.engine.objective import all_reduce_sum
from foreseen.files import parse_json, write_atomically
from foreseen.printable import printable


class Meter:
    """Sums of scalars over steps, on the device."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new interval."""
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self.samples = 0
        self.waited_s = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is no training time."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def add(self, values: dict[str, Tensor], *, samples: int, waited_s: float) -> None:
        """Take in the scalars of one step."""
        for name, value in values.items():
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._steps += 1
        self.samples += samples
        self.waited_s += waited_s

    def means(self, ranks: int) -> dict[str, float]:
        """The mean of each scalar over the interval's steps and over all ranks; waits for the device."""
        if not self._sums:
            return {}
        stacked = all_reduce_sum(torch.stack([value.to(torch.float64) for value in self._sums.values()]))
        return dict(zip(self._sums, (stacked / (self._steps * ranks)).tolist(), strict=True))

    @property
    def elapsed_s(self) -> float:
        """Seconds since the interval began."""
        return time.perf_counter() - self._started


class RunLog:
    """Writes a run's numbers and pictures, and shows where it stands.

    Args:
        folder: the run folder.
        total_steps: length of the run.
        start_step: updates already made; lines past them, of a run that was killed, are dropped.
        speaks: False on every rank but 0, where nothing is written.
    """

    def __init__(self, folder: Path, total_steps: int, start_step: int, *, speaks: bool) -> None:
        self._speaks = speaks
        self._total = total_steps
        if not speaks:
            return
        self._folder = folder
        self._open(start_step)
        self._bar = _bar(total_steps, start_step) if sys.stdout.isatty() else None

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only rank 0 needs it

        path, events = self._folder / "metrics.jsonl", str(self._folder / "tensorboard")
        _drop_lines_after(path, start_step or -1)
        self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (held until close)
        self._writer = SummaryWriter(events, purge_step=start_step + 1 if start_step else None)

    def go_back(self, step: int) -> None:
        """Drop the numbers of the steps past `step` updates, as a start from there would."""
        if self._speaks:
            self._file.close()
            self._writer.close()
            self._open(step)

    def scalars(self, step: int, values: dict[str, float], *, line: str | None = None) -> None:
        """Log numbers of a step (updates made); `line` is what a person reads."""
        if not self._speaks:
            return
        record: dict[str, Any] = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if line is not None:
            self.say(line)

    def pictures(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Log pictures, each [N, 3, H, W] uint8, on one sheet that is about square."""
        if self._speaks:
            for name, images in pictures.items():
                count, _, height, width = images.shape
                columns = max(1, round(math.sqrt(count * height / width)))
                self._writer.add_image(name, make_grid(images.cpu(), nrow=columns), step)

    def say(self, text: str) -> None:
        """Tell a person; names in the text may be anybody's."""
        if self._speaks:
            text = printable(text, keep="\n")
            if self._bar is not None:
                self._bar.console.print(text, highlight=False, markup=False)
            else:
                print(text, flush=True)

    def advance(self, step: int) -> None:
        """Move the bar, where there is a terminal."""
        if self._speaks and self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step)

    def close(self) -> None:
        """Flush everything."""
        if self._speaks:
            self._file.close()
            self._writer.close()
            if self._bar is not None:
                self._bar.stop()


def duration(seconds: float) -> str:
    """A time for people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _bar(total_steps: int, start_step: int) -> Progress:
    bar = Progress(
        TextColumn("step"),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(),
        transient=True,
    )
    bar.add_task("train", total=total_steps, completed=start_step)
    bar.start()
    return bar


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if parse_json(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue  # the line that a kill cut short
    write_atomically(path, "".join(f"{line}\n" for line in kept))
