"""Every tokenizer that can be trained, by the name that recipes use."""

from collections.abc import Callable
from dataclasses import dataclass

from foreseen.config import Config, MethodOptions
from foreseen.tokenizers.dvae import DVAEObjective, DVAEOptions
from foreseen.tokenizers.fsq import FSQObjective, FSQOptions
from foreseen.tokenizers.training import TokenizerObjective
from foreseen.tokenizers.vqkd_training import VQKDObjective, VQKDOptions


@dataclass(frozen=True)
class Method:
    """A way to train a tokenizer: its options, and how a config becomes the objective, drawing weights on the CPU."""

    options: type[MethodOptions]
    build: Callable[[Config], TokenizerObjective]


METHODS: dict[str, Method] = {
    "dvae": Method(DVAEOptions, DVAEObjective.build),
    "fsq": Method(FSQOptions, FSQObjective.build),
    "vqkd": Method(VQKDOptions, VQKDObjective.build),
}
