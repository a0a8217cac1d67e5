"""How good frozen features are: by labels where there are some, and by their spectrum.

Letters: N pictures, D features, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from foreseen.engine.knn import HEADLINE, knn
from foreseen.engine.labelled import Accuracy, Labelled, TrainedProbe
from foreseen.engine.linear_probe import linear_probe
from foreseen.engine.spectrum import alpha_req, rankme, rankme_centred, spread
from foreseen.errors import BadInput

SPECTRUM_PICTURES = 25_600  # RankMe's authors use as many


@dataclass(frozen=True)
class Exam:
    """What labelled features are asked.

    Attributes:
        judged: the pictures that every accuracy is of.
        bank: the neighbours that vote; None leaves k-NN out.
        linear: what a linear probe trains on and what it chooses its learning rate by; None leaves it out.
        num_classes: K.
        seed: of the linear probe.
    """

    judged: Labelled
    bank: Labelled | None
    linear: tuple[Labelled, Labelled] | None
    num_classes: int
    seed: int


@dataclass(frozen=True)
class Probe:
    """What frozen features came out at.

    Attributes:
        dimensions: D, or N where there are fewer pictures; no rank can be larger.
        is_finite: False when a feature is infinite or not a number, and then there is nothing else.
        rankme, rankme_centred, alpha_req, spread: see `foreseen.engine.spectrum`; None where they cannot be had.
        judged: how many pictures the accuracies are of.
        chance: accuracy of naming always the judged pictures' commonest class; None without labels.
        knn: accuracy for each k.
        linear, attentive: classifiers that were trained on the features, and on those of the patches.
    """

    dimensions: int
    is_finite: bool
    rankme: float | None = None
    rankme_centred: float | None = None
    alpha_req: float | None = None
    spread: float | None = None
    judged: int = 0
    chance: float | None = None
    knn: Mapping[int, Accuracy] = field(default_factory=dict)
    linear: TrainedProbe | None = None
    attentive: TrainedProbe | None = None

    @property
    def headline(self) -> int | None:
        """The k whose accuracy stands for k-NN: the paper's 20, or the largest below it that the bank allows."""
        return max((k for k in self.knn if k <= HEADLINE), default=min(self.knn, default=None))

    def values(self) -> dict[str, float]:
        """What is logged, by name."""
        values = {
            "rankme": self.rankme,
            "rankme_centred": self.rankme_centred,
            "alpha_req": self.alpha_req,
            "knn_top1": None if self.headline is None else self.knn[self.headline].top1,
            "linear_top1": None if self.linear is None else self.linear.accuracy.top1,
            "attentive_top1": None if self.attentive is None else self.attentive.accuracy.top1,
        }
        return {name: value for name, value in values.items() if value is not None}


def probe(features: Tensor, exam: Exam | None = None) -> Probe:
    """Judge frozen features.

    Args:
        features: of all pictures looked at, [N, D], for the numbers that need no label.
        exam: what those with labels are asked, if there are any.

    Raises:
        BadInput: there are fewer than two pictures, or an exam without a picture to judge.
    """
    if len(features) < 2:
        raise BadInput(f"{len(features)} pictures could be read, and a probe needs at least 2")
    dimensions = min(features.shape)
    if not torch.isfinite(features).all():
        return Probe(dimensions, is_finite=False)
    some = features[:: -(-len(features) // SPECTRUM_PICTURES)]
    spectral = Probe(min(some.shape), True, rankme(some), rankme_centred(some), alpha_req(some), spread(some))
    return spectral if exam is None else _examined(spectral, exam)


def _examined(spectral: Probe, exam: Exam) -> Probe:
    if not len(exam.judged.labels):
        raise BadInput("none of the pictures to be judged by a probe has a label")
    votes = {} if exam.bank is None else knn(exam.bank, exam.judged, num_classes=exam.num_classes)
    linear = None
    if exam.linear is not None:
        linear = linear_probe(*exam.linear, exam.judged, num_classes=exam.num_classes, seed=exam.seed)
    count = len(exam.judged.labels)
    chance = int(exam.judged.labels.bincount().max()) / count
    return replace(spectral, judged=count, chance=chance, knn=votes, linear=linear)
