"""An attentive probe finds evidence that the mean of the patches drowns, and chooses by validation alone."""

import numpy as np
import pytest
import torch
from torch import Tensor

from foreseen.engine.attentive_probe import LEARNING_RATES, WEIGHT_DECAYS, Patches, _Heads, attentive_probe
from foreseen.engine.labelled import Labelled, TrainedProbe
from foreseen.engine.linear_probe import linear_probe
from foreseen.errors import BadInput

SIZES = (300, 120, 240)
LENGTH, WIDTH = 16, 12


def _pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """One patch of each picture, marked by a feature, tells its class; the others speak loudly of other classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    said = torch.randint(0, 3, (count, LENGTH), generator=generator)
    place = torch.randint(0, LENGTH, (count,), generator=generator)
    said[torch.arange(count), place] = labels
    patches = 0.3 * torch.randn(count, LENGTH, WIDTH, generator=generator)
    patches[..., :3] += torch.eye(3)[said]
    patches[torch.arange(count), place, 3] += 3.0
    return patches, labels


def _probe(seed: int = 0, turned: bool = False) -> TrainedProbe:
    parts = [Patches(patches.numpy(), labels) for patches, labels in (_pictures(n, s) for s, n in enumerate(SIZES))]
    if turned:
        parts[2] = Patches(parts[2].features, (parts[2].labels + 1) % 3)
    return attentive_probe(*parts, num_classes=3, seed=seed, device=torch.device("cpu"))


def test_it_looks_where_the_evidence_is() -> None:
    means = [Labelled(patches.mean(1), labels) for patches, labels in (_pictures(n, s) for s, n in enumerate(SIZES))]
    found, of_means = _probe(), linear_probe(*means, num_classes=3, seed=0)
    assert found.accuracy.top1 > 0.9
    assert found.accuracy.top1 > of_means.accuracy.top1 + 0.2
    assert found.lr in LEARNING_RATES
    assert found.weight_decay in WEIGHT_DECAYS
    assert found.accuracy.top5 == 1.0


def test_a_seed_gives_the_same_bits_and_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    assert _probe(3) == _probe(3)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_judged_pictures_choose_nothing() -> None:
    honest, wrong = _probe(), _probe(turned=True)
    assert (wrong.lr, wrong.weight_decay, wrong.validation_top1) == (
        honest.lr, honest.weight_decay, honest.validation_top1,
    )  # fmt: skip
    assert wrong.accuracy.top1 < 0.1


def test_the_reordered_products_are_torchs_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs, heads, size, classes = 2, 3, 4, 5
    width = heads * size
    draw = [(pairs, heads, size), (pairs, heads, size, width), (pairs, heads, size, width), (pairs, classes, width)]
    parts = _Heads(*(torch.randn(*shape, generator=generator) for shape in draw), bias=torch.randn(pairs, classes))
    patches = torch.randn(6, 7, width, generator=generator)
    logits = parts.logits(patches)
    for pair in range(pairs):
        keys, values = (
            torch.einsum("bld,hsd->bhls", patches, projection[pair]) for projection in (parts.key, parts.value)
        )
        query = parts.query[pair][None, :, None].expand(6, -1, -1, -1)
        pooled = torch.nn.functional.scaled_dot_product_attention(query, keys, values)[:, :, 0].flatten(1)
        torch.testing.assert_close(logits[pair], pooled @ parts.weight[pair].T + parts.bias[pair])


def test_without_validation_nothing_is_chosen() -> None:
    patches, labels = _pictures(30, 0)
    some, none = Patches(patches.numpy(), labels), Patches(np.zeros((0, LENGTH, WIDTH)), labels[:0])
    with pytest.raises(BadInput, match="leave out --attentive or label more"):
        attentive_probe(some, none, some, num_classes=3, seed=0, device=torch.device("cpu"))
    with pytest.raises(BadInput, match="to be judged"):
        attentive_probe(some, some, none, num_classes=3, seed=0, device=torch.device("cpu"))
