"""Activation checkpointing: a block keeps what goes into it, and computes the rest again when its gradient is due.

The second computation must be the first one over again. Drop path draws belong to a forward, and a network may have
run forward with others since (global crops, then local ones), so a block puts back those of its own forward; batch
statistics are not counted twice. Nothing else here is random. timm's `set_grad_checkpointing` knows none of this.

Source: Chen et al. 2016, arXiv:1604.06174, as `torch.utils.checkpoint` does it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from foreseen.models.drop_path import Drawn, drawn_drop_path, installed


class _Recomputed(nn.Module):
    """Comes before a block's own class, so that names of weights stay and a copy is a block like this one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        drawn = drawn_drop_path(self)
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        return checkpoint(
            super().__call__,  # compiled, where the block is
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a block draws from a global generator
            context_fn=lambda: (nullcontext(), _same_again(drawn, norms)),
            **kwargs,
        )


def recompute_activations(block: nn.Module) -> None:
    """Let a block, and every copy made of it from now on, compute its activations again in its backward.

    Args:
        block: stays the object it is; its class gets a subclass of the same name.
    """
    if not isinstance(block, _Recomputed):
        block.__class__ = _recomputed(type(block))  # type: ignore[arg-type]  # types are hashable


@cache
def _recomputed(block: type[nn.Module]) -> type[nn.Module]:
    return type(block.__name__, (_Recomputed, block), {"__module__": block.__module__, "__doc__": block.__doc__})


@contextmanager
def _same_again(drawn: Drawn, norms: Sequence[nn.Module]) -> Iterator[None]:
    """What a block's forward saw, put back for its recomputation, which counts on scratch copies of batch statistics.

    A flag that switched counting off would be seen by a compiled block, which would then compute something else.
    """
    counted = [(norm._buffers, dict(norm._buffers)) for norm in norms]
    for buffers, kept in counted:
        buffers.update({name: None if value is None else value.clone() for name, value in kept.items()})
    try:
        with installed(drawn):
            yield
    finally:
        for buffers, kept in counted:
            buffers.update(kept)
