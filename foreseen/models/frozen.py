"""A network that an objective looks through and does not train: a tokenizer, a teacher."""

from typing import Any, Generic, Self, TypeVar

from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def is_untrained(network: nn.Module) -> bool:
    """Whether it has weights and trains none, as a teacher."""
    trained = [parameter.requires_grad for parameter in network.parameters()]
    return bool(trained) and not any(trained)


class Frozen(nn.Module, Generic[Network]):
    """Holds a network still: it moves with `.to(...)`, is not trained, stays as in evaluation, is in no checkpoint.

    Its weights lie in a folder of their own, whose checksum an objective names in `frozen_inputs`. Saving it with every
    checkpoint would only take room; loading a checkpoint leaves it as it is.

    Args:
        network: is changed to evaluation mode and has its gradients switched off.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network: Network = network.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stay as in evaluation."""
        return super().train(False)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Nothing: a checkpoint leaves it out."""
        return {} if destination is None else destination

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # Torch hands over a dictionary of this module's own; its own weights in there are found again just below.
        state_dict.update({f"{prefix}network.{name}": value for name, value in self.network.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *args)
