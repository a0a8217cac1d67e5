"""Pictures of what a tokenizer does: original | reconstruction | code map.

Letters: B images, H and W pixels, h and w codes, K codes in the codebook.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_GOLDEN_RATIO = 0.6180339887498949
_GAP = 2
_WHITE = 255


def palette(codebook_size: int) -> Tensor:
    """A colour for each code, [K, 3] uint8; a code's colour does not depend on how many codes there are.

    Hues step by the golden ratio, so that any run of codes is spread over the wheel; brightness and saturation change
    at two other irrational paces, so that codes whose hues nearly meet again differ in those.
    """
    code = torch.arange(codebook_size, dtype=torch.float64)
    hue = (code * _GOLDEN_RATIO) % 1
    value = 0.45 + 0.55 * ((code * 2**0.5) % 1)
    saturation = 0.35 + 0.65 * ((code * 3**0.5) % 1)
    # HSV to RGB: a channel falls from `value` by its distance on the wheel (Smith 1978, in its closed form).
    wheel = (hue[:, None] * 6 + torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)) % 6
    fall = torch.minimum(wheel, 4 - wheel).clamp(0, 1)
    return (value[:, None] * (1 - saturation[:, None] * fall) * 255).round().to(torch.uint8)


def code_map(codes: Tensor, codebook_size: int, size: tuple[int, int]) -> Tensor:
    """Codes as coloured squares: [B, h, w] -> [B, 3, H, W] uint8.

    Args:
        codes: in [0, K).
        codebook_size: K.
        size: (H, W) in pixels of the pictures they stand beside.
    """
    colours = palette(codebook_size).to(codes.device)[codes].permute(0, 3, 1, 2)
    return F.interpolate(colours.float(), size=size, mode="nearest").to(torch.uint8)


def strip(pixels: Tensor, codes: Tensor, codebook_size: int, reconstruction: Tensor | None = None) -> Tensor:
    """Each picture beside its reconstruction, where there is one, and its code map.

    Args:
        pixels: in [0, 1], [B, 3, H, W].
        codes: in [0, K), [B, h, w].
        codebook_size: K.
        reconstruction: in [0, 1], [B, 3, H, W], or of another size, to which it is then brought.

    Returns:
        [B, 3, H, 2 * W + 2] uint8, or [B, 3, H, 3 * W + 4] with reconstructions: a white gap stands between two.
    """
    size = (pixels.shape[-2], pixels.shape[-1])
    parts = [as_uint8(pixels)]
    if reconstruction is not None:
        if reconstruction.shape[-2:] != pixels.shape[-2:]:
            reconstruction = F.interpolate(reconstruction.float(), size=size, mode="bilinear", antialias=True)
        parts.append(as_uint8(reconstruction))
    parts.append(code_map(codes, codebook_size, size))
    gap = torch.full((len(pixels), 3, size[0], _GAP), _WHITE, dtype=torch.uint8, device=pixels.device)
    spaced = [part for each in parts for part in (each, gap)]
    return torch.cat(spaced[:-1], dim=3)


def as_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] as pictures hold them."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)
