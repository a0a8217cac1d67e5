"""Splits by ratio: `train=0.8,validation=0.1,test=0.1` of a source that has no splits, or of one of its splits.

Who goes where hangs on the pictures' names and a seed, class by class, so pictures that are added later leave nearly
all others where they were, and the ratio holds in every class as well as whole pictures allow.
"""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from foreseen.data.source import Part, SourceSample, Splits
from foreseen.data.subsets import cut_fractions
from foreseen.data.table import SPLIT_NAME
from foreseen.errors import BadInput

_TOLERANCE = 1e-6  # of the sum: thirds are written with few digits


def parse_fractions(text: str) -> dict[str, float]:
    """The share of each split, from NAME=SHARE between commas.

    Raises:
        BadInput: it reads otherwise, a name comes twice, a share is not in (0, 1), or they do not sum to 1.
    """
    fractions: dict[str, float] = {}
    for part in text.split(","):
        name, separator, share = (piece.strip() for piece in part.partition("="))
        try:
            fraction = float(share)
        except ValueError:
            fraction = -1.0
        if not separator or not SPLIT_NAME.fullmatch(name) or not 0 < fraction < 1:
            raise BadInput(
                f"--split-fractions has {part!r}, it must be of NAME=SHARE between commas with shares between 0 and 1, "
                "such as train=0.8,validation=0.1,test=0.1"
            )
        if name in fractions:
            raise BadInput(f"--split-fractions names {name!r} twice")
        fractions[name] = fraction
    if abs((total := sum(fractions.values())) - 1) > _TOLERANCE:
        raise BadInput(f"the shares of --split-fractions sum to {total:g}, they must sum to 1")
    return fractions


def divide(
    found: Splits, split: str | None, fractions: Mapping[str, float], seed: int
) -> dict[str, Sequence[SourceSample]]:
    """Divide the pictures of a source, or of one split of it.

    Args:
        found: the source.
        split: which of its splits; None where it has but one, or none of its own.
        fractions: share of each new split.
        seed: another seed divides otherwise.

    Raises:
        BadInput: the source has splits and none is chosen, there is no such split, or a share of it is no picture.
    """
    if not found.are_named and split is not None:
        raise BadInput(f"--split {split} and --split-fractions both name the splits: leave --split out")
    if len(found.splits) > 1 and split is None:
        raise BadInput(
            f"the source has the splits {', '.join(found.splits)}: leave --split-fractions out, or choose the one to "
            "divide by --split"
        )
    ((_, samples),) = found.choose(split).items()
    labels = np.fromiter((-1 if sample.label is None else sample.label for sample in samples), np.int64, len(samples))
    names = [os.path.normpath(sample.name) for sample in samples]
    parts = cut_fractions(labels, names, fractions, found.classes, seed)
    for name, part in parts.items():
        if not len(part):
            raise BadInput(
                f"--split-fractions {name}={fractions[name]:g} of {len(samples):,} pictures is none: give it more, or "
                "leave it out"
            )
    return {name: Part(samples, part) for name, part in parts.items()}
