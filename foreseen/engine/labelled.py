"""Frozen features with labels, and how often the right class stands first or among five.

Letters: N pictures, D features, K classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Labelled(NamedTuple):
    """Features [N, D] and the class of each, [N] int64."""

    features: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Accuracy:
    """Shares of the pictures whose class has the highest score, or is among the five highest; in [0, 1]."""

    top1: float
    top5: float


@dataclass(frozen=True)
class TrainedProbe:
    """What a classifier on frozen features came out at.

    Attributes:
        accuracy: on the judged pictures, read once with the chosen rates.
        lr, weight_decay: chosen on validation; the first of equals.
        validation_top1: what they were chosen by.
        lr_is_extreme: the lr is the smallest or largest of the grid, so a better one may lie outside.
    """

    accuracy: Accuracy
    lr: float
    weight_decay: float
    validation_top1: float
    lr_is_extreme: bool


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """How many rows of scores [N, K] have their label first, and among the first five: [2] int64.

    A class whose score is -inf has not been named, so it is never a hit.
    """
    best = scores.topk(min(5, scores.shape[1]), dim=1)
    right = (best.indices == labels[:, None]) & (best.values > -torch.inf)
    return torch.stack([right[:, 0].sum(), right.any(dim=1).sum()])


def accuracy(hit: Tensor, count: int) -> Accuracy:
    """The shares of `count` pictures that a sum of `hits` makes."""
    top1, top5 = (hit.cpu().double() / count).tolist()
    return Accuracy(top1, top5)
