"""A codebook of unit vectors: what is looked up in it, and how gradients pass.

van den Oord et al. 2017, arXiv:1711.00937 (straight-through, commitment), with codes and tokens of unit length as in
Peng et al. 2022, BEiT v2, arXiv:2208.06366, section 2.2. How codes move is in `codebook_ema.py`.

Letters: N tokens, D their width, K codes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROWS = 16_384  # compared with all codes at once; bounds what that takes to half a gigabyte for 8192 codes


class Quantized(NamedTuple):
    """What a codebook makes of tokens.

    Attributes:
        unit: the tokens at length 1, [..., D].
        codes: the nearest code of each, [...] int64.
        values: the codes' vectors, through which gradients pass to `unit` as if they were it, [..., D].
        commitment: mean over tokens and channels of the squared distance to the code, which only moves the tokens.
    """

    unit: Tensor
    codes: Tensor
    values: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    """K codes on the unit sphere.

    Args:
        codebook_size: K.
        code_dim: D.

    Attributes:
        weight: the codes, [K, D]: a buffer, since no gradient moves them.
    """

    weight: Tensor

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.register_buffer("weight", F.normalize(torch.randn(codebook_size, code_dim), dim=-1))

    def forward(self, tokens: Tensor) -> Quantized:
        """Quantize tokens [..., D]; the caller switches autocast off and hands them over in float32 at least."""
        unit = F.normalize(tokens, dim=-1)
        codes = nearest(unit.detach(), self.weight)
        chosen = self.weight[codes]
        return Quantized(unit, codes, unit + (chosen - unit).detach(), F.mse_loss(unit, chosen))


def nearest(unit: Tensor, codes: Tensor) -> Tensor:
    """The nearest code of each token by angle, which on the sphere is that by distance: [..., D], [K, D] -> [...]."""
    rows = unit.reshape(-1, unit.shape[-1])
    found = [(part @ codes.T).argmax(dim=-1) for part in torch.split(rows, _ROWS)]
    return torch.cat(found).view(unit.shape[:-1])


def sum_by_code(values: Tensor, codes: Tensor, codebook_size: int) -> Tensor:
    """Add up the rows of each code: [N, D] and [N] -> [K, D], in the same order at every call."""
    total = values.new_zeros(codebook_size, values.shape[1])
    if values.is_cuda:  # there `index_add_` adds in whatever order threads arrive; this one sorts first
        return total.index_put_((codes,), values, accumulate=True)
    return total.index_add_(0, codes, values)
