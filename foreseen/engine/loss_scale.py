"""Dynamic loss scaling for fp16, whose smallest gradients would round to zero.

The loss is multiplied by a scale before the backward and gradients are divided by it after. A gradient that overflows
skips its step, like any that is not finite, and halves the scale; a row of good steps doubles it. It is the rule of
`torch.amp.GradScaler` with its constants, held on the device: the scaler reads the host at each step.

Source: Micikevicius et al. 2018, arXiv:1710.03740, section 3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

INITIAL, SMALLEST, LARGEST = 2.0**16, 2.0**-16, 2.0**64
GOOD_STEPS = 2000  # GradScaler's growth_interval


class LossScale:
    """The scale of a run.

    Args:
        device: where gradients are.

    Attributes:
        value: the scale of the step being made, a power of two, so that it costs no precision; float32 scalar.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), INITIAL, device=device)
        self._good_steps = torch.zeros((), device=device)

    def unscale(self, gradients: Sequence[Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        torch._foreach_mul_(list(gradients), self.value.reciprocal())

    def update(self, finite: Tensor) -> None:
        """Choose the scale of the next step.

        Args:
            finite: whether the gradients of this one were, a boolean scalar on the device.
        """
        good = torch.where(finite, self._good_steps + 1, 0.0)
        grows = good == GOOD_STEPS
        value = torch.where(finite, torch.where(grows, self.value * 2, self.value), self.value / 2)
        self.value = value.clamp(SMALLEST, LARGEST)
        self._good_steps = torch.where(grows, 0.0, good)

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; waits for the device."""
        return {"value": float(self.value), "good_steps": float(self._good_steps)}

    def load_state(self, state: dict[str, float]) -> None:
        """Take back what `state` gave."""
        self.value.fill_(state["value"])
        self._good_steps.fill_(state["good_steps"])
