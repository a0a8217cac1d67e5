"""Whether an encoder's training, without labels or with them, has seen the pictures that it is judged by."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from foreseen.data.open_set import recall_set
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput

_CRC32 = np.uint64(0xFFFFFFFF)  # its part of a picture's digest


def count_seen(lineage: Mapping[str, Any], test: ShardSet) -> int | None:
    """How many pictures of a split are, byte for byte, among those that an encoder or those before it were trained on.

    Args:
        lineage: of the encoder, with those of its parents and teachers.
        test: the split.

    Returns:
        The number; None where it cannot be told, as the training's shards are gone, were never named, or have no
        checksums. Pictures that were shrunk or encoded anew in between are not recognised.
    """
    ours = test.picture_digests()
    seen = np.zeros(len(ours), dtype=bool)
    for shards in _trained_on(lineage):
        if shards is None:
            return None
        theirs = shards.picture_digests()
        if not (ours & _CRC32).all() or not (theirs & _CRC32).all():
            return None
        seen |= np.isin(ours, theirs)
    return int(seen.sum())


def describe_seen(count: int | None, test: ShardSet, who: str = "pretraining") -> str | None:
    """A sentence on `count_seen`; None where no picture was seen."""
    if count is None:
        return f"Whether {who} saw the test pictures could not be checked."
    if count == 0:
        return None
    return f"TRANSDUCTIVE: {who} saw {count} of the {len(test)} test pictures, so this is no headline."


def _trained_on(lineage: Mapping[str, Any]) -> Iterator[ShardSet | None]:
    data = lineage.get("data")
    yield _open(data) if isinstance(data, dict) else None
    for parent in [*(lineage.get("parents") or []), *(lineage.get("teachers") or [])]:
        yield from _trained_on(parent["lineage"])


def _open(data: Mapping[str, Any]) -> ShardSet | None:
    try:
        shards = recall_set(str(data["path"]), data["split"])
    except (BadInput, KeyError):
        return None
    return shards if shards.fingerprint == data["fingerprint"] else None
