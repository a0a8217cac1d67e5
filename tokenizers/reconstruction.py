"""What the tokenizers that are trained to reconstruct pixels have in common: views, counts of codes, pictures."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foreseen.config import Config
from foreseen.data.batch import Batch
from foreseen.data.views import Request, View, configured_view, denormalise
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.tokenizers.code_counts import CodeCounts
from foreseen.tokenizers.dvae_networks import Standardise
from foreseen.tokenizers.tokenizer import Tokenizer
from foreseen.tokenizers.training import TokenizerObjective

_PICTURES = 8


class ReconstructionObjective(TokenizerObjective):
    """Base of the objectives that show a decoder the codes of a random crop.

    Args:
        tokenizer: to train.
        view: what it sees of each picture.
    """

    def __init__(self, tokenizer: Tokenizer, view: View) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.view = view
        self.counts = CodeCounts(tokenizer.codebook_size)
        self._standards = [module for module in tokenizer.modules() if isinstance(module, Standardise)]

    @property
    def request(self) -> Request:
        """One random crop per image."""
        return Request(views=(self.view,))

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Any]:
        """Begin to count."""
        self.counts.begin()
        for standard in self._standards:
            standard.begin()
        return super().prepare(micro_batches, progress)

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """End the count, and move running statistics."""
        self.counts.close()
        for standard in self._standards:
            standard.move(progress.step, finite)

    def health(self) -> dict[str, Tensor]:
        """Share of codes used in the last global batch, and their perplexity; the codes are those of `encode`."""
        return self.counts.health()

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Original, and reconstruction from codes alone, side by side."""
        images = batch.images["image"][:_PICTURES]
        made = (self.tokenizer.decode(self.tokenizer.encode(images)) * 255.0).round().to(torch.uint8)
        original = denormalise(images, self.tokenizer.mean, self.tokenizer.std)
        return {"original, reconstruction": torch.cat([original, made], dim=3)}


def mapped_view(config: Config, tokenizer: Tokenizer) -> View:
    """The random crop that a recipe's `views` asks for, mapped as the likelihood wants it.

    Raises:
        BadInput: the recipe normalises in a way of its own.
    """
    if config.views.mean is not None or config.views.std is not None:
        raise BadInput(
            f"views.mean and views.std must be null: the likelihood of {config.method.name} is of pixels x mapped to "
            "0.8 x + 0.1"
        )
    return configured_view(config.views, tokenizer.mean, tokenizer.std)
