"""What the tokenizers that are trained have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from foreseen.engine.objective import Objective
from foreseen.tokenizers.tokenizer import Tokenizer


class TokenizerObjective(Objective):
    """An objective whose result is a tokenizer.

    Attributes:
        tokenizer: what is kept.
    """

    tokenizer: Tokenizer

    def parents(self) -> Sequence[Mapping[str, Any]]:
        """The encoders that taught it, each with its "source" and "weights_sha256"."""
        return ()
