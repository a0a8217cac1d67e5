"""Every fine-tuning method, by the name that recipes use."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from foreseen.config import Config, MethodOptions
from foreseen.engine.objective import Objective
from foreseen.finetune.distill import Distill, DistillOptions
from foreseen.finetune.supervised import Supervised, SupervisedOptions


class Build(Protocol):
    """How a config, the number of classes and their names, where they have some, become the objective."""

    def __call__(self, config: Config, num_classes: int, class_names: Sequence[str] | None = None) -> Objective: ...


@dataclass(frozen=True)
class Method:
    """A method: its options, and what builds its objective, drawing on the CPU."""

    options: type[MethodOptions]
    build: Build


METHODS: dict[str, Method] = {
    "supervised": Method(SupervisedOptions, Supervised.build),
    "distill": Method(DistillOptions, Distill.build),
}
