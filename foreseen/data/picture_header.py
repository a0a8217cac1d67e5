"""What the header of a picture says, without decoding it."""

import warnings
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from foreseen.data.decode import FORMATS, MAX_PIXELS, DecodeError, check_webp_canvas, decode_error
from foreseen.data.pictures import Pictures
from foreseen.data.store import MAX_BYTES

_START = 1 << 16  # a JPEG's header with its EXIF lies within, mostly
_TURNED = range(5, 9)  # EXIF orientations that swap width and height
_BITS = {"1": 1, "I": 32, "F": 32}
_BITS_TAG, _ORIENTATION_TAG = 258, 0x0112


class Header(NamedTuple):
    """Format ("JPEG"), Pillow's mode ("RGB"), bits a channel as stored, and the size in pixels as it is seen."""

    format: str
    mode: str
    bits: int
    width: int
    height: int


def look_at_header(pictures: Pictures, sample: int) -> Header:
    """The header of one picture; reads more than its start only where that is not enough.

    Raises:
        DecodeError: it is no picture that is read.
        CorruptSample, OSError, BadInput: its bytes cannot be had.
    """
    start = pictures.read_start(sample, _START)
    try:
        return read_header(start)
    except DecodeError:
        if len(start) < _START:
            raise
    return read_header(pictures.read(sample))


def read_header(data: bytes) -> Header:
    """The header of an encoded picture.

    Args:
        data: all of it, or as much as holds the header.

    Raises:
        DecodeError: it is no picture that is read.
    """
    if len(data) > MAX_BYTES:
        raise DecodeError(f"it has {len(data):,} bytes, more than the {MAX_BYTES:,} allowed")
    if not data:
        raise DecodeError("it is empty")
    check_webp_canvas(data, MAX_PIXELS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            with Image.open(BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                if "exif" in image.info and image.getexif().get(_ORIENTATION_TAG) in _TURNED:
                    width, height = height, width
                kind = "JPEG" if image.format == "MPO" else str(image.format)  # a JPEG with another one behind it
                return Header(kind, image.mode, _bits(image, data), width, height)
    except Exception as error:  # Pillow's plugins raise nearly everything on malformed input
        raise decode_error(data, error) from None


def _bits(image: Image.Image, data: bytes) -> int:
    if image.format == "PNG":
        return data[24]
    tags: Any = getattr(image, "tag_v2", {})
    found = tags.get(_BITS_TAG)
    if found is not None:
        return int(found[0] if isinstance(found, tuple) else found)
    if image.format == "PPM" and image.mode == "I":
        return 16
    return 16 if image.mode.startswith("I;16") else _BITS.get(image.mode, 8)
