"""What a classifier said of each sample of a split, kept from the very pass that scores it.

Letters: N samples, B of a batch, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor

from foreseen.data.batch import Batch


@dataclass(frozen=True)
class Predictions:
    """Of the labelled samples of a split, in their order; the same on every rank.

    Attributes:
        sample: number of each in its set, [N]; where a sample could not be read, of the one that was put in its place.
        label: its class, [N].
        predicted: the class with the highest score, [N].
        probability: of that class, [N].
        label_probability: of its own class, [N].
    """

    sample: NDArray[np.int64]
    label: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: NDArray[np.float64]
    label_probability: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.sample)

    def confusion(self, num_classes: int) -> NDArray[np.int64]:
        """How many samples of each class (row) were taken for each class (column), [K, K]."""
        counts = np.bincount(self.label * num_classes + self.predicted, minlength=num_classes**2)
        return counts.reshape(num_classes, num_classes).astype(np.int64, copy=False)

    def confused(self) -> NDArray[np.int64]:
        """The mistakes by kind, [M, 3]: label, predicted, how often; the commonest first. Takes no K² numbers."""
        wrong = self.label != self.predicted
        pairs, counts = np.unique(np.stack([self.label, self.predicted])[:, wrong], axis=1, return_counts=True)
        return np.vstack([pairs, counts]).T[np.argsort(-counts, kind="stable")]

    def worst(self) -> NDArray[np.int64]:
        """Places of the mistakes, those first whose own class was thought least likely."""
        wrong = np.flatnonzero(self.label != self.predicted)
        return wrong[np.argsort(self.label_probability[wrong], kind="stable")]


class PredictionKeeper:
    """Takes in the logits of a rank's batches, and gives what all ranks took in."""

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def __call__(self, batch: Batch, logits: Tensor) -> None:
        """Keep what is said of the labelled samples of a batch.

        Args:
            batch: with labels.
            logits: [B, K].
        """
        assert batch.label is not None
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
        highest, predicted = probabilities.max(dim=1)
        own = probabilities.gather(1, batch.label.clamp(min=0)[:, None])[:, 0]
        columns = (batch.position, batch.sample, batch.label, predicted, highest, own)
        # In float64, which holds every sample number that there is.
        self._parts.append(torch.stack([column.to(torch.float64) for column in columns], dim=1)[batch.label >= 0])

    def gather(self, accelerator: Accelerator) -> Predictions | None:
        """The predictions of all ranks; None where no logits were seen. To be called on each rank."""
        own = torch.cat(self._parts).cpu().numpy() if self._parts else np.zeros((0, 6))
        parts = [own]
        if accelerator.num_processes > 1:
            parts = [own] * accelerator.num_processes
            torch.distributed.all_gather_object(parts, own)
        table = np.concatenate(parts)
        if not len(table):
            return None
        table = table[np.argsort(table[:, 0], kind="stable")]
        whole = table[:, 1:4].astype(np.int64)
        return Predictions(whole[:, 0], whole[:, 1], whole[:, 2], table[:, 4], table[:, 5])
