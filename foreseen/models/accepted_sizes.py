"""Which image sizes a backbone takes, found by trying without memory or arithmetic."""

import copy

import torch
from torch import nn

from foreseen.errors import BadInput
from foreseen.models.backbone import architecture_of, patch_size

_STRIDE = 32  # of backbones without patches of one size


def check_size(model: nn.Module, size: tuple[int, int], key: str, own: tuple[int, int]) -> None:
    """Refuse an image size that a backbone cannot take.

    Args:
        model: a backbone of `create_backbone`.
        size: (H, W) in pixels.
        key: of the config, for the sentence.
        own: the size that it was built for.

    Raises:
        BadInput: it cannot, with the nearest sizes that it can.
    """
    skeleton = copy.deepcopy(model).to("meta").eval()
    if _takes(skeleton, size):
        return
    step = patch_size(model) or (_STRIDE, _STRIDE)
    multiples = [
        tuple(max(unit, side // unit * unit + more * unit) for side, unit in zip(size, step, strict=True))
        for more in range(-1, 4)
    ]
    fitting = [list(each) for each in dict.fromkeys([*multiples, own]) if _takes(skeleton, (each[0], each[1]))]
    can = f"it takes {', '.join(map(str, fitting))}" if fitting else "no size near it works either"
    raise BadInput(
        f"{key} is {list(size)}, which {architecture_of(model)[0]} cannot take; {can}. Plain ViTs, Swin and "
        "convolutional backbones take many sizes"
    )


def _takes(skeleton: nn.Module, size: tuple[int, int]) -> bool:
    try:
        with torch.no_grad():
            skeleton(torch.empty(1, 3, *size, device="meta"))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, ZeroDivisionError):
        return False
    return True
