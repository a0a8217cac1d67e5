"""What the loop asks of its data: micro-batches from a step on, and what to call the pictures in its records.

Two things answer: a packed set, whose samples have numbers (`loader.py`), and a stream of tars (`stream.py`).
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from foreseen.data.batch import Batch, BatchLayout


class Pictures(Protocol):
    """What pictures a run is made of, as far as its record and its checkpoints ask; a `ShardSet` is such.

    Attributes:
        place: what a person calls them.
        address: where another process finds them.
        split: of the set.
        fingerprint, labels_fingerprint: change when they do.
        source, licence: where they came from, and under which terms.
    """

    @property
    def place(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def labels_fingerprint(self) -> str | None: ...
    @property
    def source(self) -> str | None: ...
    @property
    def licence(self) -> str | None: ...
    def __len__(self) -> int: ...


class Feed(Protocol):
    """What the loop takes its micro-batches from.

    Attributes:
        num_samples: of an epoch.
        order_name: of the order of the samples; another one is another run.
        notes: what a person should know at every start.
    """

    @property
    def num_samples(self) -> int: ...
    @property
    def order_name(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...

    def example(self) -> Batch:
        """A micro-batch of the right shape, which may be none of the run."""

    def batches(self, first_step: int, total_steps: int, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
        """This rank's micro-batches of all steps from the first on."""


class Feeder(Protocol):
    """Pictures, and what an objective wants of each."""

    @property
    def shards(self) -> Pictures: ...

    def feed(self, layout: BatchLayout, rank: int, subset: NDArray[np.int64] | None) -> Feed:
        """The stream of a rank; `subset` are the sample numbers that take part."""
