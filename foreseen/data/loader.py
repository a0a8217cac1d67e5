"""From positions of the stream to batches: the map-style data sets and the loaders over them.

A loader is torch's own DataLoader over a range of micro-batch numbers; it has no state, so a run goes on by starting
the range elsewhere. A sample that cannot be read is replaced by rule, so no other sample moves.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import signal
import threading
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from foreseen.config import Config
from foreseen.data.batch import Batch, BatchLayout, Problem
from foreseen.data.decode import MAX_PIXELS, decode
from foreseen.data.order import Order
from foreseen.data.shards import MAX_BYTES, CorruptSample, ShardSet
from foreseen.data.views import Request, ViewCutter
from foreseen.device_keys import as_tensor
from foreseen.errors import BadInput
from foreseen.keys import Keys, sample_keys, stream_constant, subkeys, uniform
from foreseen.printable import printable
from foreseen.processes import exit_with_the_parent

_SIGNALS_TO_RANKS = (signal.SIGTERM, signal.SIGUSR1)  # a rank is told to stop by these, never a worker
_SUBSTITUTES = 20  # so many unreadable samples in a row, drawn at random, are no accident


class BatchBuilder:
    """Reads, decodes and cuts the samples of one batch.

    Args:
        shards: the set.
        request: what the objective wants of each sample.
        seed: of the run.
        fast_decode: use torchcodec for the JPEGs that it is safe for, where it is installed.
        max_pixels, max_bytes: of one picture; larger ones are unreadable, by their headers.
    """

    def __init__(
        self, shards: ShardSet, request: Request, seed: int, *, fast_decode: bool = True, max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES,
    ) -> None:  # fmt: skip
        if request.labels and shards.labels is None:
            raise BadInput(
                f"data.path {shards.path} holds no labels in split {shards.split!r}, and this job needs them"
            )
        self.shards = shards
        self.request = request
        self.seed = seed
        self.fast_decode = fast_decode
        self.max_pixels, self.max_bytes = max_pixels, max_bytes

    @classmethod
    def configured(cls, shards: ShardSet, request: Request, config: Config) -> Self:
        """With the seed and the limits of a config."""
        data = config.data
        return cls(
            shards, request, config.seed, fast_decode=data.fast_decode, max_pixels=data.max_pixels,
            max_bytes=data.max_bytes,
        )  # fmt: skip

    def build(self, positions: NDArray[np.int64], samples: NDArray[np.int64], pool: NDArray[np.int64] | None) -> Batch:
        """Make the batch of `samples` standing at `positions`.

        Args:
            positions: [B], they key all randomness.
            samples: [B], numbers in the set.
            pool: sample numbers that a substitute is drawn from; None for the whole set.
        """
        keys = sample_keys(self.seed, positions)
        cutter = ViewCutter(self.request.views, keys)
        used = samples.copy()
        problems: list[Problem] = []
        for row in range(len(samples)):
            place = int(positions[row])
            image, used[row] = self._readable_image(int(samples[row]), place, keys[row : row + 1], pool, problems)
            cutter.cut(row, image)
        label = None
        if self.request.labels and self.shards.labels is not None:
            label = torch.from_numpy(self.shards.labels[used].astype(np.int64))
        return Batch(
            position=torch.from_numpy(positions),
            key=as_tensor(keys),
            sample=torch.from_numpy(used),
            images=cutter.tensors,
            draws=self._draws(positions),
            label=label,
            problems=tuple(problems),
        )

    def _readable_image(
        self, sample: int, position: int, key: Keys, pool: NDArray[np.int64] | None, problems: list[Problem]
    ) -> tuple[NDArray[np.uint8], int]:
        for attempt in range(_SUBSTITUTES + 1):
            try:
                data = self.shards.read(sample, max_bytes=self.max_bytes)
                pixels = decode(data, max_pixels=self.max_pixels, max_bytes=self.max_bytes, fast=self.fast_decode)
                return pixels, sample
            except (CorruptSample, OSError) as error:
                place = self.shards.place(sample)
                set_and_split = str(self.shards.path), self.shards.split
                problems.append(Problem(position, sample, *set_and_split, *place, printable(str(error))))
            # A function of the key and the attempt, so that every run replaces alike and no other sample moves.
            draw = float(uniform(subkeys(key, f"substitute/{attempt}"), "sample", 1)[0, 0])
            choices = len(self.shards) if pool is None else len(pool)
            sample = int(draw * choices) if pool is None else int(pool[int(draw * choices)])
        raise BadInput(
            f"{_SUBSTITUTES + 1} samples in a row of {self.shards.path} could not be read, the last: {problems[-1]}; "
            "the set is damaged, pack it again"
        )

    def _draws(self, positions: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        drawn = {}
        for draw in self.request.draws:
            owners = positions - positions % draw.group
            keys = sample_keys(self.seed, owners)
            # As uint64: of a list with integers on both sides of 2**63 numpy would make floats, and lose bits.
            tags = np.full_like(keys, stream_constant(f"draw/{draw.name}"))
            generators = (np.random.Generator(np.random.Philox(key=pair)) for pair in np.stack([keys, tags], axis=1))
            rows = [draw.function(*pair) for pair in zip(generators, owners.tolist(), strict=True)]
            drawn[draw.name] = torch.from_numpy(np.stack(rows))
        return drawn


class StreamDataset(Dataset[Batch]):
    """The endless stream of a set, as seen by one rank; item number i is the rank's i-th micro-batch since step 0.

    Args:
        builder: makes the batches.
        layout: cuts steps into micro-batches.
        rank: whose micro-batches these are.
        subset: sample numbers that take part, [M]; None for all.
    """

    def __init__(
        self, builder: BatchBuilder, layout: BatchLayout, rank: int, subset: NDArray[np.int64] | None = None
    ) -> None:
        self.builder = builder
        self.layout = layout
        self.rank = rank
        self.subset = subset
        self.order = Order(builder.seed, len(builder.shards) if subset is None else len(subset))

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.layout.accumulation)
        positions = self.layout.positions(step, self.rank, micro)
        samples = self.order.samples(positions)
        return self.builder.build(positions, samples if self.subset is None else self.subset[samples], self.subset)


class SweepDataset(Dataset[Batch]):
    """Every chosen sample once, in order, for evaluation; item number i is the i-th batch of this rank.

    Ranks take every `ranks`-th batch; the last batch may be smaller, and no sample is repeated to fill it.
    """

    def __init__(
        self, builder: BatchBuilder, batch_size: int, *, rank: int = 0, ranks: int = 1,
        subset: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        self.builder = builder
        self.subset = subset
        samples = np.arange(len(builder.shards), dtype=np.int64) if subset is None else subset
        starts = range(rank * batch_size, len(samples), ranks * batch_size)
        self.batches = [samples[start : start + batch_size] for start in starts]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        samples = self.batches[number]
        return self.builder.build(samples, samples, self.subset)


def load(dataset: Dataset[Batch], numbers: range, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Iterate over the items `numbers` of a data set, in their order, made ahead of time by worker processes.

    Workers come from a fork server, since forking a process that runs threads is unsafe; they die with their parent.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=_fork_server() if workers else None,
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each loader would draw its workers' seed from the global generator
    )
    return _with_plain_errors(iter(loader))


def _with_plain_errors(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except BadInput as error:
        # From a worker it comes wrapped in the worker's traceback; the user is told the sentence.
        raise BadInput(str(error).strip().rpartition("BadInput: ")[2]) from None


def _start_worker(worker: int) -> None:
    for number in _SIGNALS_TO_RANKS:
        signal.signal(number, signal.SIG_IGN)
    exit_with_the_parent()  # torch's own watchdog sees only the fork server


@atexit.register
def _end_workers() -> None:
    """End the workers of a process that leaves in the middle of a load, with an error.

    multiprocessing would tell them by a signal that they ignore, and then wait for them for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _fork_server() -> BaseContext:
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["foreseen.data.loader"])
    if threading.current_thread() is threading.main_thread():
        # Launchers signal whole groups; a rank that was told to stop still needs its workers for a few steps. What is
        # ignored here stays ignored in the server.
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in _SIGNALS_TO_RANKS}
        multiprocessing.forkserver.ensure_running()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return context
