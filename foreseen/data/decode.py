"""Encoded bytes to RGB pixels, for bytes that nobody vouches for.

The header is read, and the size refused, before any pixel decoder runs: a small file may promise 65,000 x 65,000
pixels, and most decoders take the 12 GB. Pillow decodes everything, with a list of formats. torchcodec (extra `fast`)
takes plain JPEGs where it is installed; it uses the same libjpeg-turbo, and a test holds both to the same pixels.

The list of formats is short on purpose: their sizes can be known before memory is taken, and their decoders are either
plain Python or the libraries that browsers stand on. AVIF is not among them, since an 8 x 8 header may hold a stream of
16,384 x 16,384, nor is JPEG 2000, nor TGA, which any bytes may be. `docs/dirty_pictures.md` says what becomes of what.

Colour profiles (ICC) are not applied, as in nearly all training code: what a phone calls Display P3 comes out a little
pale. Four-channel JPEGs are read as Adobe's inverted CMYK, whatever their markers say, as browsers do.
"""

import importlib
import re
import struct
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from foreseen.data.not_pictures import name_bytes
from foreseen.data.pixel_modes import to_rgb
from foreseen.data.shards import CorruptSample
from foreseen.data.store import MAX_BYTES

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
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
_TIFF_SUBFILE, _TIFF_DNG = 254, 50706
_MAX_PYTHON_PIXELS = 4_000_000


class DecodeError(CorruptSample):
    """These bytes are no picture that can be used; the message is the reason."""


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES, fast: bool = True
) -> NDArray[np.uint8]:
    """Decode a picture to upright 8-bit RGB.

    EXIF orientation is applied, transparency laid on white, more than 8 bits are scaled (see `pixel_modes`); of an
    animation or of many pages the first is taken.

    Args:
        data: JPEG, PNG, WEBP, BMP, GIF, TIFF or PPM (PBM, PGM, PFM).
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
        with suppress(RuntimeError):  # Pillow then judges, as it did at packing, and has the better words
            pixels: NDArray[np.uint8] = decode_jpeg(data).permute(1, 2, 0).contiguous().numpy()
            return pixels
    check_webp_canvas(data, max_pixels)
    try:
        return _decode_with_pillow(data, max_pixels)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on malformed input
        raise decode_error(data, error) from None


def decode_error(data: bytes, error: Exception) -> DecodeError:
    """What Pillow raised over some bytes, as a reason that a reader can use."""
    if isinstance(error, DecodeError):
        return error
    if isinstance(error, UnidentifiedImageError) or str(error) == "could not create decoder object":  # libwebp's only
        return DecodeError(name_bytes(data, FORMATS))
    if isinstance(error, Image.DecompressionBombError) and (pixels := re.search(r"\d+", str(error))):
        return DecodeError(f"its header promises {int(pixels[0]):,} pixels, more than Pillow decodes")
    return DecodeError(str(error).strip() or type(error).__name__)


def _decode_with_pillow(data: bytes, max_pixels: int) -> NDArray[np.uint8]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata; what matters is raised
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            _check_pixels(*image.size, max_pixels)
            if image.format == "TIFF":
                _check_tiff(image, max_pixels)
            if image.format == "PPM":
                _check_ppm(image)
            is_16_bit = image.format == "PNG" and data[24:25] == b"\x10"
            image.load()
            upright = to_rgb(image, is_16_bit=is_16_bit)
            if (method := _TRANSPOSE.get(_orientation(image))) is not None:
                upright = upright.transpose(method)
            return np.array(upright)


def _check_tiff(image: Any, max_pixels: int) -> None:
    tags = image.tag_v2
    # A tile's buffer is taken whole, however small the picture.
    _check_pixels(tags.get(_TIFF_TILE_WIDTH, 1), tags.get(_TIFF_TILE_LENGTH, 1), max_pixels)
    if _TIFF_DNG in tags:
        raise DecodeError("it is a raw camera file: develop it to JPEG or TIFF")
    if tags.get(_TIFF_SUBFILE, 0) == 1:
        raise DecodeError("its first page is a preview of another one, as in raw camera files: save it as a plain TIFF")


def _check_ppm(image: Any) -> None:
    decoder = image.tile[0].codec_name
    if decoder == "ppm_plain":  # of a number that was cut the first digits are left, and nobody notices
        raise DecodeError("it is netpbm in text, of which nobody can tell whether it is whole: save it as PNG")
    if decoder == "ppm":  # plain Python, some seconds a million pixels
        _check_pixels(image.width, image.height, _MAX_PYTHON_PIXELS)


def check_webp_canvas(data: bytes, max_pixels: int) -> None:
    """Of an extended WEBP, compare the canvas, for which libwebp takes memory as soon as it is opened."""
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
        _check_pixels(width, height, max_pixels)


def _orientation(image: Image.Image) -> int:
    try:
        found = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # broken EXIF says nothing about the pixels
        return 1
    return found if isinstance(found, int) else 1


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DecodeError(f"it is {width} x {height} pixels, more than the {max_pixels:,} allowed")


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
