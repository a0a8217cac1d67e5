"""Where an encoder comes from: what a reader needs to know, and to cite, before using it."""

from collections.abc import Mapping, Sequence
from typing import Any

from foreseen import __version__
from foreseen.config import Config
from foreseen.data.feed import Pictures
from foreseen.handoff.terms import terms_of


def describe_lineage(
    config: Config,
    shards: Pictures,
    step: int,
    parents: Sequence[Mapping[str, Any]],
    frozen_inputs: Mapping[str, str] | None = None,
    teachers: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The lineage of a run's encoder.

    Each parent and teacher is recorded with its own lineage, so the chain back to random weights is in one file,
    whatever happens to their folders. `licences` are the terms of all data and public weights along it, where they are
    known; those of a teacher that are not are "unknown" among them.

    Args:
        config: of the run, resolved.
        shards: what it was trained on.
        step: updates made.
        parents: what its weights began from, of `parents_of` at its first start.
        frozen_inputs: checksums of the frozen networks that its targets came from; see `Objective.frozen_inputs`.
        teachers: what it learned from besides the data; see `Objective.teachers`.
    """
    return {
        "method": config.method.name,
        "steps": step,
        "samples_seen": step * config.batch.global_size,
        "seed": config.seed,
        "licences": _licences(shards.licence, parents, teachers),
        "parents": list(parents),
        "teachers": list(teachers),
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


def _licences(
    own: str | None, parents: Sequence[Mapping[str, Any]], teachers: Sequence[Mapping[str, Any]]
) -> list[str]:  # fmt: skip
    found = {own} | {parent["licence"] for parent in parents}
    for parent in parents:
        inherited = parent["lineage"].get("licences")
        found |= set(map(str, inherited)) if isinstance(inherited, list) else set()
    found |= {term for teacher in teachers for term in terms_of(teacher)}
    return sorted(str(licence) for licence in found if licence)
