"""How much memory a run took, and what to change when it runs out, by what the run was doing then."""

import contextlib
import resource
import sys
from collections.abc import Callable, Iterator

import torch

from foreseen.config import Config
from foreseen.data.batch import BatchLayout
from foreseen.engine.batch_statistics import batch_statistics
from foreseen.engine.objective import Objective
from foreseen.errors import BadInput

# What torch, cuBLAS, cuDNN, NCCL and the driver call it where they raise a plain RuntimeError.
_WORDS = (
    "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED", "CUDA error: out of memory",
    "CUDA driver error: out of memory", "Cuda failure 2 'out of memory'",
)  # fmt: skip


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process has held so far, in gigabytes (1e9 bytes).

    On a GPU that of its tensors; elsewhere all that the process had in memory, its libraries and pages of files among
    it, but not the loader's workers. Nothing waits for the device.
    """
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 1e9
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held * (1 if sys.platform == "darwin" else 1024) / 1e9


@contextlib.contextmanager
def memory_advice(phase: str, advice: Callable[[], str]) -> Iterator[None]:
    """Turn running out of memory into a sentence that says when, and what to set.

    Args:
        phase: completes "memory ran out ...".
        advice: what to set; called only then.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_exhaustion(error):
            raise
        raise BadInput(f"memory ran out {phase}; {advice()}") from error


def _is_exhaustion(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(word in str(error) for word in _WORDS)


def advise_on_weights(config: Config) -> str:
    """For weights, their average and the optimizer's state, whatever the batch."""
    less = "set optim.ema_decay=null, or " if config.optim.ema_decay is not None else ""
    return f"no batch.micro_size helps against that: {less}choose a smaller model.name"


def advise_on_steps(config: Config, layout: BatchLayout, objective: Objective) -> str:
    """For training steps.

    Args:
        config: of the run.
        layout: how its batches are cut.
        objective: what is trained.
    """
    smaller = _smaller(layout, objective.group)
    if smaller is not None:
        results = "and so do the results"
        if batch_statistics(objective):
            results = "though BatchNorm's statistics are of fewer images then"
        return (
            f"set batch.micro_size={smaller}: the global batch stays {layout.global_size} through accumulation, "
            f"{results}"
        )
    if not config.compute.checkpoint_activations:
        return (
            "no smaller one fits, so set compute.checkpoint_activations=true: activations are computed again "
            "in the backward pass, a third to a half slower, and the results stay"
        )
    smaller_groups = ""
    if (ungrouped := _smaller(layout, 1)) and (groups := objective.group_advice(ungrouped)):
        smaller_groups = f"set batch.micro_size={ungrouped} and {groups} (other results), or "
    return (
        "no smaller one fits and activations are not kept, so "
        f"{smaller_groups}lower views.size or choose a smaller model.name"
    )


def advise_on_scores(layout: BatchLayout, group: int) -> str:
    """For scoring a split, in batches of `batch.micro_size`."""
    smaller = _smaller(layout, group)
    if smaller is None:
        return "no smaller one fits, so lower views.size or choose a smaller model.name"
    return f"set batch.micro_size={smaller}: the same command goes on from the last checkpoint"


def advise_on_probes() -> str:
    """For a probe, which holds the features of all its pictures."""
    return "lower probe.samples: the same command goes on from the last checkpoint"


def _smaller(layout: BatchLayout, group: int) -> int | None:
    """The largest micro-batch that is at most half the present one."""
    return max((m for m in layout.micro_sizes if m <= layout.micro_size // 2 and m % group == 0), default=None)
