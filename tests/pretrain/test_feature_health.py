"""The spread of features comes out of sums as it does out of the features themselves."""

import pytest
import torch
from torch import Tensor

from foreseen.engine.spectrum import rankme_centred, spread
from foreseen.pretrain.feature_health import FeatureHealth


def _numbers(*micro_batches: Tensor) -> dict[str, Tensor]:
    health = FeatureHealth()
    for features in micro_batches:
        health.add(features)
    health.all_reduce()
    return health.numbers()


def _diversity(*micro_batches: Tensor) -> float:
    health = FeatureHealth()
    for patches in micro_batches:
        health.add(patches[:, 0], patches)
    return float(health.numbers()["patch_diversity"])


def test_rank_and_spread_are_those_of_all_features_together() -> None:
    features = torch.randn(48, 12, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 12).double()) + 2.0
    numbers = _numbers(*features.split(16))
    assert float(numbers["feature_rank"]) == pytest.approx(rankme_centred(features), rel=1e-6)
    assert float(numbers["feature_spread"]) == pytest.approx(spread(features), rel=1e-9)


def test_features_on_a_line_have_rank_one_and_equal_ones_no_spread() -> None:
    line = torch.outer(torch.linspace(-1, 1, 32), torch.ones(6)).double() + 3.0
    assert float(_numbers(line)["feature_rank"]) == pytest.approx(1.0, abs=1e-2)
    same = _numbers(torch.ones(32, 6))
    assert float(same["feature_spread"]) < 1e-6
    assert torch.stack(list(same.values())).isfinite().all()


def test_features_of_a_step_that_is_skipped_have_no_rank_and_stop_nothing() -> None:
    features = torch.randn(16, 6)
    features[3, 2] = torch.inf
    assert torch.stack(list(_numbers(features).values())).isnan().all()


def test_patches_that_are_alike_are_not_diverse() -> None:
    alike = torch.randn(4, 1, 8).expand(4, 9, 8)
    axes = torch.eye(8).expand(2, 8, 8)
    assert _diversity(alike) == pytest.approx(0.0, abs=1e-6)
    assert _diversity(axes) == pytest.approx(1 - 1 / 8)
    assert _diversity(alike[:2], alike[:2], axes, axes) == pytest.approx((1 - 1 / 8) / 2, abs=1e-6)
