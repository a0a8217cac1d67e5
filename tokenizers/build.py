"""A tokenizer of arguments that others wrote: it takes no more memory than the weights that lie beside them.

It is first built without memory, on the meta device, and compared with the weights; a deep model stops as soon as it
has more tensors than they have.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules import module as registration

from foreseen.errors import BadInput
from foreseen.tokenizers.tokenizer import Tokenizer

Kind = TypeVar("Kind", bound=Tokenizer)

MAX_SIDE_PX = 8192
_MAX_NUMBER = 1 << 16  # in the description of a network: widths, depths, sizes
_INTERPOLATIONS = ("bicubic", "bilinear", "lanczos")


def shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors of a safetensors file, by name; none is read."""
    with safe_open(file, framework="pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def build_for(
    shapes: Mapping[str, tuple[int, ...]], make: Callable[..., Kind], arguments: Mapping[str, Any]
) -> Kind:  # fmt: skip
    """A tokenizer with weights of exactly these shapes, on the CPU; the global generator is left as it was.

    Args:
        shapes: of the weights that it will hold.
        make: the kind, called with `arguments`.
        arguments: plain values.

    Raises:
        BadInput: it would have others, or it says of itself what no tokenizer can be.
    """
    _check_numbers(arguments)
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"), _at_most(len(shapes)):
            planned = make(**arguments)
        _check_described(planned)
        wanted = {name: tuple(tensor.shape) for name, tensor in planned.state_dict().items()}
        if wanted != dict(shapes):
            name = min(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
            if name in wanted and name in shapes:
                what = f"should be {list(wanted[name])} and is {list(shapes[name])}"
            else:
                what = "is missing" if name in wanted else "is left over"
            raise BadInput(f"its arguments ask for other weights than it has: {name[:80]} {what}")
        with torch.device("cpu"):
            return make(**arguments)


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop the building of modules past so many parameters and buffers."""
    seen = 0

    def note(owner: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal seen
        seen += value is not None
        if seen > 4 * count + 64:  # buffers that are in no file are among them, and modules that are put elsewhere
            raise BadInput(f"its arguments ask for more than the {count} weights that it has")

    hooks = [
        registration.register_module_parameter_registration_hook(note),
        registration.register_module_buffer_registration_hook(note),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_numbers(arguments: Mapping[str, Any]) -> None:
    """Networks lay out lists as long as their depth before they make the first layer."""
    for name, value in arguments.items():
        if isinstance(value, dict):
            _check_small(name, value)


def _check_small(name: str, value: Any) -> None:
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else ((name, one) for one in value):
            _check_small(key, one)
    elif isinstance(value, int | float) and not abs(value) <= _MAX_NUMBER:
        raise BadInput(f"its arguments have {name[:80]} {str(value)[:40]}: at most {_MAX_NUMBER:,}")


def _check_described(tokenizer: Tokenizer) -> None:
    """What later code takes for granted of a tokenizer's attributes."""
    size, stride = tokenizer.input_size, tokenizer.stride
    for name, sides in (("input size", size), ("stride", stride)):
        if not all(type(side) is int and 1 <= side <= MAX_SIDE_PX for side in sides):
            shown = "×".join(str(side)[:20] for side in sides)
            raise BadInput(f"its {name} is {shown} px: each must be a whole number from 1 to {MAX_SIDE_PX:,}")
    if type(tokenizer.codebook_size) is not int or tokenizer.codebook_size < 2:
        raise BadInput(f"its codebook has {str(tokenizer.codebook_size)[:20]} codes: it must have at least 2")
    for name, values in (("mean", tokenizer.mean), ("std", tokenizer.std)):
        good = len(values) == 3 and all(isinstance(one, int | float) and math.isfinite(one) for one in values)
        if not good or (name == "std" and min(values) <= 0):
            raise BadInput(f"its {name} is {str(list(values))[:80]}: three finite numbers, of std above 0")
    if tokenizer.interpolation not in _INTERPOLATIONS:
        raise BadInput(f"its interpolation is {str(tokenizer.interpolation)[:40]!r}: {', '.join(_INTERPOLATIONS)}")
