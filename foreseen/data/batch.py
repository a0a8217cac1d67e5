"""What travels from a worker to the objective, and which positions of the stream a rank's micro-batch holds."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreseen.errors import BadInput


class Problem(NamedTuple):
    """A sample that could not be read.

    Attributes:
        position: the place in the stream that it was wanted for; a substitute of it may be another problem there.
        sample: its number in the set.
        path, split, shard, key: where it lies; the set's folder, and names in it.
        reason: in words.
    """

    position: int
    sample: int
    path: str
    split: str
    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        if self.shard and self.reason.startswith(self.shard):
            return self.reason
        return f"{self.shard}, key {self.key}: {self.reason}" if self.shard else f"{self.key}: {self.reason}"


@dataclass(frozen=True)
class Batch:
    """One micro-batch of B samples.

    Attributes:
        position: place of each sample in the stream, [B] int64.
        key: one integer per sample, made from the seed and the position, [B] int64; the source of all its randomness.
        sample: number of each sample in its set, [B] int64.
        images: per view [n * B, C, H, W], crop-major; uint8 from the worker, normalised floats for the objective.
        draws: per draw [B, ...].
        label: [B] int64, -1 where a sample has none; None if not asked for.
        checksum: crc32 of all that a worker made of each sample, its crops, draws and label, [B] int64; None if not
            asked for.
        problems: samples that could not be read, replaced by rule.
    """

    position: Tensor
    key: Tensor
    sample: Tensor
    images: dict[str, Tensor]
    draws: dict[str, Tensor] = field(default_factory=dict)
    label: Tensor | None = None
    checksum: Tensor | None = None
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.position)

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from pinned memory the copy does not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory; called by torch's DataLoader."""
        return self._map(lambda tensor: tensor.pin_memory())

    def with_images(self, images: dict[str, Tensor]) -> "Batch":
        """The same samples with other pixels."""
        return replace(self, images=images)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(
            position=function(self.position),
            key=function(self.key),
            sample=function(self.sample),
            images={name: function(image) for name, image in self.images.items()},
            draws={name: function(draw) for name, draw in self.draws.items()},
            label=None if self.label is None else function(self.label),
            checksum=self.checksum,
            problems=self.problems,
        )


@dataclass(frozen=True)
class BatchLayout:
    """How the positions of one step are cut among ranks and micro-batches.

    Step s owns positions [s * G, (s + 1) * G) for the global batch G. Ranks, and the micro-batches of a rank, are
    consecutive slices of it, so the same step holds the same samples however it is cut.
    """

    global_size: int
    micro_size: int
    ranks: int = 1

    def __post_init__(self) -> None:
        share = self.ranks * self.micro_size
        if self.global_size < 1 or self.micro_size < 1 or self.global_size % share:
            sizes = self.micro_sizes
            raise BadInput(
                f"batch.global_size {self.global_size} is not a multiple of {self.ranks} ranks × "
                f"batch.micro_size {self.micro_size} = {share}; "
                + (
                    f"micro sizes that fit are {', '.join(map(str, sizes[-6:]))}"
                    if sizes
                    else f"set batch.global_size to a multiple of {self.ranks}"
                )
            )

    @property
    def micro_sizes(self) -> list[int]:
        """All micro sizes that fit the global batch and the ranks, rising."""
        most = self.global_size // self.ranks
        return [size for size in range(1, most + 1) if self.global_size % (self.ranks * size) == 0]

    @property
    def accumulation(self) -> int:
        """Micro-batches of each rank in one step."""
        return self.global_size // (self.ranks * self.micro_size)

    def positions(self, step: int, rank: int, micro: int) -> NDArray[np.int64]:
        """The positions that micro-batch `micro` of a rank holds in a step, [micro_size]."""
        start = step * self.global_size + (rank * self.accumulation + micro) * self.micro_size
        return np.arange(start, start + self.micro_size, dtype=np.int64)
