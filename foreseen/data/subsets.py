"""Which labelled samples are set aside: a test split cut from a source that has none, validation, and k-shot subsets.
And which split each sample of a source becomes part of, by shares.

Each class is put in a keyed order; the first of it are set aside, the next ones are for training. So the validation
split does not depend on k, and the k-shot subset of a seed contains those of all smaller k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreseen.errors import BadInput
from foreseen.keys import Keys, name_keys, sample_keys, subkeys, uniform

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
    by_class = _in_classes(labels, labelled, subkeys(sample_keys(seed, labelled), "labelled subset"))
    classes, counts = by_class.classes, by_class.counts
    held_out = _share(counts, validation_fraction)
    left = counts - held_out
    if shots is not None and left.min() < shots:
        short = int(left.argmin())
        raise BadInput(
            f"class {classes[short]} has {left[short]} training samples ({counts[short]} labelled, {held_out[short]} "
            f"of them for validation) and {shots} are asked for; lower data.shots (--shots of a probe) to "
            f"{left[short]} or label more"
        )
    train, validation = by_class.split(held_out, None if shots is None else held_out + shots)
    return Subsets(train, validation)


def cut_test(labels: NDArray[np.integer], names: Sequence[str], fraction: float) -> tuple[Samples, Samples]:
    """Set a share of each class aside as the test split, for good.

    The order within a class is keyed by the samples' names and no seed, so runs agree on it, and samples that are added
    later leave nearly all others where they were. Samples of one name are one picture: they count once, by the first
    of their labels, and stay together.

    Args:
        labels: class of each sample, [N]; samples with -1 stay in train.
        names: of the samples' pictures, [N].
        fraction: share of each class, rounded; at least one of each class that has two, none of one that has one.

    Returns:
        The samples of train and those of test, each rising.
    """
    keys = subkeys(name_keys(names), "test split")
    labelled = np.flatnonzero(labels >= 0)
    pictures = labelled[np.unique(keys[labelled], return_index=True)[1]]
    by_class = _in_classes(labels, pictures, keys[pictures])
    _, test = by_class.split(_share(by_class.counts, fraction), None)
    is_test = np.isin(keys, keys[test])
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def cut_fractions(
    labels: NDArray[np.integer],
    names: Sequence[str],
    fractions: Mapping[str, float],
    classes: Sequence[str] | None,
    seed: int,
) -> dict[str, Samples]:
    """Divide samples into splits, the unlabelled ones as one more class.

    Of a class of n pictures a split of share f gets n·f, rounded up or down by a hash of the class's name, so that
    small classes together come out right; the largest split gets the rest, one at least. Samples of one name are one
    picture, as in `cut_test`.

    Args:
        labels: class of each sample, [N]; -1 where it has none.
        names: of the samples' pictures, [N].
        fractions: share of each split, which sum to 1.
        classes: names of the classes.
        seed: another seed divides otherwise.

    Returns:
        The samples of each split, rising.
    """
    keys = subkeys(name_keys(names), f"split fractions of seed {seed}")
    unique, first, picture = np.unique(keys, return_index=True, return_inverse=True)
    by_class = _in_classes(labels[first], np.arange(len(unique)), unique)
    class_names = ["" if number < 0 else classes[number] if classes else str(number) for number in by_class.classes]
    rounding = uniform(subkeys(name_keys(class_names), f"split fractions of seed {seed}"), "rounding", len(fractions))
    shares = list(fractions.values())
    largest = int(np.argmax(shares))
    counts = np.zeros((len(class_names), len(shares)), dtype=np.int64)
    left = by_class.counts - 1
    for split, share in enumerate(shares):
        if split != largest:
            counts[:, split] = np.minimum(left, np.floor(by_class.counts * share + rounding[:, split]))
            left = left - counts[:, split]
    counts[:, largest] = left + 1
    split_of = np.empty(len(unique), dtype=np.int64)
    split_of[by_class.order] = np.repeat(np.tile(np.arange(len(shares)), len(class_names)), counts.ravel())
    return {name: np.flatnonzero(split_of[picture] == split) for split, name in enumerate(fractions)}


@dataclass(frozen=True)
class _InClasses:
    """Samples class by class, [N]; the classes' numbers and how many each has, [K]."""

    order: Samples
    classes: NDArray[np.integer]
    counts: Samples

    def split(self, held_out: Samples, until: Samples | None) -> tuple[Samples, Samples]:
        """Those of each class from place `held_out` to `until` (or the end), and those before, each sorted."""
        starts = np.cumsum(self.counts) - self.counts
        place = np.arange(len(self.order)) - np.repeat(starts, self.counts)
        first = np.repeat(held_out, self.counts)
        last = np.repeat(self.counts if until is None else until, self.counts)
        return np.sort(self.order[(place >= first) & (place < last)]), np.sort(self.order[place < first])


def _in_classes(labels: NDArray[np.integer], samples: Samples, keys: Keys) -> _InClasses:
    order = samples[np.lexsort((keys, labels[samples]))]
    classes, counts = np.unique(labels[order], return_counts=True)
    return _InClasses(order, classes, counts.astype(np.int64))


def _share(counts: Samples, fraction: float) -> Samples:
    """How many of each class are set aside: a rounded share, one at least, but never all of it."""
    shares: Samples = np.minimum(np.maximum(np.rint(counts * fraction), 1), counts - 1).astype(np.int64)
    return shares
