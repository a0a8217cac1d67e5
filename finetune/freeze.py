"""Which layers are left as they were begun: with few labels the layers near the input had better stay.

What is frozen has a learning rate of 0 and keeps its gradients, since what is trained must not depend on how a batch is
cut: `requires_grad` never changes.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from typing import Any, Literal

from timm.models import group_parameters
from torch import nn

from foreseen.engine.objective import ParameterRule
from foreseen.errors import BadInput

Freeze = int | Literal["embeddings"] | None


def frozen_parameters(model: nn.Module, what: Freeze) -> frozenset[str]:
    """Names of the parameters that stay.

    Args:
        model: a timm model, with timm's own grouping of its parameters into layers.
        what: "embeddings" is what comes before the blocks; a number those and so many blocks; None nothing.

    Raises:
        BadInput: there are not so many blocks, or timm has no layers for the model.
    """
    if what is None:
        return frozenset()
    layers = _layers(model)
    blocks = max(layers.values()) - 1  # the first layer is the stem, the last the head
    count = 0 if what == "embeddings" else what
    if count > blocks:
        raise BadInput(f"method.freeze is {what}, and {type(model).__name__} has {blocks} blocks: lower it")
    return frozenset(name for name, layer in layers.items() if layer <= count)


def freeze(rules: Mapping[str, ParameterRule], frozen: Set[str]) -> dict[str, ParameterRule]:
    """The rules with a learning rate of 0 for what is frozen."""
    return {name: replace(rule, lr_scale=0.0) if name in frozen else rule for name, rule in rules.items()}


def frozen_modules(model: nn.Module, frozen: Set[str]) -> Iterator[nn.Module]:
    """Modules all of whose parameters are frozen, and that have some."""
    if not frozen:
        return
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{name}".lstrip(".") for name, _ in module.named_parameters()]
        if names and all(name in frozen for name in names):
            yield module


def _layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter, counted from the input: 0 is the stem, the last one the head.

    A norm between the last block and the head belongs to the block, as timm groups them.
    """
    described: Any = model
    if not hasattr(model, "group_matcher"):
        raise BadInput(f"method.freeze: timm does not tell the layers of {type(model).__name__}: set it to null")
    layers: dict[str, int] = group_parameters(model, described.group_matcher(coarse=False), reverse=True)
    return layers
