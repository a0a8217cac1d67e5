"""One plain sentence on how a run is doing, from its probes."""

import math
from collections.abc import Mapping

from foreseen.engine.probe import Probe

_SAME_FEATURE = 1e-4  # share of the features' mean square that differs between pictures; a trained MAE has 1e-2
_MOVED = 0.05  # of a rank, which does not waver between probes of the same pictures


def verdict(probe: Probe, earlier: Mapping[int, Mapping[str, float]]) -> str:
    """Say how the features are, and how they move.

    Args:
        probe: the newest.
        earlier: by step, what earlier probes of the same run logged (`Probe.values`); empty for a single probe.

    Returns:
        A sentence. By labels where there are some: against always naming the commonest class and against the best
        earlier probe, where a difference counts from two of its standard errors on. Else by the rank of the features,
        which shows collapse and change but cannot tell what they are good for.
    """
    if not probe.is_finite or probe.rankme_centred is None or probe.spread is None:
        return "the features are not finite: the run has diverged"
    if probe.spread < _SAME_FEATURE:
        return "the features have collapsed: all pictures have nearly the same"
    if probe.rankme_centred < 2.0:
        return "the features have collapsed: the pictures differ along one line only"
    if probe.knn or probe.linear:
        return _by_labels(probe, earlier)
    return _by_rank(probe.rankme_centred, probe.dimensions, earlier)


def _by_labels(probe: Probe, earlier: Mapping[int, Mapping[str, float]]) -> str:
    values = probe.values()
    name = "knn_top1" if "knn_top1" in values else "linear_top1"
    score, chance = values[name], probe.chance or 0.0
    what = f"k-NN (k = {probe.headline})" if name == "knn_top1" else "a linear probe"
    text = f"{what} is right on {score:.1%} of {probe.judged} pictures, naming the commonest class on {chance:.1%}"
    if score - chance < _noise(score, chance, probe.judged):
        text += ", so no better than guessing"
    seen = {step: numbers[name] for step, numbers in earlier.items() if name in numbers}
    if not seen:
        return text
    step = max(seen, key=lambda number: seen[number])
    change, noise = score - seen[step], _noise(score, seen[step], probe.judged)
    best = f"{seen[step]:.1%} at step {step}"
    if change > noise:
        return f"{text}; up from {best}: learning"
    if change < -noise:
        return f"{text}; down from {best}: getting worse"
    return f"{text}; {best}: no clear change"


def _noise(one: float, other: float, pictures: int) -> float:
    """Two standard errors of the difference between two accuracies on so many pictures."""
    share = (one + other) / 2
    return 2 * math.sqrt(2 * share * (1 - share) / pictures)


def _by_rank(rank: float, dimensions: int, earlier: Mapping[int, Mapping[str, float]]) -> str:
    text = f"features differ along {rank:.0f} of {dimensions} dimensions (centred RankMe)"
    # Features of random weights have a high rank that says nothing, so step 0 is no point to compare with.
    seen = {step: n["rankme_centred"] for step, n in earlier.items() if step > 0 and "rankme_centred" in n}
    if not seen:
        return text
    step = max(seen)
    before = f"{seen[step]:.0f} at step {step}"
    if rank > (1 + _MOVED) * seen[step]:
        return f"{text}, up from {before}: getting richer"
    if rank < (1 - _MOVED) * seen[step]:
        return f"{text}, down from {before}: getting poorer"
    return f"{text}, {before}: no clear change"
