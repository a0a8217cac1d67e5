"""The ledger: which sample every step really consumed and, if asked for, a checksum of the pixels made of it.

`ledger/samples.npy` and `ledger/pixels.npy` in the run folder have a row a step and a column a place in the global
batch. A row is written at its place, so what a killed run had written is written over with the same when the run goes
on. The files are sparse until a step is reached: 0 means not reached, and numbers are stored plus one. Ranks hand their
rows to rank 0 when the loop logs; no step waits.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from foreseen.data.arrays import map_table
from foreseen.data.batch import Batch, BatchLayout
from foreseen.errors import BadInput

FOLDER = "ledger"
SAMPLES, PIXELS = "samples", "pixels"


class Ledger:
    """Keeps the books of one run.

    Args:
        run: the run folder.
        layout: of the batches; the same global batch gives the same columns for any ranks and micro-batches.
        total_steps: rows.
        accelerator: of the job; rank 0 writes.
        pixels: whether the batches carry checksums to be kept, too.
    """

    def __init__(
        self, run: Path, layout: BatchLayout, total_steps: int, accelerator: Accelerator, *, pixels: bool
    ) -> None:  # fmt: skip
        self._shape = (total_steps, layout.global_size)
        self._accelerator = accelerator
        self._kinds = (SAMPLES, PIXELS) if pixels else (SAMPLES,)
        self._rows: dict[str, list[NDArray[np.int64]]] = {kind: [] for kind in self._kinds}
        self._files = {kind: _NpyRows(run / FOLDER / f"{kind}.npy", self._shape) for kind in self._kinds}

    def add(self, micro_batches: Sequence[Batch]) -> None:
        """Note what this rank's micro-batches of one step hold, as they came from the loader."""
        for kind in self._kinds:
            rows = [batch.sample if kind == SAMPLES else batch.checksum for batch in micro_batches]
            self._rows[kind].append(np.concatenate([row.numpy() for row in rows if row is not None]))

    def write(self, step: int) -> None:
        """Write the rows of the steps since the last call; `step` updates are made. Every rank must call it."""
        for kind, rows in self._rows.items():
            if not rows:
                continue
            mine = torch.from_numpy(np.stack(rows)).to(self._accelerator.device)  # [steps, share of the global batch]
            every = self._accelerator.gather(mine[None])  # [ranks, steps, share]; ranks are consecutive slices
            rows.clear()
            if self._accelerator.is_main_process:
                table = every.transpose(0, 1).flatten(1).cpu().numpy()
                self._files[kind].write(step - len(table), table + 1)

    def forget(self, first: int, last: int) -> None:
        """Take back the rows of the steps [first, last), of a run that went back and reads other samples for them."""
        if self._accelerator.is_main_process:
            for file in self._files.values():
                file.write(first, np.zeros((last - first, self._shape[1]), dtype=np.int64))


def read_ledger(run: Path, kind: str = SAMPLES) -> NDArray[np.int64]:
    """What a run consumed: [steps, global batch], -1 where it has not been yet.

    Args:
        run: the run folder.
        kind: "samples" for sample numbers, "pixels" for checksums.

    Raises:
        BadInput: the run keeps no ledger of that kind.
    """
    file = run / FOLDER / f"{kind}.npy"
    if not file.is_file():
        wanted = "true" if kind == SAMPLES else "pixels"
        raise BadInput(f"there is no {file}: a run keeps it with run.ledger={wanted}")
    numbers: NDArray[np.int64] = map_table(file, np.dtype("<u8")).astype(np.int64) - 1
    return numbers


class _NpyRows:
    """An .npy of uint64 rows that are written one by one; a plain write, since a mapped one dies on a full disk."""

    def __init__(self, file: Path, shape: tuple[int, int]) -> None:
        self._file, self._shape = file, shape
        self._start = 0

    def write(self, row: int, rows: NDArray[Any]) -> None:
        if not self._start:
            self._start = self._begin()
        left, place = memoryview(rows.astype("<u8").tobytes()), self._start + row * self._shape[1] * 8
        with open(self._file, "r+b", buffering=0) as out:
            while left:  # a disk that fills up takes a part, and only the next write fails
                written = os.pwrite(out.fileno(), left, place)
                left, place = left[written:], place + written

    def _begin(self) -> int:
        """Where the rows begin in the file, which is made, all zeros, unless it is there and has this shape."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        size = self._shape[0] * self._shape[1] * 8
        try:
            if map_table(self._file, np.dtype("<u8")).shape == self._shape:
                return self._file.stat().st_size - size
        except BadInput:
            pass
        with open(self._file, "wb") as new:
            np.lib.format.write_array_header_1_0(new, {"descr": "<u8", "fortran_order": False, "shape": self._shape})
            start = new.tell()
            new.truncate(start + size)
        return start
