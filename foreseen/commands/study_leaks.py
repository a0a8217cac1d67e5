"""Weights from elsewhere that know labels which a study's cell is not given.

A lineage says what a network was trained on, and what it began from; a run of `foreseen finetune` has learned from
labels. Weights without a lineage, public ones or those that others made, cannot be told.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foreseen.data.shards import ShardSet

_LABELLED = ("supervised", "distill")


def labels_known(lineage: Mapping[str, Any], shards: ShardSet) -> Iterator[Mapping[str, Any]]:
    """Each training on labels of a set that a network has behind it.

    Args:
        lineage: of the network.
        shards: the split whose labels are meant.

    Yields:
        The lineage of that training.
    """
    if lineage.get("method") in _LABELLED and (lineage.get("data") or {}).get("fingerprint") == shards.fingerprint:
        yield lineage
    for before in [*(lineage.get("parents") or []), *(lineage.get("teachers") or [])]:
        if isinstance(before, Mapping):
            yield from labels_known(before.get("lineage") or {}, shards)


def leak_of(
    lineage: Mapping[str, Any], shards: ShardSet, shots: int | None, seeds: Sequence[int], held_out: float
) -> str | None:
    """What a network knows that the cells which it is used in do not; None where nothing is found.

    Args:
        lineage: of the network.
        shards: the split that the cells train on.
        shots: labels a class that they have; None for all.
        seeds: of their labels.
        held_out: the share of each class that validation has, which decides with the seed what the labels are.
    """
    for training in labels_known(lineage, shards):
        data = (training.get("config") or {}).get("data") or {}
        known = data.get("shots"), data.get("subset_seed"), data.get("validation_fraction")
        if any(known != (shots, seed, held_out) for seed in seeds):
            count = (training.get("result") or {}).get("training_samples", "an unknown number")
            return f"it has learned from labels of this very set ({count}), others than each seed has here: a leak"
    return None
