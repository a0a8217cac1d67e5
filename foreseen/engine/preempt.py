"""Being told to stop: a signal to any rank makes every rank save at the same step and leave.

The handler only sets a flag, since saving inside a handler may find half a step. Ranks agree on the flag over a CPU
group, so nothing waits for the device.
"""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from foreseen.engine.rank_zero import PATIENCE

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_PREEMPTED = 85
_AGREE_EVERY = 4  # steps; launchers kill 30 s after the signal unless told otherwise


class Preemption:
    """Listens for the signals while it is entered.

    Args:
        ranks: processes in the job.
    """

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._asked = False
        self._group: Any = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if self._ranks > 1:
            gloo = dist.get_backend() == "gloo"
            self._group = dist.group.WORLD if gloo else dist.new_group(backend="gloo", timeout=PATIENCE)
        self._before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._group is not None and self._group is not dist.group.WORLD:
            dist.destroy_process_group(self._group)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step. Every rank must ask with the same step."""
        if self._ranks == 1:
            return self._asked
        if step % _AGREE_EVERY:
            return False
        asked = torch.tensor([self._asked], dtype=torch.int32)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked.item())
