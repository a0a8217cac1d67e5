"""From positions of the stream to batches: the map-style data sets and the loaders over them.

A loader is torch's own DataLoader over a range of micro-batch numbers; it has no state, so a run goes on by starting
the range elsewhere. A sample that cannot be read is replaced by rule, so no other sample moves.
"""

import atexit
import multiprocessing
import multiprocessing.forkserver
import signal
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import BaseContext
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from foreseen.config import Config
from foreseen.data.balance import Balance, BalancedOrder
from foreseen.data.batch import Batch, BatchLayout, Problem
from foreseen.data.decode import MAX_PIXELS, decode
from foreseen.data.order import BlockOrder, Order, RepeatedOrder, SampleOrder
from foreseen.data.shards import CorruptSample, ShardSet
from foreseen.data.store import MAX_BYTES
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
        block_shards: shards that the order takes its samples from at a time; None for all.
        repeats: how often each sample stands in a global batch.
        checksums: take a checksum of all that is made of each sample.
        max_pixels, max_bytes: of one picture; larger ones are unreadable, by their headers.
        balance: how often rare classes are seen; None as they occur.
    """

    def __init__(
        self, shards: ShardSet, request: Request, seed: int, *, fast_decode: bool = True,
        block_shards: int | None = None, repeats: int = 1, checksums: bool = False, max_pixels: int = MAX_PIXELS,
        max_bytes: int = MAX_BYTES, balance: Balance | None = None,
    ) -> None:  # fmt: skip
        if request.labels and shards.labels is None:
            raise BadInput(
                f"data.path {shards.place} holds no labels in split {shards.split!r}, and this job needs them"
            )
        self.shards = shards
        self.request = request
        self.seed = seed
        self.fast_decode = fast_decode
        self.block_shards = block_shards
        self.repeats = repeats
        self.checksums = checksums
        self.max_pixels, self.max_bytes = max_pixels, max_bytes
        self.balance = balance

    @classmethod
    def configured(cls, shards: ShardSet, request: Request, config: Config) -> Self:
        """With the seed, the order and the limits of a config."""
        data = config.data
        return cls(
            shards, request, config.seed, fast_decode=data.fast_decode, block_shards=data.shards_in_block,
            repeats=data.repeats, checksums=config.run.ledger == "pixels", max_pixels=data.max_pixels,
            max_bytes=data.max_bytes, balance=data.balance,
        )  # fmt: skip

    def feed(
        self, layout: BatchLayout, rank: int, subset: NDArray[np.int64] | None = None
    ) -> "StreamDataset":  # fmt: skip
        """The endless stream of a rank."""
        return StreamDataset(self, layout, rank, subset)

    def build(self, positions: NDArray[np.int64], samples: NDArray[np.int64], pool: NDArray[np.int64] | None) -> Batch:
        """Make the batch of `samples` standing at `positions`.

        Args:
            positions: [B], they key all randomness.
            samples: [B], numbers in the set.
            pool: sample numbers that a substitute is drawn from; None for the whole set.
        """
        keys = sample_keys(self.seed, positions)
        used = samples.copy()
        problems: list[Problem] = []
        images = self._readable_images(positions, used, keys, pool, problems)
        batch = assemble(self.request, self.seed, positions, images)
        label = None
        if self.request.labels and self.shards.labels is not None:
            label = torch.from_numpy(self.shards.labels[used].astype(np.int64))
        batch = replace(batch, sample=torch.from_numpy(used), label=label, problems=tuple(problems))
        return replace(batch, checksum=_checksums(batch)) if self.checksums else batch

    def _readable_images(
        self, positions: NDArray[np.int64], used: NDArray[np.int64], keys: Keys, pool: NDArray[np.int64] | None,
        problems: list[Problem],
    ) -> Iterator[NDArray[np.uint8]]:  # fmt: skip
        """The picture of each sample of `used`; what cannot be read is replaced, there too."""
        for row, data in enumerate(self.shards.read_many(used.tolist(), max_bytes=self.max_bytes)):
            image = self._decode(int(positions[row]), int(used[row]), data, problems)
            if image is None:
                image, used[row] = self._substitute(int(positions[row]), keys[row : row + 1], pool, problems)
            yield image

    def _decode(
        self, position: int, sample: int, data: bytes | CorruptSample | OSError, problems: list[Problem]
    ) -> NDArray[np.uint8] | None:
        """The pixels of a sample; None where that cannot be had, and why is a problem."""
        try:
            if not isinstance(data, bytes):
                raise data
            return decode(data, max_pixels=self.max_pixels, max_bytes=self.max_bytes, fast=self.fast_decode)
        except (CorruptSample, OSError) as error:
            shard, key = self.shards.shard_and_key(sample)
            reason = printable(str(error))
            problems.append(Problem(position, sample, self.shards.place, self.shards.split, shard, key, reason))
            return None

    def _substitute(
        self, position: int, key: Keys, pool: NDArray[np.int64] | None, problems: list[Problem]
    ) -> tuple[NDArray[np.uint8], int]:
        for attempt in range(_SUBSTITUTES):
            # A function of the key and the attempt, so that every run replaces alike and no other sample moves.
            draw = float(uniform(subkeys(key, f"substitute/{attempt}"), "sample", 1)[0, 0])
            choices = len(self.shards) if pool is None else len(pool)
            sample = int(draw * choices) if pool is None else int(pool[int(draw * choices)])
            data = next(self.shards.read_many([sample], max_bytes=self.max_bytes))
            if (image := self._decode(position, sample, data, problems)) is not None:
                return image, sample
        raise BadInput(
            f"{_SUBSTITUTES + 1} samples in a row of {self.shards.place} could not be read, the last: {problems[-1]}; "
            "the set is damaged, pack it again"
        )


def assemble(request: Request, seed: int, positions: NDArray[np.int64], images: Iterator[NDArray[np.uint8]]) -> Batch:
    """A batch without labels and sample numbers, from as many pictures as there are positions, one at a time."""
    keys = sample_keys(seed, positions)
    cutter = ViewCutter(request.views, keys)
    for row in range(len(positions)):
        cutter.cut(row, next(images))
    return Batch(
        position=torch.from_numpy(positions),
        key=as_tensor(keys),
        sample=torch.full((len(positions),), -1, dtype=torch.int64),
        images=cutter.tensors,
        draws=_draws(request, seed, positions),
    )


def _draws(request: Request, seed: int, positions: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    drawn = {}
    for draw in request.draws:
        owners = positions - positions % draw.group
        keys = sample_keys(seed, owners)
        # As uint64: of a list with integers on both sides of 2**63 numpy would make floats, and lose bits.
        tags = np.full_like(keys, stream_constant(f"draw/{draw.name}"))
        generators = (np.random.Generator(np.random.Philox(key=pair)) for pair in np.stack([keys, tags], axis=1))
        rows = [draw.function(*pair) for pair in zip(generators, owners.tolist(), strict=True)]
        drawn[draw.name] = torch.from_numpy(np.stack(rows))
    return drawn


def _checksums(batch: Batch) -> torch.Tensor:
    """The crc32 of what each sample became, [B] int64: crops in the order of the views, then draws, then the label."""
    rows = len(batch)
    parts = [x.view(-1, rows, *x.shape[1:]).transpose(0, 1) for x in batch.images.values()]
    parts += [*batch.draws.values(), *([] if batch.label is None else [batch.label])]
    sums = []
    for row in range(rows):
        checksum = 0
        for part in parts:
            checksum = zlib.crc32(np.ascontiguousarray(part[row].numpy()).data, checksum)
        sums.append(checksum)
    return torch.tensor(sums, dtype=torch.int64)


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
        self.notes: tuple[str, ...] = ()
        self.order: SampleOrder
        if builder.balance is not None:
            self.order = BalancedOrder(builder.seed, _labels_of(builder, subset), builder.balance)
        elif builder.block_shards is None:
            self.order = Order(builder.seed, len(builder.shards) if subset is None else len(subset))
        else:
            if subset is not None:
                self.subset = np.sort(subset)
            counts = _samples_taken(builder.shards.shard_samples, self.subset)
            self.order = BlockOrder(builder.seed, counts, builder.block_shards)
        self._blocks = self.order if isinstance(self.order, BlockOrder) else None
        if builder.repeats > 1:
            self.order = RepeatedOrder(self.order, builder.repeats, layout.global_size)

    @property
    def num_samples(self) -> int:
        """Samples that take part."""
        return self.order.num_samples

    @property
    def order_name(self) -> str:
        """See `Feed`."""
        return self.order.name

    def example(self) -> Batch:
        """The first micro-batch."""
        return self[0]

    def batches(self, first_step: int, total_steps: int, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
        """See `Feed`."""
        numbers = range(first_step * self.layout.accumulation, total_steps * self.layout.accumulation)
        return load(self, numbers, workers=workers, pin_memory=pin_memory)

    def __getitem__(self, number: int) -> Batch:
        step, micro = divmod(number, self.layout.accumulation)
        positions = self.layout.positions(step, self.rank, micro)
        if self._blocks is not None:
            last = positions[-1:] if not isinstance(self.order, RepeatedOrder) else self.order.places(positions[-1:])
            self.builder.shards.expect(self._blocks.shards_ahead(int(last[0])))
        samples = self.order.samples(positions)
        return self.builder.build(positions, samples if self.subset is None else self.subset[samples], self.subset)


def _labels_of(builder: BatchBuilder, subset: NDArray[np.int64] | None) -> NDArray[np.int32]:
    """The class of each sample that takes part in a stream that is balanced by class."""
    shards = builder.shards
    if builder.block_shards is not None:
        raise BadInput(f"data.balance {builder.balance} takes samples from any shard: set data.order=full")
    if shards.labels is None:
        raise BadInput(f"data.balance {builder.balance} needs labels, and {shards.place} has none: set it to null")
    labels = np.asarray(shards.labels if subset is None else shards.labels[subset])
    if len(missing := np.flatnonzero(labels < 0)):
        sample = int(missing[0] if subset is None else subset[missing[0]])
        raise BadInput(
            f"data.balance {builder.balance} needs a label of every sample trained on, and {shards.describe(sample)} "
            "has none: label it, or set data.balance=null"
        )
    return labels


def _samples_taken(shard_samples: list[int], subset: NDArray[np.int64] | None) -> list[int]:
    """How many samples of each shard take part; `subset` rises."""
    if subset is None:
        return shard_samples
    ends = np.cumsum([0, *shard_samples])
    found: list[int] = np.diff(np.searchsorted(subset, ends)).tolist()
    return found


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


def load(dataset: Dataset[Batch], numbers: range | None, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Iterate over the items `numbers` of a data set, in their order, made ahead of time by worker processes.

    With `numbers` None the data set is one of torch's that are iterated over; its workers take turns.

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
