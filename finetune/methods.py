"""Every fine-tuning method, by the name that recipes use."""

from collections.abc import Callable
from dataclasses import dataclass

from foreseen.config import Config, MethodOptions
from foreseen.engine.objective import Objective
from foreseen.finetune.supervised import Supervised, SupervisedOptions


@dataclass(frozen=True)
class Method:
    """A method: its options, and how a config and a number of classes become the objective, drawing on the CPU."""

    options: type[MethodOptions]
    build: Callable[[Config, int], Objective]


METHODS: dict[str, Method] = {
    "supervised": Method(SupervisedOptions, Supervised.build),
}
