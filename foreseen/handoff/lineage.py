"""Where an encoder comes from: what a reader needs to know, and to cite, before using it."""

from collections.abc import Mapping, Sequence
from typing import Any

from foreseen import __version__
from foreseen.config import Config
from foreseen.data.feed import Pictures


def describe_lineage(
    config: Config,
    shards: Pictures,
    step: int,
    parents: Sequence[Mapping[str, Any]],
    frozen_inputs: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The lineage of a run's encoder.

    Each parent is recorded with its own lineage, so the chain back to random weights is in one file, whatever happens
    to the parents' folders. `licences` are the terms of all data and public weights along it, where they are known.

    Args:
        config: of the run, resolved.
        shards: what it was trained on.
        step: updates made.
        parents: what its weights began from, of `parents_of` at its first start.
        frozen_inputs: checksums of the frozen networks that its targets came from; see `Objective.frozen_inputs`.
    """
    return {
        "method": config.method.name,
        "steps": step,
        "samples_seen": step * config.batch.global_size,
        "seed": config.seed,
        "licences": _licences(shards.licence, parents),
        "parents": list(parents),
        "frozen_inputs": dict(frozen_inputs or {}),
        "data": {
            "path": shards.address,
            "split": shards.split,
            "samples": len(shards),
            "fingerprint": shards.fingerprint,
            "source": shards.source,
            "licence": shards.licence,
        },
        "foreseen": __version__,
        "config": config.public(),
    }


def _licences(own: str | None, parents: Sequence[Mapping[str, Any]]) -> list[str]:
    found = {own} | {parent["licence"] for parent in parents}
    for parent in parents:
        inherited = parent["lineage"].get("licences")
        found |= set(map(str, inherited)) if isinstance(inherited, list) else set()
    return sorted(str(licence) for licence in found if licence)
