"""Drop path (stochastic depth) drawn from each sample's key, so that it is the same wherever the sample stands.

timm's DropPath draws from the global generator, in the order in which blocks run: another split of the batch drops
other paths. Here one call draws a table [B, modules] for the whole model, and each module gets its column as a plain
attribute. A module holds no stream number, so compiled blocks of equal shape share one graph.

Source: Huang et al. 2016, arXiv:1603.09382, with timm's scaling by the share kept.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn

from foreseen.device_keys import keyed_uniform


class KeyedDropPath(nn.Module):
    """Drops the residual path of whole samples; identity in evaluation.

    Attributes:
        rate: probability that a sample's path is dropped. `forward` never reads it, or compiled blocks with different
            rates would need a graph each.
        scale: what this module multiplies each sample by, [B]: 0 where dropped, 1 / (1 - rate) elsewhere. It is there
            only inside `draw_drop_path`.
    """

    scale: Tensor | None

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.scale = None

    def forward(self, x: Tensor) -> Tensor:
        """Scale the samples of x, [n * B, ...], where rows of one sample stand together (windows, patches)."""
        if not self.training:
            return x
        scale = self.scale
        if scale is None:
            raise RuntimeError("drop path was not drawn: run the model in training inside draw_drop_path(model, key)")
        if len(x) != len(scale):
            scale = scale.repeat_interleave(len(x) // len(scale), output_size=len(x))
        return x * scale.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"rate={self.rate:.3f}"


Drawn = Sequence[tuple[KeyedDropPath, Tensor | None]]


def replace_drop_path(model: nn.Module, uniform_rate: float | None = None) -> list[KeyedDropPath]:
    """Put a KeyedDropPath in the place of each timm DropPath; those with rate 0 become identities.

    Args:
        model: of timm.
        uniform_rate: of all of them, those that timm left out since their rate was 0 among them; None keeps each one's.

    Returns:
        The modules put in, in the order in which `draw_drop_path` numbers them.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            rate = float(child.drop_prob or 0.0) if isinstance(child, DropPath) else 0.0
            left_out = uniform_rate is not None and name.startswith("drop_path") and isinstance(child, nn.Identity)
            if isinstance(child, DropPath) or left_out:
                rate = rate if uniform_rate is None else uniform_rate
                setattr(parent, name, KeyedDropPath(rate) if rate > 0 else nn.Identity())
    return drop_path_modules(model)


def drop_path_modules(model: nn.Module) -> list[KeyedDropPath]:
    """The keyed drop paths of a model, in its own order."""
    return [module for module in model.modules() if isinstance(module, KeyedDropPath)]


@contextmanager
def draw_drop_path(model: nn.Module, key: Tensor) -> Iterator[None]:
    """Draw which paths are dropped in the forward that runs inside.

    It is a context so that no later forward can go on with these draws: training outside of it is an error.

    Args:
        model: whose drop paths are drawn; one without any costs nothing.
        key: one integer per row of the input, [B] int64; give each forward a subkey of its own.
    """
    modules = drop_path_modules(model)
    if not modules:
        yield
        return
    rates = _rates(tuple(module.rate for module in modules), key.device)
    scales = (keyed_uniform(key, "drop_path", len(modules)) >= rates) / (1.0 - rates)
    with installed(list(zip(modules, scales.unbind(dim=1), strict=True))):
        yield


def drawn_drop_path(model: nn.Module) -> Drawn:
    """The draws that are installed in a model now, for `installed` to put them back later."""
    return [(module, module.scale) for module in drop_path_modules(model)]


@contextmanager
def installed(drawn: Drawn) -> Iterator[None]:
    """Give drop paths their draws, and take back afterwards what was there before."""
    before = [(module, module.scale) for module, _ in drawn]
    try:
        for module, scale in drawn:
            module.scale = scale
        yield
    finally:
        for module, scale in before:
            module.scale = scale


@lru_cache(maxsize=64)
def _rates(rates: tuple[float, ...], device: torch.device) -> Tensor:
    # Made once per device, or every forward would wait for the copy. In float64 for float64 models.
    return torch.tensor(rates, dtype=torch.float64, device=device)
