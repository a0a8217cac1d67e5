"""Patch features of pictures from a frozen encoder, in a file: those of a set rarely fit into memory.

Letters: N pictures asked for, M of them readable, L patches, D features.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import nn

from foreseen.config import Compute
from foreseen.data.batch import Problem
from foreseen.data.loader import BatchBuilder, SweepDataset, load
from foreseen.data.views import finish
from foreseen.engine.attentive_probe import Patches
from foreseen.engine.extract import Samples, evaluating
from foreseen.engine.launch import autocast, image_dtype
from foreseen.errors import BadInput
from foreseen.models.features import features_of

_STORED = np.dtype(np.float16)  # a thousandth of a feature is lost, and half of the disk is saved


@dataclass(frozen=True)
class PatchFile:
    """Patch features in a file.

    Attributes:
        features: [M, L, D] float16, mapped.
        samples: the number of each picture in its set, rising, [M].
        problems: what could not be read, and why.
    """

    features: NDArray[np.float16]
    samples: Samples
    problems: tuple[Problem, ...]

    def labelled(self, chosen: Samples, labels: NDArray[np.integer]) -> Patches:
        """The features of some samples, as far as they could be read, in memory-mapped rows, with their labels.

        Args:
            chosen: sample numbers.
            labels: of the whole set, by sample number.
        """
        rows = np.flatnonzero(np.isin(self.samples, chosen))
        known = torch.from_numpy(labels[self.samples[rows]].astype(np.int64))
        return Patches(_Rows(self.features, rows), known)


class _Rows:
    """Some rows of an array, of which those asked for are read when they are."""

    def __init__(self, array: NDArray[np.float16], rows: NDArray[np.intp]) -> None:
        self._array, self._rows = array, rows
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> NDArray[np.float16]:
        found: NDArray[np.float16] = self._array[self._rows[rows]]
        return found


def extract_patches(
    model: nn.Module, builder: BatchBuilder, samples: Samples, accelerator: Accelerator, compute: Compute, file: Path,
    *, batch_size: int, workers: int,
) -> PatchFile:  # fmt: skip
    """Run a model over samples in evaluation mode and write what its patches are.

    Args:
        model: a timm model on the accelerator's device.
        builder: of a request with one view.
        samples: numbers in the set, rising, without a repetition, [N].
        accelerator: of one process.
        compute: the config's section, for the precision.
        file: an .npy to write.
        batch_size: pictures a forward.
        workers: loader processes.

    Raises:
        BadInput: the disk has no room for them, or they are too large for half precision.
    """
    device, dtype, (view,) = accelerator.device, image_dtype(compute), builder.request.views

    def patches(images: torch.Tensor) -> torch.Tensor:
        with autocast(accelerator, compute):
            return features_of(model, images, ("patches",))["patches"].flatten(1, 2)

    kept: list[int] = []
    problems: list[Problem] = []
    with evaluating(model), torch.no_grad():
        _, length, size = patches(torch.zeros(1, 3, *view.size, dtype=dtype, device=device)).shape
        _check_room(file, len(samples) * length * size * _STORED.itemsize, len(samples), (length, size))
        table = np.lib.format.open_memmap(file, "w+", _STORED, (len(samples), length, size))
        sweep = SweepDataset(builder, batch_size, subset=samples)
        for batch in load(sweep, range(len(sweep)), workers=workers, pin_memory=device.type == "cuda"):
            problems.extend(problem for problem in batch.problems if problem.sample == problem.position)
            readable = batch.sample == batch.position  # a substitute stands for another picture
            found = patches(finish(batch, builder.request, device, dtype).images[view.name])
            stored = found.cpu()[readable].to(torch.float16).numpy()
            if not np.isfinite(stored).all():
                raise BadInput(
                    f"patch features reach {float(found.abs().max()):.3g}, and half precision, in which they are kept, "
                    "65,504: the attentive probe cannot judge this encoder, leave out --attentive"
                )
            table[len(kept) : len(kept) + len(stored)] = stored
            kept.extend(batch.position[readable].tolist())
    return PatchFile(table[: len(kept)], np.array(kept, dtype=np.int64), tuple(problems))


def _check_room(file: Path, needed: int, pictures: int, shape: tuple[int, int]) -> None:
    free = shutil.disk_usage(file.parent).free
    if needed > free:
        raise BadInput(
            f"the patches of {pictures:,} pictures, {shape[0]} × {shape[1]} numbers of 2 bytes each, take "
            f"{needed / 1e9:.1f} GB, and {file.parent} has {free / 1e9:.1f} GB free: set TMPDIR to a larger disk, give "
            "--shots, or leave out --attentive"
        )
