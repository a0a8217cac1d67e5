"""From whatever mode a picture was stored in to 8-bit RGB: nothing is clipped, and what is transparent becomes white.

Numbers of more than 8 bits are scaled. Where the file says what white is (16-bit grey, 12-bit TIFF), by that; where it
does not (32-bit integers and floats), by the range that such pictures agree on, or else by the picture's own lowest
and highest value: such a picture keeps its contrast, and loses how bright it was beside the others.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF 6.0
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
_PIXELS_AT_ONCE = 1 << 20  # about: what is computed in floats is never a whole large picture


def to_rgb(image: Image.Image, *, is_16_bit: bool = False) -> Image.Image:
    """A loaded picture as RGB.

    Args:
        image: of any mode.
        is_16_bit: its RGB channels had 16 bits, and so has the colour that its header calls transparent.

    Raises:
        ValueError: none of its pixels is a finite number, or Pillow cannot convert the mode.
    """
    grey = _wide_grey(image)
    if grey is not None:
        return Image.fromarray(grey).convert("RGB")
    key = image.info.get("transparency")
    if image.mode == "RGB":
        if key is None:
            return image
        if is_16_bit:  # Pillow keeps the upper 8 bits of the pixels, and compares them with all 16 of the key
            image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _wide_grey(image: Image.Image) -> NDArray[np.uint8] | None:
    """Pixels [H, W] of a grey picture of more than 8 bits or with a sign; None for all others."""
    tags: dict[int, Any] = dict(getattr(image, "tag_v2", {}))
    sample_format = _first(tags.get(_SAMPLE_FORMAT), _UNSIGNED)
    values = np.asarray(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else None
    if image.mode == "L" and sample_format == _SIGNED:
        values = np.asarray(image).view(np.int8)  # Pillow reads -1 as 255
    if values is None:
        return None
    if image.mode.startswith("I;16"):
        white = (1 << _first(tags.get(_BITS), 16)) - 1
        grey = ((values.astype(np.uint32) * 510 + white) // (2 * white)).clip(max=255).astype(np.uint8)
        key = image.info.get("transparency")
        if isinstance(key, int):
            grey[values == key] = 255
    elif image.format == "PPM" and image.mode == "I":  # Pillow has scaled it to 16 bits
        grey = ((values + 128) // 257).astype(np.uint8)
    else:
        if image.mode == "I" and tags and sample_format == _UNSIGNED and _first(tags.get(_BITS), 0) == 32:
            values = values.view(np.uint32)
        grey = _stretch(values)
    return 255 - grey if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO and image.mode != "L" else grey


def _stretch(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Bring numbers without a stated range to 0..255.

    Floats in [0, 1] are shares of white, integers in [0, 255] are what they are; all others are stretched from the
    lowest to the highest of them. NaN, which maps use for "no data", becomes black, infinity the end that it is near.
    """
    is_float = values.dtype.kind == "f"
    rows = max(1, _PIXELS_AT_ONCE // max(1, values.shape[1]))
    blocks = [slice(start, start + rows) for start in range(0, len(values), rows)]
    finite = [found for block in blocks if len(found := _finite(values[block]))]
    if not finite:
        raise ValueError("none of its pixels is a finite number")
    low, high = float(min(block.min() for block in finite)), float(max(block.max() for block in finite))
    agreed = 1.0 if is_float else 255.0
    if low >= 0 and high <= agreed:
        low, high = 0.0, agreed
    grey = np.empty(values.shape, np.uint8)
    for block in blocks:
        shares = (values[block].astype(np.float64) - low) / ((high - low) or 1.0)
        if is_float:
            shares = np.nan_to_num(shares, nan=0.0, posinf=1.0, neginf=0.0)
        grey[block] = np.rint(shares * 255).clip(0, 255).astype(np.uint8)
    return grey


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    return values[np.isfinite(values)] if values.dtype.kind == "f" else values.ravel()


def _first(value: Any, default: int) -> int:
    """The first of a tag's values; Pillow gives one as it is and several as a tuple."""
    found = value[0] if isinstance(value, tuple) and value else value
    return found if isinstance(found, int) else default
