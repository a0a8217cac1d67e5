import pytest
import torch
from torch import Tensor

from foreseen.engine.spectrum import alpha_req, rankme, rankme_centred, spread


def _with_singular_values(values: Tensor, pictures: int = 400) -> Tensor:
    """Features [N, D] without a mean, whose singular values are given."""
    generator = torch.Generator().manual_seed(0)
    size = len(values)
    raw = torch.randn(pictures, size, generator=generator, dtype=torch.float64)
    left = torch.linalg.qr(raw - raw.mean(0)).Q
    right = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return left @ torch.diag(values.double()) @ right.T


@pytest.mark.parametrize("used", [1, 5, 32])
def test_equal_singular_values_count_their_dimensions(used: int) -> None:
    features = _with_singular_values((torch.arange(32) < used).double())
    assert rankme(features) == pytest.approx(used, rel=1e-3)
    assert rankme_centred(features) == pytest.approx(used, rel=1e-3)


def test_rankme_is_the_entropy_of_the_singular_values() -> None:
    values = torch.tensor([4.0, 2.0, 1.0, 1.0])
    assert rankme(_with_singular_values(values)) == pytest.approx(2**1.75, rel=1e-4)  # shares 1/2, 1/4, 1/8, 1/8


def test_a_part_that_all_share_lowers_rankme_but_not_the_centred_one() -> None:
    features = _with_singular_values(torch.ones(32))
    shifted = features + 10.0
    assert rankme(shifted) < 2.0
    assert rankme_centred(shifted) == pytest.approx(32, rel=1e-3)
    assert spread(features) == pytest.approx(1.0)
    assert spread(shifted) < 1e-4


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [16, 150])
def test_the_decay_of_a_power_law_is_found(alpha: float, size: int) -> None:
    eigenvalues = torch.arange(1, size + 1).double() ** -alpha
    assert alpha_req(_with_singular_values(eigenvalues.sqrt())) == pytest.approx(alpha, rel=1e-3)


def test_the_head_of_the_spectrum_and_its_scale_do_not_count() -> None:
    eigenvalues = torch.arange(1, 65).double() ** -1.0
    eigenvalues[:3] *= 50
    assert alpha_req(7 * _with_singular_values(eigenvalues.sqrt())) == pytest.approx(1.0, rel=1e-3)


def test_too_few_dimensions_have_no_decay() -> None:
    assert alpha_req(_with_singular_values(torch.ones(4))) is None
    assert alpha_req(torch.ones(10, 8)) is None
