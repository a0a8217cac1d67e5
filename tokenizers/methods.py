"""Every tokenizer that can be trained, by the name that recipes use."""

from collections.abc import Callable
from dataclasses import dataclass

from foreseen.config import Config, MethodOptions
from foreseen.tokenizers.training import TokenizerObjective


@dataclass(frozen=True)
class Method:
    """A way to train a tokenizer: its options, and how a config becomes the objective, drawing weights on the CPU."""

    options: type[MethodOptions]
    build: Callable[[Config], TokenizerObjective]


METHODS: dict[str, Method] = {}
