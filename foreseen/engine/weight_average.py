"""An exponential moving average of the trained weights, which is scored and handed over in their place.

Source: Polyak and Juditsky 1992; the decay's warm-up is that of TensorFlow's ExponentialMovingAverage, so that the
average does not remember the initial weights for long. timm's ModelEmaV3 does the same with a warm-up of another form.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class WeightAverage:
    """The average of the trained weights of a module, and of the batch statistics that belong to them.

    Args:
        module: on its device, with weights in float32 (or float64 throughout).
        decay: what the average keeps of itself at each step, once warmed up.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        self._weights |= _batch_statistics(module)
        self._average = {name: weight.clone() for name, weight in self._weights.items()}

    def update(self, step: int, finite: Tensor) -> None:
        """Move towards the weights that update number `step` made; stands still, exactly, where it was skipped.

        Args:
            step: from 0.
            finite: boolean scalar on the device.
        """
        share = 1.0 - min(self._decay, (1 + step) / (10 + step))
        average = list(self._average.values())
        way = torch._foreach_sub(list(self._weights.values()), average)
        torch._foreach_mul_(way, share * finite.to(average[0].dtype))
        torch._foreach_add_(average, way)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average in the place of the weights for what runs inside. Nothing may be trained there."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def hand_over(self) -> None:
        """Leave the average in the place of the weights, at the end of a run."""
        self._exchange()

    def _exchange(self) -> None:
        for name, weight in self._weights.items():
            held = weight.clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(held)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps, by the names of the weights."""
        return self._average

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` gave."""
        for name, average in self._average.items():
            average.copy_(state[name])


def _batch_statistics(module: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{which}": statistic
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.running_mean is not None
        for which in ("running_mean", "running_var")
        if isinstance(statistic := getattr(part, which), Tensor)
    }
