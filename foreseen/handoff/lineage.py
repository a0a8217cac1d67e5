"""Where an encoder comes from: what a reader needs to know, and to cite, before using it."""

from typing import Any

from foreseen import __version__
from foreseen.config import Config
from foreseen.data.manifest import read_manifest
from foreseen.data.shards import ShardSet


def describe_lineage(config: Config, shards: ShardSet, step: int) -> dict[str, Any]:
    """The lineage of a run's encoder.

    Args:
        config: of the run, resolved.
        shards: what it was trained on.
        step: updates made.
    """
    manifest = read_manifest(shards.path).splits[shards.split]
    return {
        "method": config.method.name,
        "steps": step,
        "samples_seen": step * config.batch.global_size,
        "seed": config.seed,
        "parents": [config.model.init_from] if config.model.init_from else [],
        "data": {
            "split": shards.split,
            "samples": len(shards),
            "fingerprint": shards.fingerprint,
            "source": manifest.source,
            "licence": manifest.licence,
        },
        "foreseen": __version__,
        "config": config.model_dump(mode="json"),
    }
