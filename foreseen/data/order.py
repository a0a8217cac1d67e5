"""Which sample stands at which place in the endless stream: a keyed permutation of the set, another one each epoch.

Position p belongs to epoch p // N and reads sample `permutation(seed, epoch)[p % N]`. Nothing is stored and nothing is
shuffled in memory: a Feistel network over the smallest power of two that holds N, walked until the result lies below
N (cycle walking, Black and Rogaway 2002), costs the same at position 0 and at position 10^10. Small sets, where few
rounds would not be uniform, sort random bits instead.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from foreseen.keys import MIX_2, mix, stream_constant

ORDER_VERSION = 1  # stands in checkpoints: another version is another stream
_ROUNDS = 8  # uniform from some thousand samples on; fewer are not
_SORTED_UP_TO = 4096
_ODD = np.array(MIX_2, dtype=np.uint64)

Positions = NDArray[np.int64]


class Order:
    """The stream of a set of `num_samples` samples.

    Args:
        seed: another seed is another stream.
        num_samples: samples in the set, N >= 1.
    """

    def __init__(self, seed: int, num_samples: int) -> None:
        if num_samples < 1:
            raise ValueError(f"an order needs at least one sample, got {num_samples}")
        self.seed = seed
        self.num_samples = num_samples
        self._bits = max(2, (num_samples - 1).bit_length())

    def samples(self, positions: Positions) -> Positions:
        """The sample that each position of the stream reads: [B] int64 -> [B] int64 in [0, N)."""
        epochs, places = np.divmod(positions, self.num_samples)
        first, last = int(epochs.min()), int(epochs.max())
        if first == last:
            return self._permute(first, places)
        out = np.empty_like(places)
        for epoch in range(first, last + 1):
            inside = epochs == epoch
            out[inside] = self._permute(epoch, places[inside])
        return out

    def _permute(self, epoch: int, places: Positions) -> Positions:
        if self.num_samples <= _SORTED_UP_TO:
            return _sorted_permutation(self.seed, epoch, self.num_samples)[places]
        keys = _round_keys(self.seed, epoch)
        values = _feistel(places.astype(np.uint64), keys, self._bits)
        while len(outside := np.flatnonzero(values >= self.num_samples)):
            values[outside] = _feistel(values[outside], keys, self._bits)
        return values.astype(np.int64)


def _epoch_keys(seed: int, epoch: int, n: int) -> NDArray[np.uint64]:
    base = np.uint64(stream_constant(f"order/{seed}/{epoch}"))
    return mix(base ^ np.arange(1, n + 1, dtype=np.uint64))


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> list[NDArray[np.uint64]]:
    # As arrays of no axes: with numpy's scalars every operation on a small block takes half as long again.
    return [np.array(key) for key in _epoch_keys(seed, epoch, _ROUNDS)]


@lru_cache(maxsize=4)
def _sorted_permutation(seed: int, epoch: int, num_samples: int) -> Positions:
    return np.argsort(_epoch_keys(seed, epoch, num_samples), kind="stable").astype(np.int64)


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
