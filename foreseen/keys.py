"""Keyed randomness: every random draw is a pure function of (seed, position, stream).

A sample's key is made from the seed and the sample's position in the endless stream of samples. Whoever needs random
numbers for it (a crop in a worker, a mask on the device, drop path deep in a block) hashes that key with the name of
a stream, so the numbers do not depend on ranks, workers, batch sizes or on what was drawn before. The hash is the
finaliser of splitmix64 (Steele et al. 2014; Vigna's constants), in 64-bit integers that wrap.

This file draws with numpy, for order and for workers; `device_keys.py` draws the same bits with torch.

Three rules. Permutations sort bits, stably, not floats (24 bits have ties). A second view or a second forward draws
from a subkey, or it would repeat the first one's numbers. Streams are names, never numbers from a list.
"""

import hashlib
from collections.abc import Iterable
from functools import cache

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1


@cache
def stream_constant(name: str) -> int:
    """The unsigned 64-bit constant of a named stream."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def mix(z: Keys) -> Keys:
    """splitmix64's finaliser, element by element: a bijection of 64-bit integers that looks random."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, positions: NDArray[np.int64]) -> Keys:
    """One key per position of the stream, [B] uint64."""
    base = mix(np.array([(seed * _GOLDEN + stream_constant("sample")) & _MASK64], dtype=np.uint64))
    return mix(positions.astype(np.uint64) ^ base)


def name_keys(names: Iterable[str]) -> Keys:
    """One key per name, [N] uint64, for what must not depend on a sample's place among the others."""
    digests = (hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest() for name in names)
    return np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def subkeys(keys: Keys, tag: str) -> Keys:
    """Keys for a second draw or view that must not repeat the first one's numbers, [B] -> [B]."""
    return mix(keys ^ np.uint64(stream_constant(tag)))


def uniform(keys: Keys, stream: str, n: int) -> NDArray[np.float32]:
    """Draw n uniform numbers per key: [B, n] float32 in [0, 1), multiples of 2**-24."""
    base = mix(keys + np.uint64(stream_constant(stream)))
    bits = mix(base[:, None] ^ np.arange(1, n + 1, dtype=np.uint64))
    return ((bits >> np.uint64(40)) & np.uint64(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)
