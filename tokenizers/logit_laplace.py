"""The likelihood of pixels under DALL·E's discrete VAE: a Laplace distribution of their logits.

Ramesh et al. 2021, arXiv:2102.12092, appendix A.3. Pixels in [0, 1] are first brought to [0.1, 0.9], where logits are
finite; this file calls those "mapped". As normalising, the map has mean -0.125 and standard deviation 1.25.

Letters: B images, H and W pixels.
"""

import torch
from torch import Tensor

EDGE = 0.1
MEAN = (-0.125,) * 3
STD = (1.25,) * 3


def negative_log_likelihood(mapped: Tensor, parameters: Tensor) -> Tensor:
    """Of each value, in float32 at least: log(2 b x (1 - x)) + |logit(x) - μ| / b, equation 2 of the paper.

    Args:
        mapped: pixels x in (0, 1), [B, 3, H, W].
        parameters: μ and log b of each value, [B, 6, H, W].

    Returns:
        [B, 3, H, W].
    """
    mapped, parameters = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (mapped, parameters))
    mu, log_b = parameters.chunk(2, dim=1)
    odds = torch.logit(mapped)
    return (2 * mapped * (1 - mapped)).log() + log_b + (odds - mu).abs() * (-log_b).exp()


def pixels_of(parameters: Tensor) -> Tensor:
    """The reconstruction, [B, 6, H, W] -> pixels [B, 3, H, W] in [0, 1]."""
    mu = parameters[:, :3]
    mu = mu.to(torch.promote_types(mu.dtype, torch.float32))
    return ((mu.sigmoid() - EDGE) / (1 - 2 * EDGE)).clamp(0, 1)
