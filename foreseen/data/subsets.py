"""Which labelled samples fine-tuning trains on and chooses by: a validation split cut from train, and k-shot subsets.

Each class is put in an order keyed by the seed; the first of it are validation, the next ones training. So the
validation split does not depend on k, and the k-shot subset of a seed contains those of all smaller k.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreseen.errors import BadInput
from foreseen.keys import sample_keys, subkeys

Samples = NDArray[np.int64]


@dataclass(frozen=True)
class Subsets:
    """Sample numbers, rising and without a common one; train [M], validation [V]."""

    train: Samples
    validation: Samples


def labelled_subsets(
    labels: NDArray[np.integer], *, validation_fraction: float, shots: int | None, seed: int
) -> Subsets:  # fmt: skip
    """Cut the labelled samples of a split into training and validation.

    Args:
        labels: class of each sample, [N]; samples with -1 are in neither part.
        validation_fraction: share of each class set aside, rounded; at least one of each class that has two.
        shots: training samples per class; None takes all that are left.
        seed: another seed chooses others.

    Raises:
        BadInput: no sample has a label, or a class has fewer than `shots` left.
    """
    labelled = np.flatnonzero(labels >= 0)
    if not len(labelled):
        raise BadInput("no sample of data.split has a label; fine-tuning needs some, give them when packing")
    order = labelled[np.lexsort((subkeys(sample_keys(seed, labelled), "labelled subset"), labels[labelled]))]
    classes, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(order)) - np.repeat(starts, counts)
    held_out = np.minimum(np.maximum(np.rint(counts * validation_fraction), 1), counts - 1).astype(np.int64)
    left = counts - held_out
    if shots is not None and left.min() < shots:
        short = int(left.argmin())
        raise BadInput(
            f"class {classes[short]} has {left[short]} training samples ({counts[short]} labelled, {held_out[short]} "
            f"of them for validation) and data.shots is {shots}; lower data.shots to {left[short]} or label more"
        )
    first = np.repeat(held_out, counts)
    last = np.repeat(counts if shots is None else held_out + shots, counts)
    return Subsets(train=np.sort(order[(place >= first) & (place < last)]), validation=np.sort(order[place < first]))
