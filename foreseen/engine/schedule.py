"""Schedules: pure functions of the step, so that nothing is saved and nothing can drift."""

import math
from typing import Literal


def scaled_lr(
    base_lr: float, scaling: Literal["linear", "sqrt", "none"], global_size: int, reference_batch: int
) -> float:  # fmt: skip
    """The peak lr that a recipe's rule gives for a global batch (Goyal et al. 2017, arXiv:1706.02677, section 2.1)."""
    ratio = global_size / reference_batch
    return base_lr * {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[scaling]


def warmup_cosine(step: int, *, peak: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up from 0, then half a cosine.

    Args:
        step: the update being made, from 0; the first one of a warm-up is made at 0.
        peak: value when the warm-up ends.
        end: value that the cosine tends to at `total_steps`.
        warmup_steps: may be 0.
        total_steps: length of the run, warm-up included.

    Source: facebookresearch/mae, util/lr_sched.py, with the fractional epoch in steps.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + (peak - end) * 0.5 * (1.0 + math.cos(math.pi * done))
