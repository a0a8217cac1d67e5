import pytest
import torch

from foreseen.engine.labelled import Accuracy
from foreseen.engine.probe import Probe, probe
from foreseen.engine.verdict import verdict


def _by_labels(top1: float, judged: int = 1000) -> Probe:
    return Probe(128, True, 30.0, 40.0, 1.2, 0.1, judged=judged, chance=0.1, knn={20: Accuracy(top1, 1.0)})


@pytest.mark.parametrize(
    ("top1", "earlier", "said"),
    [
        (0.30, {}, "k-NN (k = 20) is right on 30.0% of 1000 pictures, naming the commonest class on 10.0%"),
        (0.11, {}, "so no better than guessing"),
        (0.30, {0: 0.12, 1000: 0.2, 2000: 0.15}, "; up from 20.0% at step 1000: learning"),
        (0.30, {1000: 0.29}, "; 29.0% at step 1000: no clear change"),
        (0.30, {1000: 0.4, 2000: 0.3}, "; down from 40.0% at step 1000: getting worse"),
    ],
)
def test_labels_are_compared_with_guessing_and_with_the_best_probe(
    top1: float, earlier: dict[int, float], said: str
) -> None:
    sentence = verdict(_by_labels(top1), {step: {"knn_top1": value} for step, value in earlier.items()})
    assert sentence.endswith(said)
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("earlier", "said"),
    [
        ({}, "features differ along 40 of 128 dimensions (centred RankMe)"),
        ({0: 90.0}, "features differ along 40 of 128 dimensions (centred RankMe)"),
        ({0: 90.0, 1000: 30.0}, ", up from 30 at step 1000: getting richer"),
        ({1000: 30.0, 2000: 60.0}, ", down from 60 at step 2000: getting poorer"),
        ({1000: 39.5}, ", 40 at step 1000: no clear change"),
    ],
)
def test_without_labels_the_rank_is_compared_with_the_last_trained_one(earlier: dict[int, float], said: str) -> None:
    found = Probe(128, True, 30.0, 40.0, 1.2, 0.1)
    sentence = verdict(found, {step: {"rankme_centred": value} for step, value in earlier.items()})
    assert sentence.endswith(said)


@pytest.mark.parametrize(
    ("top1", "earlier", "said"),
    [
        (
            0.10,
            {0: 0.8, 500: 0.1},
            "getting worse. The weights that the run began from had 80.0%, more: take them instead",
        ),
        (0.81, {0: 0.8, 500: 0.7}, "no clear change. The weights that the run began from had 80.0%"),
        (0.90, {500: 0.8}, "; up from 80.0% at step 500: learning"),
        (0.90, {}, "10.0%"),
    ],
)
def test_a_run_that_began_from_weights_is_compared_with_them(top1: float, earlier: dict[int, float], said: str) -> None:
    probes = {step: {"knn_top1": value} for step, value in earlier.items()}
    assert verdict(_by_labels(top1), probes, has_start=True).endswith(said)
    assert "began from" not in verdict(_by_labels(top1), probes)


def test_without_labels_it_is_compared_with_their_rank() -> None:
    found, ranks = Probe(128, True, 30.0, 40.0, 1.2, 0.1), {0: 90.0, 500: 40.0}
    sentence = verdict(found, {step: {"rankme_centred": rank} for step, rank in ranks.items()}, has_start=True)
    assert sentence.endswith("no clear change. The weights that the run began from had 90, more: the run has lost some")


def test_collapse_is_said_plainly() -> None:
    line = torch.linspace(-1, 1, 100)[:, None] * torch.arange(1.0, 9.0)
    assert verdict(probe(line), {}) == "the features have collapsed: the pictures differ along one line only"
    noise = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    same = verdict(probe(1.0 + 1e-3 * noise), {1: {"rankme_centred": 5.0}})
    assert same == "the features have collapsed: all pictures have nearly the same"
    assert "collapsed" not in verdict(probe(noise), {})


def test_features_that_are_not_finite_are_named() -> None:
    assert "diverged" in verdict(probe(torch.full((5, 3), torch.nan)), {})
