"""The flight recorder: the numbers of the last steps, and whether a step was bad.

Each step leaves a row of scalars on the device; rows are read when the loop logs, so no step waits for the device.

A step is bad if its loss or gradient is not finite, or if it explodes: the gradient norm is more than
`run.explode_factor` times the median of the last 100 good steps, and larger than that of any good step of the run.
The median follows a run through its warm-up and sees a norm that doubles every few steps, which a comparison with the
step before would not; the largest keeps quiet a run whose loss has all but vanished, where one hard sample stands out
by any factor. Before 100 good steps nothing explodes. Healthy runs of the shipped recipes reach 2 to 5 times the
median.

The rule looks at reduced numbers, in the order of the steps. So all ranks judge alike, and neither `run.log_every` nor
a restart changes a verdict: what it has to remember is part of the checkpoint.
"""

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from foreseen.config import Section
from foreseen.data.batch import Batch
from foreseen.engine.objective import all_reduce_sum

HISTORY = 100  # good steps that a gradient norm is measured by
Reason = Literal["non-finite", "exploding"]


class Record(Section, ser_json_inf_nan="strings", allow_inf_nan=True):
    """The numbers of one step, the same on every rank."""

    step: int
    """Number of the update, from 0: it follows the checkpoint `step-<n>` of the same number."""
    values: dict[str, float]
    """Parts of the loss, as means over the global batch; `grad_norm` before clipping; with fp16 the `loss_scale`."""
    finite: bool
    lr: float
    bad: Reason | None = None

    @property
    def is_search_for_a_scale(self) -> bool:
        """Whether only fp16's scaling of a finite loss overflowed, which is how its scale is found."""
        return not self.finite and self.values.get("loss_scale", 1.0) > 1.0 and math.isfinite(self.values["loss"])


@dataclass(frozen=True)
class Streak:
    """Bad steps in a row, from `first` to `last`."""

    first: Record
    last: int
    length: int


class FlightRecorder:
    """Takes down every step, and judges it when it is read.

    Args:
        steps: how many stay in `ring`.
        explode_factor: see above; None judges by finiteness alone.

    Attributes:
        ring: the steps last read, oldest first.
        streak: bad steps that go on; None after a good one.
    """

    def __init__(self, steps: int, explode_factor: float | None) -> None:
        self.ring: deque[Record] = deque(maxlen=steps)
        self.streak: Streak | None = None
        self._explode_factor = explode_factor
        self._norms: deque[float] = deque(maxlen=HISTORY)
        self._largest: float | None = None
        self._steps: list[int] = []
        self._names: tuple[str, ...] = ()
        self._rows: list[Tensor] = []
        self._replaced: dict[int, dict[int, int]] = {}

    def note(self, step: int, batches: Sequence[Batch]) -> None:
        """Remember which samples stood in for unreadable ones; `batches` are as they come from the loader."""
        for batch in batches:
            if batch.problems:
                used = dict(zip(batch.position.tolist(), batch.sample.tolist(), strict=True))
                self._replaced.setdefault(step, {}).update(used)

    def add(self, step: int, values: Mapping[str, Tensor], finite: Tensor) -> None:
        """Take down the scalars of a step; the host does not read them.

        Args:
            step: from 0.
            values: this rank's, on the device.
            finite: boolean scalar, the same on every rank.
        """
        self._names = tuple(values)
        self._steps.append(step)
        self._rows.append(torch.stack([*(value.detach() for value in values.values()), finite.to(torch.float32)]))

    def read(self, ranks: int, lr: Callable[[int], float]) -> list[Record]:
        """The steps since the last call, in order; waits for the device, and all ranks must call it.

        Args:
            ranks: that the numbers are averaged over.
            lr: of a step.
        """
        if not self._rows:
            return []
        table = (all_reduce_sum(torch.stack(self._rows).to(torch.float64)) / ranks).tolist()
        records = [
            Record(step=step, values=dict(zip(self._names, row[:-1], strict=True)), finite=row[-1] == 1.0, lr=lr(step))
            for step, row in zip(self._steps, table, strict=True)
        ]
        self._steps, self._rows = [], []
        return records

    def judge(self, record: Record) -> Streak | None:
        """Put the next step into the ring; returns the row of bad steps that it ends, or None if it is not bad."""
        bad = self._reason(record)
        self.ring.append(record.model_copy(update={"bad": bad}))
        if bad is not None:
            first, length = (self.ring[-1], 0) if self.streak is None else (self.streak.first, self.streak.length)
            self.streak = Streak(first, record.step, length + 1)
            return self.streak
        if record.finite:
            self.streak = None
            self._learn(record.values["grad_norm"])
        oldest = self.ring[0].step if self.ring else record.step
        self._replaced = {step: used for step, used in self._replaced.items() if step >= oldest}
        return None

    def _learn(self, norm: float) -> None:
        self._norms.append(norm)
        if self._largest is not None:
            self._largest = max(self._largest, norm)
        elif len(self._norms) == HISTORY and self._explode_factor is not None:
            # A single spike among the first, which nothing judged, must not hide later ones.
            limit = self._explode_factor * statistics.median(self._norms)
            self._largest = max(norm for norm in self._norms if norm <= limit)

    def _reason(self, record: Record) -> Reason | None:
        if not (record.finite and math.isfinite(record.values["loss"])):
            return None if record.is_search_for_a_scale else "non-finite"
        norm = record.values["grad_norm"]
        if self._explode_factor is None or self._largest is None:
            return None
        exploding = norm > self._explode_factor * statistics.median(self._norms) and norm > self._largest
        return "exploding" if exploding else None

    def describe(self, record: Record) -> str:
        """What is wrong with a bad step, for people."""
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in record.values.items())
        if record.bad == "non-finite":
            return f"step {record.step} (counted from 0) is not finite ({numbers})"
        times = record.values["grad_norm"] / (statistics.median(self._norms) or math.nan)
        return (
            f"step {record.step} (counted from 0) explodes ({numbers}): its gradient norm is {times:.3g} times the "
            f"median of the last {HISTORY} good steps, and above those of all good steps"
        )

    def replaced(self, step: int) -> dict[int, int]:
        """Which sample was used at positions of a step where a sample was unreadable, on this rank."""
        return self._replaced.get(step, {})

    def state(self) -> dict[str, Any]:
        """What verdicts to come depend on; to be asked for after `read` and `judge`."""
        streak = self.streak
        return {
            "norms": list(self._norms),
            "largest": self._largest,
            "streak": None if streak is None else {
                "first": streak.first.model_dump(mode="json"), "last": streak.last, "length": streak.length,
            },
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any] | None, step: int) -> None:
        """Take back what `state` gave after `step` updates, None if nothing was recorded; later steps are forgotten."""
        state = state or {"norms": [], "largest": None, "streak": None}
        streak = state["streak"]
        self.streak = None if streak is None else Streak(**streak | {"first": Record.model_validate(streak["first"])})
        self._norms = deque(state["norms"], maxlen=HISTORY)
        self._largest = state["largest"]
        self._steps, self._rows, self._replaced = [], [], {}
        self.ring = deque((record for record in self.ring if record.step < step), maxlen=self.ring.maxlen)
