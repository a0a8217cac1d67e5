"""How exactly a number is kept, whatever the precision of a run."""

import torch
from torch import Tensor


def in_float32(x: Tensor) -> Tensor:
    """The same numbers in float32 at least: what is float64 stays so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
