"""Keyed randomness on the device: the same bits as `keys.py`, from torch's int64, on CPU and CUDA alike."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from foreseen.keys import MIX_1, MIX_2, Keys, stream_constant


def _signed(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return value - (1 << 64) if value >> 63 else value


def _shift_right(z: Tensor, bits: int) -> Tensor:
    # `>>` on int64 copies the sign bit; the mask makes it the unsigned shift.
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * _signed(MIX_1)
    z = (z ^ _shift_right(z, 27)) * _signed(MIX_2)
    return z ^ _shift_right(z, 31)


def as_tensor(keys: Keys) -> Tensor:
    """Keys as torch holds them: int64 with the same bits."""
    return torch.from_numpy(keys.view(np.int64))


def subkey(key: Tensor, tag: str) -> Tensor:
    """Keys for a second draw, view or forward that must not repeat the first one's numbers, [B] -> [B]."""
    return _mix(key ^ _signed(stream_constant(tag)))


def keyed_bits(key: Tensor, stream: str, n: int) -> Tensor:
    """Draw n random 64-bit integers per key.

    Args:
        key: one integer per image, [B] int64.
        stream: the name of what is drawn, such as "mask".
        n: numbers per image.

    Returns:
        [B, n] int64, the same bits on every device.
    """
    base = _mix(key + _signed(stream_constant(stream)))
    # The counter enters by xor: `arange * constant` under torch.compile is taken for index arithmetic.
    return _mix(base[:, None] ^ torch.arange(1, n + 1, device=key.device))


def keyed_uniform(key: Tensor, stream: str, n: int) -> Tensor:
    """Draw n uniform numbers per key: [B, n] float32 in [0, 1), multiples of 2**-24, exact on every device."""
    return ((keyed_bits(key, stream, n) >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def keyed_permutation(key: Tensor, stream: str, n: int) -> Tensor:
    """Draw one permutation of 0..n-1 per key: [B, n] int64."""
    return keyed_bits(key, stream, n).argsort(dim=1, stable=True)


@contextmanager
def library_generators_seeded(key: int) -> Iterator[None]:
    """Seed python, numpy and torch from a key for the library transforms run inside, then put them back."""
    python, legacy_numpy, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)
    torch.default_generator.manual_seed(key & ((1 << 63) - 1))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy_numpy)
        torch.set_rng_state(torch_state)
