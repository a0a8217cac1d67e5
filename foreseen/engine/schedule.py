"""Schedules: pure functions of the step, so that nothing is saved and nothing can drift."""

import math
from typing import Literal


def scaled_lr(
    base_lr: float, scaling: Literal["linear", "sqrt", "none"], global_size: int, reference_batch: int
) -> float:  # fmt: skip
    """The peak lr that a recipe's rule gives for a global batch (Goyal et al. 2017, arXiv:1706.02677, section 2.1)."""
    ratio = global_size / reference_batch
    return base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[scaling]


def cosine(step: int, *, start: float, end: float, total_steps: int) -> float:
    """Half a cosine from `start` at step 0 to what it tends to, `end`, at `total_steps`.

    Source: facebookresearch/dino at 7c446df, utils.py, cosine_scheduler.
    """
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * step / total_steps))


def linear(index: int, *, start: float, end: float, count: int) -> float:
    """`count` values in equal steps from `start` to `end`, both among them, and `end` ever after.

    Source: numpy.linspace, as facebookresearch/dino at 7c446df warms temperatures up, main_dino.py, DINOLoss.
    """
    return end if index >= count - 1 else start + (end - start) * index / (count - 1)


def warmup_cosine(
    step: int,
    *,
    peak: float,
    end: float,
    warmup_steps: int,
    total_steps: int,
    start: float = 0.0,
    ends_at_peak: bool = False,
) -> float:
    """Linear warm-up, then half a cosine.

    Args:
        step: the update being made, from 0; the first one of a warm-up is made at `start`.
        peak: value when the warm-up ends.
        end: value that the cosine tends to at `total_steps`.
        warmup_steps: may be 0.
        total_steps: length of the run, warm-up included.
        start: value that the warm-up begins with.
        ends_at_peak: whether the last step of the warm-up is made at the peak; else the first one after it is.

    Source: facebookresearch/mae, util/lr_sched.py, with the fractional epoch in steps; with `ends_at_peak`
    facebookresearch/dino at 7c446df, utils.py, cosine_scheduler.
    """
    if step < warmup_steps:
        if ends_at_peak:
            return linear(step, start=start, end=peak, count=warmup_steps) if warmup_steps > 1 else start
        return start + (peak - start) * step / warmup_steps
    return cosine(step - warmup_steps, start=peak, end=end, total_steps=total_steps - warmup_steps)
