"""BatchNorm's running statistics: the one state that a forward moves, before anyone knows if its step is finite."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foreseen.models.frozen import Frozen


def batch_statistics(module: nn.Module) -> dict[str, Tensor]:
    """The running statistics and counters of every BatchNorm in a module, by name, as they are and not copied.

    Those of a `Frozen` network are left out, as no forward moves them.
    """
    still = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, Frozen))
    return {
        f"{name}.{which}": statistic
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and not name.startswith(still)
        for which, statistic in part.named_buffers(recurse=False)
    }


class KeptStatistics:
    """The statistics of a module before a step, to be put back if the step is skipped.

    Args:
        module: on its device. Without BatchNorm in it nothing is kept and nothing costs time.
    """

    def __init__(self, module: nn.Module) -> None:
        self._live = list(batch_statistics(module).values())
        self._kept = [statistic.clone() for statistic in self._live]

    def keep(self) -> None:
        """Remember the statistics as they are now."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def put_back(self, finite: Tensor) -> None:
        """Make the statistics what they were, unless the step was finite.

        Args:
            finite: boolean scalar on the device; the host does not read it.
        """
        for live, kept in zip(self._live, self._kept, strict=True):
            live.copy_(torch.where(finite, live, kept))
