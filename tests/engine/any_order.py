"""Kernels that on a GPU add in any order, noted as they run."""

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from foreseen.tokenizers.quantizer import sum_by_code

# Of those that torch.use_deterministic_algorithms names, the ones that such networks and losses could come to.
_ANY_ORDER = (
    "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward", "index_add", "index_reduce", "scatter_reduce", "put", "grid_sampler_2d_backward",
    "reflection_pad2d_backward", "replication_pad2d_backward", "adaptive_max_pool2d_backward", "embedding_bag",
    "nll_loss2d_backward", "fractional_max_pool2d_backward", "kthvalue", "histc",
)  # fmt: skip


class AnyOrder(TorchDispatchMode):
    """Notes such kernels; a scattered sum only where several fractions meet in one place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if (name in _ANY_ORDER and not _sorts_on_a_gpu()) or (name == "scatter_add" and _meet(*args[1:])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def _sorts_on_a_gpu() -> bool:
    return any(frame.name == sum_by_code.__name__ for frame in traceback.extract_stack())


def _meet(dim: int, index: Tensor, source: Tensor) -> bool:
    if not source.is_floating_point() or torch.equal(source, source.round()):  # whole numbers add alike in any order
        return False
    return bool((index.sort(dim).values.diff(dim=dim) == 0).any())
