"""Sets that are broken on purpose."""

import shutil
from pathlib import Path

from foreseen.data.shards import ShardSet


def with_a_shard_of_garbage(shards: Path, out: Path, shard: str = "train-000001.tar") -> Path:
    """A copy of a set in which the pictures of one shard are noise; its size and its headers are as they were."""
    shutil.copytree(shards, out)
    whole = ShardSet.open(shards, "train")
    content = bytearray((out / shard).read_bytes())
    for sample in samples_of(whole, shard):
        picture = whole.read(sample)
        at = content.find(picture)
        content[at : at + len(picture)] = bytes((31 * byte + place) % 256 for place, byte in enumerate(picture))
    (out / shard).write_bytes(content)
    return out


def samples_of(shards: ShardSet, shard: str) -> list[int]:
    """The numbers of the samples in a shard."""
    return [sample for sample in range(len(shards)) if shards.shard_and_key(sample)[0] == shard]
