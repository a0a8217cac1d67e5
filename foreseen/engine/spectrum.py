"""Numbers of the spectrum of frozen features that tell without any label how rich they are.

RankMe: Garrido et al. 2022, arXiv:2210.02885. α-ReQ: Agrawal et al. 2022, α-ReQ: Assessing Representation Quality in
Self-Supervised Learning by measuring eigenspectrum decay (NeurIPS).

Both read a D × D matrix of products in float64, so that a million pictures cost no more memory than a thousand.
"""

import torch
from torch import Tensor

_EPSILON = 1e-7  # RankMe's, for float32 features
_FIRST_RANK, _LAST_RANK = 4, 100  # α-ReQ's authors' code fits here: past the head, before the noise


def rankme(features: Tensor) -> float:
    """Effective number of dimensions: exp of the entropy of the singular values' shares of their sum (equation 1).

    Between 1 (all features on one line through 0) and min(N, D). As in the paper the features are not centred, so a
    part that all of them share lowers it.

    Args:
        features: [N, D].
    """
    return _effective_rank(_exact(features))


def rankme_centred(features: Tensor) -> float:
    """RankMe of what differs between pictures: the same number after the mean feature is taken away.

    Masked modelling gives all pictures a large common part, and more of it the longer it trains: RankMe then falls
    while the features get better, and this number rises.

    Args:
        features: [N, D].
    """
    exact = _exact(features)
    return _effective_rank(exact - exact.mean(0))


def _effective_rank(exact: Tensor) -> float:
    singular = _eigenvalues(exact.T @ exact).sqrt()
    share = singular / singular.sum().clamp(min=torch.finfo(exact.dtype).tiny) + _EPSILON
    return float((-(share * share.log()).sum()).exp().clamp(1.0, min(exact.shape)))


def alpha_req(features: Tensor) -> float | None:
    """Decay of the covariance's eigenvalues: λ at rank i falls as i^-α. Near 1 is the paper's good; larger is poorer.

    Fitted by least squares on logarithms over ranks 4 to 100, where rank i weighs 1 / i, as the authors do.

    Args:
        features: [N, D].

    Returns:
        α; None where fewer than three eigenvalues above rounding are left in that range.
    """
    exact = _exact(features)
    centred = exact - exact.mean(0)
    values = _eigenvalues(centred.T @ centred).cpu()
    values = values[values > values.max() * len(values) * torch.finfo(values.dtype).eps]
    y = values[_FIRST_RANK - 1 : _LAST_RANK].log()
    if len(y) < 3:
        return None
    rank = torch.arange(_FIRST_RANK, _FIRST_RANK + len(y), dtype=y.dtype)
    x, weight = rank.log(), (1 / rank) / (1 / rank).sum()
    mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
    slope = (weight * (x - mean_x) * (y - mean_y)).sum() / (weight * (x - mean_x).square()).sum()
    return -float(slope)


def spread(features: Tensor) -> float:
    """Share of the features' mean square that differs between pictures, in [0, 1]; 0 where all pictures look alike.

    Args:
        features: [N, D].
    """
    exact = _exact(features)
    total = exact.square().mean(0).sum()
    return float(exact.var(0, correction=0).sum() / total) if total > 0 else 0.0


def _exact(features: Tensor) -> Tensor:
    return (features if features.device.type in ("cpu", "cuda") else features.cpu()).double()


def _eigenvalues(gram: Tensor) -> Tensor:
    """Falling, and not below 0."""
    rising: Tensor = torch.linalg.eigvalsh(gram)
    return rising.flip(0).clamp(min=0)
