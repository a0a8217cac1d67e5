"""Which sample stands at which place in the endless stream: a keyed permutation of the set, another one each epoch.

Position p belongs to epoch p // N and reads sample `permutation(seed, epoch)[p % N]`. Nothing is stored and nothing is
shuffled in memory: a Feistel network over the smallest power of two that holds N, walked until the result lies below
N (cycle walking, Black and Rogaway 2002), costs the same at position 0 and at position 10^10. Small sets, where few
rounds would not be uniform, sort random bits instead.

Where shards are fetched whole, a permutation of all samples would fetch every shard all the time. `BlockOrder` permutes
the shards, cuts them into blocks, and permutes the samples within each block: a block is all that need be at hand.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foreseen.keys import MIX_2, mix, stream_constant

ORDER_VERSION = 1  # stands in checkpoints: another version is another stream
FULL = "full"
_ROUNDS = 8  # uniform from some thousand samples on; fewer are not
_SORTED_UP_TO = 4096
_MASK64 = (1 << 64) - 1
_ODD = np.array(MIX_2, dtype=np.uint64)

Positions = NDArray[np.int64]


class SampleOrder(Protocol):
    """A function from positions of the stream to samples.

    Attributes:
        num_samples: samples in the set, N; each stands once in every N positions from a multiple of N on, but where
            classes are balanced.
        name: what a checkpoint calls it: another name is another stream.
    """

    @property
    def num_samples(self) -> int: ...
    @property
    def name(self) -> str: ...
    def samples(self, positions: Positions) -> Positions: ...


class Order:
    """The stream of a set of `num_samples` samples.

    Args:
        seed: another seed is another stream.
        num_samples: samples in the set, N >= 1.
    """

    name = FULL

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.seed = seed
        self.num_samples = num_samples

    def samples(self, positions: Positions) -> Positions:
        """The sample that each position of the stream reads: [B] int64 -> [B] int64 in [0, N)."""
        epochs, places = np.divmod(positions, self.num_samples)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return _permute(stream_constant(f"order/{self.seed}/{first}"), self.num_samples, places)
        out = np.empty_like(places)
        for epoch in range(first, last + 1):
            inside = epochs == epoch
            key = stream_constant(f"order/{self.seed}/{epoch}")
            out[inside] = _permute(key, self.num_samples, places[inside])
        return out


class _Epoch(NamedTuple):
    """How an epoch is laid out: shards in their order of this epoch, S of them, in blocks.

    Attributes:
        shards: number of each shard, [S].
        ends: places of the epoch that end with each shard, [S].
        block_ends: the same of each block.
    """

    shards: Positions
    ends: Positions
    block_ends: Positions


class BlockOrder:
    """The stream of a set whose shards are read a block at a time.

    Args:
        seed: another seed is another stream.
        shard_samples: samples of each shard that take part, S numbers; sample numbers count through the shards.
        block_shards: shards in a block, except for the last of an epoch.
    """

    def __init__(self, seed: int, shard_samples: Sequence[int], block_shards: int) -> None:
        self._counts = np.asarray(shard_samples, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])
        self.num_samples = int(self._starts[-1])
        if self.num_samples < 1:
            raise ValueError("an order needs at least one sample, got 0")
        self.seed, self.block_shards = seed, block_shards
        self.name = f"blocks of {block_shards} shards"
        self._layout = lru_cache(maxsize=2)(self._lay_out)

    def __reduce__(self) -> tuple[type["BlockOrder"], tuple[int, list[int], int]]:
        return type(self), (self.seed, self._counts.tolist(), self.block_shards)

    def samples(self, positions: Positions) -> Positions:
        """The sample that each position of the stream reads: [B] int64 -> [B] int64 in [0, N)."""
        out = np.empty_like(positions)
        epochs, places = np.divmod(positions, self.num_samples)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1):
            layout = self._layout(epoch)
            blocks = np.where(epochs == epoch, np.searchsorted(layout.block_ends, places, side="right"), -1)
            for block in np.unique(blocks[blocks >= 0]).tolist():
                inside = blocks == block
                out[inside] = self._within(epoch, block, places[inside])
        return out

    def shards_ahead(self, position: int) -> list[int]:
        """Shards of the block in which a position stands, and of the one that follows."""
        epoch, place = divmod(position, self.num_samples)
        layout = self._layout(epoch)
        block = int(np.searchsorted(layout.block_ends, place, side="right"))
        chosen = layout.shards[block * self.block_shards : (block + 2) * self.block_shards]
        if block + 1 == len(layout.block_ends):
            chosen = np.concatenate([chosen, self._layout(epoch + 1).shards[: self.block_shards]])
        found: list[int] = chosen[self._counts[chosen] > 0].tolist()
        return found

    def _within(self, epoch: int, block: int, places: Positions) -> Positions:
        layout = self._layout(epoch)
        begin = int(layout.block_ends[block - 1]) if block else 0
        key = stream_constant(f"order/{self.seed}/{epoch}/blocks")
        drawn = begin + _permute(
            int(mix(np.array([(key + block) & _MASK64], dtype=np.uint64))[0]),
            int(layout.block_ends[block]) - begin,
            places - begin,
        )
        row = np.searchsorted(layout.ends, drawn, side="right")
        shard = layout.shards[row]
        return self._starts[shard] + drawn - (layout.ends[row] - self._counts[shard])

    def _lay_out(self, epoch: int) -> _Epoch:
        key = stream_constant(f"order/{self.seed}/{epoch}/shards")
        shards = np.argsort(_numbered_keys(key, len(self._counts)), kind="stable").astype(np.int64)
        ends = np.cumsum(self._counts[shards])
        block_ends = ends[self.block_shards - 1 :: self.block_shards]
        if len(shards) % self.block_shards:
            block_ends = np.append(block_ends, ends[-1])
        return _Epoch(shards, ends, block_ends)


class RepeatedOrder:
    """The stream of another order in which each sample stands several times in one global batch.

    A global batch of G positions holds ceil(G / R) samples, one after the other and then all of them again, so that
    neighbours, which are mixed, are different samples; where R does not divide G, the last ones stand once less. Each
    time a sample is augmented anew, since its position differs. An epoch, N positions, sees one sample in R.

    Args:
        order: of the samples.
        repeats: how often each stands in a global batch, R >= 1.
        global_size: positions of a global batch, G.

    Source: Hoffer et al. 2020, arXiv:1901.09335; facebookresearch/deit at 7e160fe, samplers.py, which gives the copies
    of a sample to different devices.
    """

    def __init__(self, order: SampleOrder, repeats: int, global_size: int) -> None:
        self.order, self.repeats, self.global_size = order, repeats, global_size
        self.num_samples = order.num_samples
        self.name = f"{order.name}, {repeats} times each in {global_size}"

    def samples(self, positions: Positions) -> Positions:
        """The sample that each position of the stream reads: [B] int64 -> [B] int64 in [0, N)."""
        return self.order.samples(self.places(positions))

    def places(self, positions: Positions) -> Positions:
        """The position of the other order that each position repeats: [B] int64 -> [B] int64."""
        distinct = -(-self.global_size // self.repeats)
        steps, within = np.divmod(positions, self.global_size)
        places: Positions = steps * distinct + within % distinct
        return places


def _permute(key: int, n: int, places: Positions) -> Positions:
    """Where the permutation of [0, n) that belongs to a key takes some places."""
    if n <= _SORTED_UP_TO:
        return _sorted_permutation(key, n)[places]
    bits, keys = max(2, (n - 1).bit_length()), _round_keys(key)
    values = _feistel(places.astype(np.uint64), keys, bits)
    while len(outside := np.flatnonzero(values >= n)):
        values[outside] = _feistel(values[outside], keys, bits)
    return values.astype(np.int64)


def _numbered_keys(key: int, n: int) -> NDArray[np.uint64]:
    return mix(np.uint64(key) ^ np.arange(1, n + 1, dtype=np.uint64))


@lru_cache(maxsize=8)
def _round_keys(key: int) -> list[NDArray[np.uint64]]:
    # As arrays of no axes: with numpy's scalars every operation on a small block takes half as long again.
    return [np.array(round_key) for round_key in _numbered_keys(key, _ROUNDS)]


@lru_cache(maxsize=4)
def _sorted_permutation(key: int, n: int) -> Positions:
    return np.argsort(_numbered_keys(key, n), kind="stable").astype(np.int64)


def _feistel(values: NDArray[np.uint64], keys: list[NDArray[np.uint64]], bits: int) -> NDArray[np.uint64]:
    # The halves have bits // 2 and bits - bits // 2 bits and change sides each round; an even number of rounds
    # brings the widths back.
    narrow, wide = bits // 2, bits - bits // 2
    left, right = values >> np.uint64(wide), values & np.uint64((1 << wide) - 1)
    to_left, to_right = (np.array(64 - width, dtype=np.uint64) for width in (narrow, wide))
    for key in keys:
        # The high bits of a product depend on all bits of the factor: enough for one round of eight, and a third of
        # the cost of the full hash.
        scrambled = ((right ^ key) * _ODD) >> to_left
        left, right = right, left ^ scrambled
        to_left, to_right = to_right, to_left
    return (left << np.uint64(wide)) | right
