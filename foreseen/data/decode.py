"""Encoded bytes to RGB pixels, for bytes that nobody vouches for.

The header is read, and the size refused, before any pixel decoder runs: a small file may promise 65,000 x 65,000
pixels, and most decoders take the 12 GB. Pillow decodes everything, with a list of formats. torchcodec (extra `fast`)
takes plain JPEGs where it is installed; it uses the same libjpeg-turbo, and a test holds both to the same pixels.
"""

import importlib
import re
import struct
from collections.abc import Callable
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.shards import MAX_BYTES, CorruptSample

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
MAX_PIXELS = 64_000_000

_ORIENTATION_TAG = 0x0112
_TURNING_XMP = re.compile(rb'(?<!/)tiff:Orientation(?!(?:="|>)1\b)')  # Photoshop writes a 1 into every upright picture
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# T.81, table B.1. Frames that are not baseline, extended or progressive Huffman are left to Pillow.
_PLAIN_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
_SKIPPED_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, *range(0xE0, 0xF0)})
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323


class DecodeError(CorruptSample):
    """These bytes are no picture that can be used; the message is the reason."""


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, fast: bool = True
) -> NDArray[np.uint8]:
    """Decode a picture to upright 8-bit RGB.

    EXIF orientation is applied, transparency laid on white, 16-bit grey scaled to 8 bits; of an animation the first
    frame is taken.

    Args:
        data: JPEG, PNG, WEBP, BMP, GIF or TIFF.
        max_pixels: most pixels, width × height. Pillow refuses more than 178 million whatever is said here.
        max_bytes: longest `data`.
        fast: let torchcodec decode plain JPEGs if it is installed. It needs torch, which is imported for it.

    Returns:
        Pixels [H, W, 3], contiguous and writable.

    Raises:
        DecodeError: empty, too large, truncated, of another format, or broken.
    """
    if not data:
        raise DecodeError("it is empty")
    if len(data) > max_bytes:
        raise DecodeError(f"it has {len(data):,} bytes, more than the {max_bytes:,} allowed")
    if fast and (decode_jpeg := _torchcodec()) is not None and (size := _plain_jpeg_size(data)) is not None:
        _check_pixels(*size, max_pixels)
        try:
            pixels: NDArray[np.uint8] = decode_jpeg(data).permute(1, 2, 0).contiguous().numpy()
        except RuntimeError as error:
            raise DecodeError(str(error).splitlines()[0]) from None
        return pixels
    try:
        return _decode_with_pillow(data, max_pixels)
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on malformed input
        if isinstance(error, MemoryError):
            raise
        raise DecodeError(_reason(error)) from None


def _decode_with_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        _check_pixels(*image.size, max_pixels)
        if image.format == "TIFF":  # a tile's buffer is taken whole, however small the picture
            tags: Any = image.tag_v2  # type: ignore[attr-defined]
            _check_pixels(tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_LENGTH, 1), max_pixels)
        image.load()
        upright: Image.Image = image
        if (method := _TRANSPOSE.get(_orientation(image))) is not None:
            upright = image.transpose(method)
        return np.array(_to_rgb(upright))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DecodeError("its pixels are 32-bit numbers without an agreed range: convert it to 8 or 16 bits")
    if image.has_transparency_data:
        picture = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        return 1
    return found if isinstance(found, int) else 1


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(f"it is {width} x {height} pixels, more than the {max_pixels:,} allowed")


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no picture in a format that is read (" + ", ".join(FORMATS) + ")"
    return str(error).strip() or type(error).__name__


@cache
def _torchcodec() -> Callable[[bytes], Any] | None:
    try:
        found: Callable[[bytes], Any] = importlib.import_module("torchcodec.decoders").decode_jpeg
    except (ImportError, AttributeError, RuntimeError, OSError):  # not installed, too old, or built for another torch
        return None
    return found


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of an upright, 8-bit, 3-component Huffman JPEG; None for everything else, which Pillow judges.

    Walks the marker segments up to the frame header (T.81, annex B); anything unexpected ends the walk.
    """
    if data[:3] != b"\xff\xd8\xff":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in _PLAIN_FRAMES:
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            return (width, height) if (precision, components) == (8, 3) and width and height else None
        if length < 2 or marker not in _SKIPPED_SEGMENTS:
            return None
        if marker == 0xE1 and not _is_upright(data[at + 4 : at + 2 + length]):
            return None
        at += 2 + length
    return None


def _is_upright(app1: bytes) -> bool:
    """False where an EXIF or XMP segment turns the picture, or where one cannot tell."""
    if not app1.startswith(b"Exif\0\0"):
        return _TURNING_XMP.search(app1) is None
    tiff = app1[6:]
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return False
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, directory)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * entry)
            if tag == _ORIENTATION_TAG:
                return bool(value == 1)
    except struct.error:
        return False
    return True
