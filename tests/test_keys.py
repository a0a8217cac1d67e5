"""Keyed randomness has the bits it promises, with numpy and with torch, and they look random."""

import random

import numpy as np
import pytest
import torch

from foreseen.device_keys import (
    as_tensor,
    keyed_bits,
    keyed_permutation,
    keyed_uniform,
    library_generators_seeded,
    subkey,
)  # fmt: skip
from foreseen.keys import sample_keys, stream_constant, subkeys, uniform

MASK64 = (1 << 64) - 1
SEEDS = [0, 1, 2**31, 2**63 - 1]


def big_mix(z: int) -> int:
    """splitmix64's finaliser in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    return z ^ (z >> 31)


def big_sample_key(seed: int, position: int) -> int:
    return big_mix(position ^ big_mix((seed * 0x9E3779B97F4A7C15 + stream_constant("sample")) & MASK64))


def big_bits(key: int, stream: str, n: int) -> list[int]:
    base = big_mix((key + stream_constant(stream)) & MASK64)
    return [big_mix(base ^ (i + 1)) for i in range(n)]


@pytest.mark.parametrize("seed", SEEDS)
def test_numpy_and_torch_and_big_integers_agree(seed: int) -> None:
    positions = [0, 1, 2, 255, 10**6, 10**12, 2**62]
    made = sample_keys(seed, np.array(positions, dtype=np.int64))
    expected = [big_sample_key(seed, position) for position in positions]
    assert made.tolist() == expected
    assert [key & MASK64 for key in as_tensor(made).tolist()] == expected

    bits = [big_bits(key, "mask", 9) for key in expected]
    assert [[b & MASK64 for b in row] for row in keyed_bits(as_tensor(made), "mask", 9).tolist()] == bits
    exact = [[(b >> 40) * 2.0**-24 for b in row] for row in bits]
    assert uniform(made, "mask", 9).tolist() == exact
    assert keyed_uniform(as_tensor(made), "mask", 9).tolist() == exact


def test_subkeys_agree_and_differ_from_their_key_and_from_each_other() -> None:
    made = sample_keys(7, np.arange(100))
    one, two = subkeys(made, "view/a/0"), subkeys(made, "view/a/1")
    assert one.tolist() == [big_mix(key ^ stream_constant("view/a/0")) for key in made.tolist()]
    assert torch.equal(subkey(as_tensor(made), "view/a/0"), as_tensor(one))
    assert len({*made.tolist(), *one.tolist(), *two.tolist()}) == 300


def test_seeds_positions_and_streams_give_other_numbers() -> None:
    positions = np.arange(1000)
    drawn = [uniform(sample_keys(seed, positions), stream, 4) for seed in (0, 1) for stream in ("mask", "drop_path")]
    flat = np.stack([numbers.ravel() for numbers in drawn])
    correlation = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlation).max() < 0.06  # four sigma of 4000 pairs


def test_a_number_does_not_depend_on_how_many_are_drawn() -> None:
    made = sample_keys(0, np.arange(5))
    assert np.array_equal(uniform(made, "mask", 196)[:, :7], uniform(made, "mask", 7))
    assert np.array_equal(uniform(made, "mask", 7)[3:4], uniform(made[3:4], "mask", 7))


def test_numbers_are_uniform() -> None:
    numbers = keyed_uniform(as_tensor(sample_keys(0, np.arange(20_000))), "mask", 10).flatten()
    assert 0 <= numbers.min() < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 4 * (1 / 12 / 200_000) ** 0.5
    counts = torch.histc(numbers, 256, 0, 1)
    expected = 200_000 / 256
    assert 0.7 < ((counts - expected) ** 2 / expected).sum() / 255 < 1.4  # chi square per degree of freedom


def test_one_flipped_bit_of_a_key_flips_half_of_the_bits() -> None:
    key = torch.tensor([random.Random(0).getrandbits(62)])
    flipped = torch.stack([key[0] ^ (1 << bit) for bit in range(63)])
    difference = keyed_bits(key, "mask", 1) ^ keyed_bits(flipped, "mask", 1)
    share = sum((value & MASK64).bit_count() for value in difference.flatten().tolist()) / (63 * 64)
    assert 0.47 < share < 0.53


@pytest.mark.parametrize("n", [1, 2, 16, 196, 1000])
def test_permutations_are_permutations(n: int) -> None:
    made = keyed_permutation(as_tensor(sample_keys(0, np.arange(50))), "mask", n)
    assert torch.equal(made.sort(dim=1).values, torch.arange(n).expand(50, n))
    assert n < 16 or len({tuple(row) for row in made.tolist()}) == 50


def test_every_place_of_a_permutation_is_as_likely() -> None:
    first = keyed_permutation(as_tensor(sample_keys(0, np.arange(8000))), "mask", 8)[:, 0]
    counts = torch.bincount(first, minlength=8).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 24.3  # chi square of 7 degrees, one in a thousand


def test_library_generators_are_seeded_inside_and_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    def seed() -> None:
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    undisturbed = [draw(), draw()]
    seed()
    found, inside = [draw()], []
    for key in (5, 5, MASK64):
        with library_generators_seeded(key):
            inside.append(draw())
    assert [*found, draw()] == undisturbed
    assert inside[0] == inside[1] != inside[2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_draws_the_same_bits() -> None:
    key = as_tensor(sample_keys(0, np.arange(1000)))
    for draw in (keyed_bits, keyed_uniform, keyed_permutation):
        assert torch.equal(draw(key.cuda(), "mask", 196).cpu(), draw(key, "mask", 196))
    assert torch.equal(subkey(key.cuda(), "view").cpu(), subkey(key, "view"))


def test_keys_do_not_change_between_versions() -> None:
    # They key every run ever made: another constant is another run.
    assert stream_constant("sample") == 940936898388196638
    assert sample_keys(3, np.array([5])).tolist() == [6642063936471519919]
