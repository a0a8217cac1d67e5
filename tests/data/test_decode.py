"""Decoding: every mode becomes upright 8-bit RGB, and whatever is no picture is refused with a reason."""

import io
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from foreseen.data.decode import DecodeError, _plain_jpeg_size, _torchcodec, decode
from foreseen.data.shards import CorruptSample

needs_torchcodec = pytest.mark.skipif(_torchcodec() is None, reason="the extra `fast` (torchcodec) is not installed")


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    planes = [x * 5 + seed, y * 7, (x + y) * 3]
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def orientation(value: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_give_the_pixels_that_were_saved(kind: str) -> None:
    data = encoded(picture(), kind, **({"lossless": True} if kind == "WEBP" else {}))
    pixels = decode(data)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, np.asarray(picture()))


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_torchcodec)])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_any_mode_becomes_three_close_channels(mode: str, fast: bool) -> None:
    pixels = decode(encoded(picture().convert(mode), quality=100, subsampling=0), fast=fast)
    expected = np.asarray(picture().convert(mode).convert("RGB"))
    assert pixels.shape == (32, 48, 3)
    assert np.abs(pixels.astype(int) - expected).mean() < 3


@needs_torchcodec
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 40}, {"exif": b"x"}])
def test_torchcodec_and_pillow_give_the_same_bits(options: dict[str, object]) -> None:
    if options.get("exif"):
        options = {"exif": orientation(1)}
    data = encoded(picture(61, 43), **options)
    assert _plain_jpeg_size(data) == (61, 43), "the fast path is not taken"
    fast = decode(data, fast=True)
    assert fast.flags.c_contiguous
    assert fast.flags.writeable
    np.testing.assert_array_equal(fast, decode(data, fast=False))


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_torchcodec)])
@pytest.mark.parametrize("value", range(1, 9))
def test_exif_orientation_is_applied(value: int, fast: bool) -> None:
    upright = np.zeros((16, 24, 3), np.uint8)
    upright[:8, :8] = 255  # a white block at the top left
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud}
    undo |= {5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, 1)}
    undo |= {7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1)}
    stored = Image.fromarray(np.ascontiguousarray(undo[value](upright)))
    data = encoded(stored, quality=100, subsampling=0, exif=orientation(value))
    assert (_plain_jpeg_size(data) is None) == (value != 1), "what is turned is left to Pillow"
    pixels = decode(data, fast=fast)
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).max() < 8
    assert pixels.flags.c_contiguous


@pytest.mark.parametrize("form", [b' tiff:Orientation="%d"/>', b"><tiff:Orientation>%d</tiff:Orientation>"])
def test_an_orientation_in_xmp_alone_is_left_to_pillow(form: bytes) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description' + form + b"</x:xmpmeta>"
    turned, upright = (encoded(picture(), xmp=xmp % orientation) for orientation in (6, 1))
    assert _plain_jpeg_size(turned) is None
    assert decode(turned).shape == (48, 32, 3)
    assert _plain_jpeg_size(upright) == (48, 32)
    np.testing.assert_array_equal(decode(upright), decode(upright, fast=False))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    pixels = decode(encoded(image.convert(mode), "PNG"))
    assert (pixels[:, 4:] == 255).all()
    assert (np.abs(pixels[:, :4].astype(int) - 10) <= 3).all()


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    grey = np.array([[0, 257, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "PNG"))[0, :, 0], [0, 1, 128, 255])
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(grey), "TIFF"))[0, :, 2], [0, 1, 128, 255])


@pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_torchcodec)])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("BMP", {}), ("GIF", {}), ("TIFF", {})],
)
def test_a_truncated_file_is_refused(kind: str, options: dict[str, object], fast: bool) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, kind, **options)
    for keep in (0.05, 0.5, 0.9):
        with pytest.raises(DecodeError):
            decode(data[: int(len(data) * keep)], fast=fast)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html>not found</html>", "a web page"),
        (b"SIMPLE  =                    T" + b" " * 2850, "it is FITS"),  # which Pillow could open
        (b"\x80\x04K*.", "never opened"),
    ],
)
def test_what_is_no_picture_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(CorruptSample, match=reason):
        decode(data)


def test_size_limits_are_named() -> None:
    with pytest.raises(DecodeError, match=r"48 x 32 pixels, more than the 1,000 allowed"):
        decode(encoded(picture()), max_pixels=1000)
    with pytest.raises(DecodeError, match=r"more than the 100 allowed"):
        decode(encoded(picture()), max_bytes=100)


def jpeg_bomb() -> bytes:
    data = bytearray(encoded(picture()))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def png_bomb() -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))


def tiff_bomb() -> bytes:
    tags = [
        (256, 8),
        (257, 8),
        (258, 8),
        (259, 8),
        (262, 1),
        (277, 1),
        (322, 65008),
        (323, 65008),
        (324, 8),
        (325, 100),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + bytes(200)


@pytest.mark.parametrize("bomb", [jpeg_bomb, png_bomb, tiff_bomb])
def test_a_header_bomb_is_refused_before_memory_is_taken(bomb: object) -> None:
    data = bomb()  # type: ignore[operator]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DecodeError, match=r"650\d\d x 650\d\d pixels|4,225,000,000 pixels"):
        decode(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KB


def test_decoding_without_the_fast_path_does_not_import_torch() -> None:
    script = (
        "import sys, io; from PIL import Image; from foreseen.data.decode import decode\n"
        "out = io.BytesIO(); Image.new('RGB', (8, 8)).save(out, 'JPEG'); decode(out.getvalue(), fast=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
