import pytest
import torch
from torch import Tensor

from foreseen.engine.labelled import Labelled
from foreseen.engine.linear_probe import LEARNING_RATES, WEIGHT_DECAYS, _train, linear_probe
from foreseen.errors import BadInput


def _features(count: int, seed: int, scale: Tensor) -> Labelled:
    """Three classes that a plane separates, though not without error; features of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.eye(3, 6) * 2.0
    return Labelled((centres[labels] + torch.randn(count, 6, generator=generator)) * scale + 5 * scale, labels)


def _probe(scale: Tensor | None = None, seed: int = 0, judged: Labelled | None = None):  # type: ignore[no-untyped-def]
    scale = torch.ones(6) if scale is None else scale
    parts = [_features(count, number, scale) for number, count in enumerate((240, 90, 300))]
    if judged is not None:
        parts[2] = judged
    return linear_probe(*parts, num_classes=3, seed=seed)


def test_classes_that_a_plane_separates_are_told_apart() -> None:
    found = _probe()
    assert found.accuracy.top1 > 0.8  # the best rule for these gaussians is right on 87 %
    assert found.accuracy.top5 == 1.0
    assert found.lr in LEARNING_RATES
    assert found.weight_decay in WEIGHT_DECAYS


def test_features_of_very_different_scale_count_alike() -> None:
    uneven = _probe(torch.tensor([1e-2, 1.0, 100.0, 1e-2, 1.0, 100.0]))
    assert abs(uneven.accuracy.top1 - _probe().accuracy.top1) < 0.02


def test_a_seed_gives_the_same_bits_and_touches_no_global_generator() -> None:
    before = torch.get_rng_state()
    assert _probe() == _probe()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_validation_nothing_is_chosen() -> None:
    part = _features(30, 0, torch.ones(6))
    with pytest.raises(BadInput, match="--no-linear"):
        linear_probe(part, Labelled(part.features[:0], part.labels[:0]), part, num_classes=3, seed=0)


def test_weight_decay_is_swept_and_never_costs_on_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = _probe()
    found = []
    for decay in WEIGHT_DECAYS:
        monkeypatch.setattr("foreseen.engine.linear_probe.WEIGHT_DECAYS", (decay,))
        found.append(_probe())
    assert [probe.weight_decay for probe in found] == list(WEIGHT_DECAYS)
    assert swept.validation_top1 == max(probe.validation_top1 for probe in found)
    assert swept in found
    train = _features(240, 0, torch.ones(6))
    weights, bias = _train(train.features, train.labels, [(0.1, 0.0), (0.1, 0.1)], 3, 0)
    assert weights[1].norm() < 0.5 * weights[0].norm()
    assert bias.isfinite().all()


def test_the_judged_pictures_choose_nothing() -> None:
    honest = _probe()
    shuffled = _features(300, 2, torch.ones(6))
    wrong = _probe(judged=Labelled(shuffled.features, (shuffled.labels + 1) % 3))
    assert (wrong.lr, wrong.weight_decay) == (honest.lr, honest.weight_decay)
    assert wrong.validation_top1 == honest.validation_top1
    assert wrong.accuracy.top1 < 0.2
