"""The spread of features comes out of sums as it does out of the features themselves."""

import pytest
import torch

from foreseen.engine.spectrum import rankme_centred, spread
from foreseen.pretrain.feature_health import FeatureMoments, patch_diversity


def test_rank_and_spread_are_those_of_all_features_together() -> None:
    features = torch.randn(48, 12, dtype=torch.float64) @ torch.diag(torch.logspace(0, -3, 12).double()) + 2.0
    numbers = FeatureMoments(list(features.split(16))).numbers()
    assert float(numbers["feature_rank"]) == pytest.approx(rankme_centred(features), rel=1e-6)
    assert float(numbers["feature_spread"]) == pytest.approx(spread(features), rel=1e-9)


def test_features_on_a_line_have_rank_one_and_equal_ones_no_spread() -> None:
    line = torch.outer(torch.linspace(-1, 1, 32), torch.ones(6)).double() + 3.0
    assert float(FeatureMoments([line]).numbers()["feature_rank"]) == pytest.approx(1.0, abs=1e-2)
    same = FeatureMoments([torch.ones(32, 6)]).numbers()
    assert float(same["feature_spread"]) < 1e-6
    assert torch.stack(list(same.values())).isfinite().all()


def test_features_of_a_step_that_is_skipped_have_no_rank_and_stop_nothing() -> None:
    features = torch.randn(16, 6)
    features[3, 2] = torch.inf
    assert torch.stack(list(FeatureMoments([features]).numbers().values())).isnan().all()


def test_patches_that_are_alike_are_not_diverse() -> None:
    alike = torch.randn(4, 1, 8).expand(4, 9, 8)
    axes = torch.eye(8).expand(2, 8, 8)
    assert float(patch_diversity([alike])) == pytest.approx(0.0, abs=1e-6)
    assert float(patch_diversity([axes])) == pytest.approx(1 - 1 / 8)
    assert float(patch_diversity([alike[:2], alike[:2], axes, axes])) == pytest.approx((1 - 1 / 8) / 2, abs=1e-6)
