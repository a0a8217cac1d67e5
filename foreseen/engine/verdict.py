"""One plain sentence on how a run is doing, from its probes."""

import math
from collections.abc import Mapping

from foreseen.engine.probe import Probe

_SAME_FEATURE = 1e-4  # share of the features' mean square that differs between pictures; a trained MAE has 1e-2
_MOVED = 0.05  # of a rank, which does not waver between probes of the same pictures


def verdict(probe: Probe, earlier: Mapping[int, Mapping[str, float]], *, has_start: bool = False) -> str:
    """Say how the features are, and how they move.

    Args:
        probe: the newest.
        earlier: by step, what earlier probes of the same run logged (`Probe.values`); empty for a single probe.
        has_start: whether the weights of step 0 had learned something, so that they are what the run has to beat.

    Returns:
        One or two sentences. By labels where there are some: against always naming the commonest class and against the
        best earlier probe, where a difference counts from two of its standard errors on. Else by the rank of the
        features, which shows collapse and change but cannot tell what they are good for. Where there is a start, the
        second sentence compares with it.
    """
    if not probe.is_finite or probe.rankme_centred is None or probe.spread is None:
        return "the features are not finite: the run has diverged"
    if probe.spread < _SAME_FEATURE:
        return "the features have collapsed: all pictures have nearly the same"
    if probe.rankme_centred < 2.0:
        return "the features have collapsed: the pictures differ along one line only"
    start = earlier.get(0) if has_start else None
    if probe.knn or probe.linear:
        return _by_labels(probe, earlier, start)
    return _by_rank(probe.rankme_centred, probe.dimensions, earlier, start)


def _by_labels(probe: Probe, earlier: Mapping[int, Mapping[str, float]], start: Mapping[str, float] | None) -> str:
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
    best = f"{seen[step]:.1%} at step {step}"
    text += "; " + _moved(score, seen[step], best, _noise(score, seen[step], probe.judged), "learning", "getting worse")
    if start is not None and name in start:
        noise = _noise(score, start[name], probe.judged)
        text += _against_start(score, start[name], f"{start[name]:.1%}", noise, "take them instead")
    return text


def _moved(now: float, before: float, named: str, noise: float, up: str, down: str) -> str:
    if now > before + noise:
        return f"up from {named}: {up}"
    if now < before - noise:
        return f"down from {named}: {down}"
    return f"{named}: no clear change"


def _against_start(now: float, start: float, named: str, noise: float, if_less: str) -> str:
    text = f". The weights that the run began from had {named}"
    return f"{text}, more: {if_less}" if now < start - noise else text


def _noise(one: float, other: float, pictures: int) -> float:
    """Two standard errors of the difference between two accuracies on so many pictures."""
    share = (one + other) / 2
    return 2 * math.sqrt(2 * share * (1 - share) / pictures)


def _by_rank(
    rank: float, dimensions: int, earlier: Mapping[int, Mapping[str, float]], start: Mapping[str, float] | None
) -> str:
    text = f"features differ along {rank:.0f} of {dimensions} dimensions (centred RankMe)"
    # Features of random weights have a high rank that says nothing, so step 0 is no point to compare with.
    seen = {step: n["rankme_centred"] for step, n in earlier.items() if step > 0 and "rankme_centred" in n}
    if seen:
        step = max(seen)
        before = f"{seen[step]:.0f} at step {step}"
        text += ", " + _moved(rank, seen[step], before, _MOVED * seen[step], "getting richer", "getting poorer")
    if start is not None and "rankme_centred" in start:
        was = start["rankme_centred"]
        text += _against_start(rank, was, f"{was:.0f}", _MOVED * was, "the run has lost some")
    return text
