"""What to change when memory runs out."""

import contextlib
from collections.abc import Iterator

import torch

from foreseen.config import Config
from foreseen.data.batch import BatchLayout
from foreseen.errors import BadInput


@contextlib.contextmanager
def memory_advice(config: Config, layout: BatchLayout, group: int) -> Iterator[None]:
    """Turn running out of memory into a sentence that says what to set.

    Args:
        config: of the run.
        layout: how its batches are cut.
        group: micro-batches must hold a multiple of so many samples.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        exhausted = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not exhausted:
            raise
        advice = _advice(config, layout, group)
        raise BadInput(f"memory ran out at batch.micro_size {layout.micro_size}; {advice}") from error


def _advice(config: Config, layout: BatchLayout, group: int) -> str:
    smaller = [m for m in layout.micro_sizes if m <= layout.micro_size // 2 and m % group == 0]
    if smaller:
        return (
            f"set batch.micro_size={smaller[-1]}: the global batch stays {layout.global_size} through accumulation, "
            "and so do the results"
        )
    if not config.compute.checkpoint_activations:
        return (
            "no smaller one fits, so set compute.checkpoint_activations=true: activations are computed again "
            "in the backward pass, a third to a half slower, and the results stay"
        )
    return "no smaller one fits and activations are not kept, so lower views.size or choose a smaller model.name"
