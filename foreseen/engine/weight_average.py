"""An exponential moving average of the trained weights, which is scored and handed over in their place.

Source: Polyak and Juditsky 1992; the decay's warm-up is that of TensorFlow's ExponentialMovingAverage, so that the
average does not remember the initial weights for long. timm's ModelEmaV3 does the same with a warm-up of another form.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foreseen.engine.batch_statistics import batch_statistics
from foreseen.models.frozen import is_untrained


class WeightAverage:
    """The average of the trained weights of a module, and of the batch statistics that belong to them.

    Those of a network without trained weights, such as a teacher, belong to none of these, and stay as they are.

    Args:
        module: on its device, with weights in float32 (or float64 throughout).
        decay: what the average keeps of itself at each step, once warmed up.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        untrained = tuple(f"{name}." for name, part in module.named_children() if is_untrained(part))
        # All but the counters, of which there is no mean.
        self._statistics = {
            name: value
            for name, value in batch_statistics(module).items()
            if value.is_floating_point() and not name.startswith(untrained)
        }
        self._average = {name: value.clone() for name, value in self._held.items()}

    @property
    def _held(self) -> dict[str, Tensor]:
        return self._weights | self._statistics

    def update(self, step: int, finite: Tensor) -> None:
        """Move towards the weights that update number `step` made; stands still, exactly, where it was skipped.

        Weights are finite after a skipped update, since it left them alone; statistics need not be.

        Args:
            step: from 0.
            finite: boolean scalar on the device.
        """
        share = 1.0 - min(self._decay, (1 + step) / (10 + step))
        average = [self._average[name] for name in self._weights]
        way = torch._foreach_sub(list(self._weights.values()), average)
        torch._foreach_mul_(way, share * finite.to(average[0].dtype))
        torch._foreach_add_(average, way)
        for name, statistic in self._statistics.items():
            kept = self._average[name]
            kept.copy_(torch.where(finite, kept.lerp(statistic, share), kept))

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
        for name, weight in self._held.items():
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
