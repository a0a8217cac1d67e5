"""What rank 0 does for all ranks; where it fails, all of them do.

Else the others would wait for it in the next collective until the launcher kills them, which may take as long as a
large checkpoint is given to be saved.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from foreseen.errors import BadInput

PATIENCE = timedelta(hours=1)
"""Of ranks that wait for one that works alone; torch's ten minutes on GPUs are soon over where data is far away. A rank
that dies is noticed by its launcher, another machine that does by this."""

T = TypeVar("T")


def on_rank_zero(accelerator: Accelerator, act: Callable[[], T]) -> T:
    """What `act` returns on rank 0, on every rank; all must call it, and none goes on before it is done.

    Args:
        accelerator: of the job.
        act: returns something small that can be pickled.

    Raises:
        BadInput, OSError: as `act` did.
    """
    if accelerator.num_processes == 1:
        return act()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = act()
        except (BadInput, OSError) as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result
