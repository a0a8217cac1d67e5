"""The table of docs/dirty_pictures.md, row by row: what becomes of every picture that is not a plain one."""

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foreseen.data.damage import find_damage
from foreseen.data.decode import FORMATS, DecodeError, _plain_jpeg_size, _torchcodec, decode
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import IMAGE_SUFFIXES, FolderListing
from foreseen.data.views import View, ViewCutter
from foreseen.errors import BadInput
from foreseen.keys import sample_keys
from tests.dirty_files import (
    chunk,
    encoded,
    exif,
    layout,
    picture,
    png,
    tiff,
    without_segment,
    ycck,
)

EITHER = pytest.mark.parametrize(
    "fast",
    [False, pytest.param(True, marks=pytest.mark.skipif(_torchcodec() is None, reason="torchcodec is not installed"))],
)
RGB, GREY = layout([8, 8, 8], 2), layout([8], 1)


def grey_of(data: bytes) -> list[int]:
    """The first row of a grey picture."""
    pixels = decode(data, fast=False)
    assert (pixels[..., 0] == pixels[..., 1]).all()
    assert (pixels[..., 0] == pixels[..., 2]).all()
    found: list[int] = pixels[0, :, 0].tolist()
    return found


# Orientation


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_is_applied_once_in_every_format_that_has_it(kind: str, value: int) -> None:
    turned = Image.Exif()
    turned[0x0112] = value
    as_jpeg = decode(encoded(picture(), quality=100, subsampling=0, exif=turned))
    options = {"lossless": True} if kind == "WEBP" else {"compression": "tiff_lzw"} if kind == "TIFF" else {}
    pixels = decode(encoded(picture(), kind, exif=turned, **options))
    assert pixels.shape == as_jpeg.shape
    assert np.abs(pixels.astype(int) - as_jpeg).mean() < 3


@EITHER
@pytest.mark.parametrize(
    "block",
    [
        *(exif(struct.pack("<HHIHH", 0x0112, 3, 1, value, 0)) for value in (0, 9, 65535)),
        exif(struct.pack("<HHI4s", 0x0112, 2, 2, b"6\0")),  # as text
        exif(struct.pack("<HHIf", 0x0112, 11, 1, 6.0)),  # as a float
        exif(struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0))[:20],  # cut off
        b"Exif\0\0II*\0\xff\xff\xff\xff",  # a directory beyond the end
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff",  # 65,535 entries that are not there
        b"Exif\0\0",
        b"Exif\0\0garbage, and more of it",
    ],
)
def test_an_orientation_that_makes_no_sense_leaves_the_picture_as_it_is(block: bytes, fast: bool) -> None:
    data = encoded(picture())
    with_block = data[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(block)) + block + data[2:]
    np.testing.assert_array_equal(decode(with_block, fast=fast), decode(data, fast=False))


@pytest.mark.parametrize("value", [0, 9])
def test_an_invalid_orientation_of_a_tiff_or_png_is_passed_over(value: int) -> None:
    rows = bytes(range(6))
    assert decode(tiff((2, 1), RGB | layout([8, 8, 8], 2, orientation=(3, [value])), rows)).tolist() == [
        [[0, 1, 2], [3, 4, 5]]
    ]
    entry = exif(struct.pack("<HHIHH", 0x0112, 3, 1, value, 0))[6:]
    assert decode(png((2, 1), 8, 2, b"\0" + rows, chunk(b"eXIf", entry))).shape == (1, 2, 3)


# Colour


def test_cmyk_is_right_whether_or_not_adobe_has_turned_it_into_luminance_and_colour() -> None:
    colours = picture().convert("CMYK")
    expected = np.asarray(colours.convert("RGB")).astype(int)
    plain = encoded(colours, quality=100, subsampling=0)
    for data in (plain, ycck(colours), without_segment(plain, 0xEE)):
        assert np.abs(decode(data).astype(int) - expected).mean() < 3


@EITHER
def test_an_rgb_jpeg_and_one_without_any_marker_keep_their_colours(fast: bool) -> None:
    data = encoded(picture(), quality=100, subsampling=0, keep_rgb=True)
    assert _plain_jpeg_size(data) is not None
    assert np.abs(decode(data, fast=fast).astype(int) - np.asarray(picture())).max() < 4
    without = without_segment(encoded(picture(), quality=100, subsampling=0), 0xE0)
    assert np.abs(decode(without, fast=fast).astype(int) - np.asarray(picture())).mean() < 3


def test_lab_and_ycbcr_tiffs_become_the_colours_they_mean() -> None:
    lab = tiff((3, 1), layout([8, 8, 8], 8), bytes([255, 0, 0, 128, 0, 0, 136, 80, 70]))
    assert np.abs(decode(lab)[0].astype(int) - [[255, 255, 255], [119, 119, 119], [252, 2, 2]]).max() < 4
    ycbcr = tiff((2, 1), layout([8, 8, 8], 6), bytes([255, 128, 128, 76, 85, 255]))
    assert np.abs(decode(ycbcr)[0].astype(int) - [[255, 255, 255], [254, 0, 0]]).max() < 3


def test_a_colour_profile_changes_nothing() -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for kind in ("JPEG", "PNG"):
        data = encoded(picture(), kind)
        np.testing.assert_array_equal(decode(encoded(picture(), kind, icc_profile=profile)), decode(data))


# Transparency


def test_every_kind_of_transparency_is_laid_on_white() -> None:
    straight = layout([8] * 4, 2, extra=(3, [2]))
    assert decode(tiff((2, 1), straight, bytes([10, 20, 30, 128, 30, 40, 50, 255]))).tolist() == [
        [[132, 137, 142], [30, 40, 50]]
    ]
    premultiplied = layout([8] * 4, 2, extra=(3, [1]))
    assert decode(tiff((2, 1), premultiplied, bytes([10, 20, 30, 128, 30, 40, 50, 255]))).tolist() == [
        [[137, 147, 157], [30, 40, 50]]
    ]
    for extra, expected in ((2, 236), (1, 245)):  # grey with alpha, and multiplied by it
        assert grey_of(tiff((1, 1), layout([8, 8], 1, extra=(3, [extra])), bytes([10, 20])))[0] == pytest.approx(
            expected, abs=1
        )
    palette = Image.new("P", (4, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    for kind in ("PNG", "GIF"):
        pixels = decode(encoded(palette, kind, transparency=1))
        assert pixels[0].tolist() == [[200, 0, 0], [255, 255, 255], [200, 0, 0], [200, 0, 0]]
        assert decode(encoded(palette, kind))[0, 1].tolist() == [0, 200, 0], "a palette without a transparent colour"
    assert decode(encoded(palette.convert("RGB").convert("PA"), "TIFF")).shape == (1, 4, 3)


def test_a_colour_that_stands_for_transparent_becomes_white_at_8_and_16_bits() -> None:
    assert grey_of(png((3, 1), 8, 0, b"\0\x00\x50\xff", chunk(b"tRNS", struct.pack(">H", 0x50)))) == [0, 255, 255]
    assert grey_of(
        png((3, 1), 16, 0, b"\0" + struct.pack(">3H", 0, 30000, 257), chunk(b"tRNS", struct.pack(">H", 30000)))
    ) == [0, 255, 1]
    colours = struct.pack(">6H", 30000, 0, 0, 0, 0, 0)
    key = chunk(b"tRNS", struct.pack(">3H", 30000, 0, 0))
    assert decode(png((2, 1), 16, 2, b"\0" + colours, key)).tolist() == [[[255, 255, 255], [0, 0, 0]]]
    assert grey_of(png((8, 1), 1, 0, b"\0\x0f", chunk(b"tRNS", struct.pack(">H", 0)))) == [255] * 8


# More and less than 8 bits


def test_fewer_bits_are_scaled_to_the_whole_range() -> None:
    assert grey_of(png((8, 1), 1, 0, b"\0\x0f")) == [0] * 4 + [255] * 4
    assert grey_of(png((4, 1), 2, 0, b"\0\x1b")) == [0, 85, 170, 255]
    assert grey_of(png((2, 1), 4, 0, b"\0\x1b")) == [17, 187]


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_pictures_are_scaled(order: str) -> None:
    values = [0, 257, 32768, 65535]
    packed = struct.pack(f"{order}4H", *values)
    assert grey_of(tiff((4, 1), layout([16], 1), packed, order=order)) == [0, 1, 128, 255]
    if order == "<":
        assert grey_of(tiff((4, 1), layout([16], 0), packed)) == [255, 254, 127, 0], "white is zero"
    big = struct.pack(">4H", *values)
    assert grey_of(png((4, 1), 16, 0, b"\0" + big)) == [0, 1, 128, 255]
    rgb = b"".join(struct.pack(">H", value) * 3 for value in values)
    assert np.abs(np.subtract(grey_of(png((4, 1), 16, 2, b"\0" + rgb)), [0, 1, 128, 255])).max() <= 1
    assert grey_of(b"P5 4 1 65535\n" + big) == [0, 1, 128, 255]
    assert grey_of(b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 2048)) == [255, 128]


def test_a_12_bit_tiff_is_scaled_by_its_own_white() -> None:
    assert grey_of(tiff((2, 1), layout([12], 1), bytes([0xFF, 0xF8, 0x00]))) == [255, 128]


def floats(*values: float) -> bytes:
    return tiff((len(values), 1), layout([32], 1, sample_format=(3, [3])), np.array(values, "<f4").tobytes())


def integers(kind: str, *values: int) -> bytes:
    sample_format = 2 if kind[1] == "i" else 1
    tags = layout([8 * np.dtype(kind).itemsize], 1, sample_format=(3, [sample_format]))
    return tiff((len(values), 1), tags, np.array(values, kind).tobytes())


def test_floats_between_0_and_1_are_shares_of_white() -> None:
    assert grey_of(floats(0, 0.25, 0.5, 0.5)) == [0, 64, 128, 128]


def test_other_floats_are_stretched_from_their_lowest_to_their_highest_and_never_clipped() -> None:
    assert grey_of(floats(-100, 0, 300)) == [0, 64, 255]
    assert grey_of(floats(0, 1, 1.02)) == [0, 250, 255]
    assert grey_of(floats(-3e38, 0, 3e38)) == [0, 128, 255]
    assert grey_of(floats(7, 7)) == [0, 0], "a picture of one value shows nothing"
    assert grey_of(b"Pf\n2 1\n-1.0\n" + np.array([0, 0.5], "<f4").tobytes()) == [0, 128]


def test_numbers_that_are_not_finite_go_to_the_ends() -> None:
    assert grey_of(floats(np.nan, 0, 10, np.inf, -np.inf, 5)) == [0, 0, 255, 255, 0, 128]
    with pytest.raises(DecodeError, match="none of its pixels is a finite number"):
        decode(floats(np.nan, np.inf))


def test_integers_of_more_bits_or_with_a_sign_keep_their_values_or_are_stretched() -> None:
    assert grey_of(integers("<i4", 0, 7, 255)) == [0, 7, 255]
    assert grey_of(integers("<i4", -1000, 0, 3000)) == [0, 64, 255]
    assert grey_of(integers("<u4", 0, 2**31, 2**32 - 1)) == [0, 128, 255]
    assert grey_of(integers("<i2", -5, 0, 1000)) == [0, 1, 255]
    assert grey_of(integers("<i1", -128, 0, 127)) == [0, 128, 255]


def test_stretching_in_blocks_gives_what_stretching_at_once_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)), "TIFF")
    whole = decode(data)
    monkeypatch.setattr("foreseen.data.pixel_modes._PIXELS_AT_ONCE", 90)
    np.testing.assert_array_equal(decode(data), whole)
    assert (whole.min(), whole.max()) == (0, 255)


def test_channels_beyond_the_third_are_left_out_and_layouts_without_colours_refused() -> None:
    assert decode(tiff((1, 1), layout([8] * 5, 2, extra=(3, [0, 0])), bytes([1, 2, 3, 4, 5]))).tolist() == [[[1, 2, 3]]]
    for tags, size in ((layout([8] * 5, 1, extra=(3, [0] * 4)), 5), (layout([8, 8], 1), 2), (layout([64], 1), 8)):
        with pytest.raises(DecodeError, match="it is TIFF whose header is broken or of a kind that is not read"):
            decode(tiff((1, 1), tags, bytes(size)))


# Files of many pictures, and under wrong names


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_many_frames_or_pages_the_first_is_taken(kind: str) -> None:
    frames = [picture(seed=seed).convert("RGB") for seed in range(3)]
    frames[1].paste("red", (0, 0, 48, 32))
    if kind == "GIF":
        frames = [frame.quantize(64) for frame in frames]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decode(data), np.asarray(frames[0].convert("RGB")))


def test_the_preview_in_a_raw_camera_file_is_not_taken_for_the_picture() -> None:
    for tags in (layout([8] * 3, 2, subfile=(4, [1])), RGB | {50706: (1, [1, 4, 0, 0])}):
        with pytest.raises(DecodeError, match="raw camera file"):
            decode(tiff((1, 1), tags, bytes(3)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", r"web page \(HTML\).*download it again"),
        (b"\n  <HTML>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer.*`git lfs pull`"),
        (b"/annex/objects/SHA256E-s1--0.jpg\n", "git-annex pointer"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "HEIC or HEIF.*convert it to JPEG"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1", "AVIF.*convert it"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "film"),
        (b"\0\0\0\x18ftypcrx \0\0\0\0", "raw camera file"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), "raw camera file"),
        (b"IIRO\x08\0\0\0", "raw camera file"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', r"drawing \(SVG\): convert it to PNG"),
        (b"8BPS\0\1", r"Photoshop.*export it"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000: convert"),
        (b"\xff\x0a\0\0", "JPEG XL"),
        (b"\0\x05\x16\x07\0\2\0\0", "AppleDouble.*delete it"),
        (b"\0\0\0\1Bud1\0\0", r"\.DS_Store"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", r"Thumbs\.db"),
        (bytes(128) + b"DICM", "DICOM"),
        (bytes(5000), "nothing but zero bytes"),
        (b'{"error": "quota exceeded"}', "it is text and no picture, it begins with '{\"error"),
        (b"\x80\x04\x95", "pickle, which is never opened"),
        (b"PK\x03\x04", "zip archive"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\xd8\xff\xe0", "JPEG whose header is broken"),
        (b"RIFF\x24\0\0\0WEBPVP8 \0", "broken or truncated WEBP"),
        (b"\x01\x02\x03\x04" * 9, r"no picture in a format that is read \(JPEG, PNG"),
    ],
)  # fmt: skip
def test_what_is_no_picture_says_what_it_is_and_what_to_do(data: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        decode(data)


def test_every_suffix_has_a_decoder_and_every_decoder_a_suffix() -> None:
    by_suffix = Image.registered_extensions()
    assert {by_suffix.get(suffix, "PNG") for suffix in IMAGE_SUFFIXES} == set(FORMATS)


# Truncation and damage


def small_files() -> dict[str, bytes]:
    image, grey = picture(40, 24), picture(40, 24).convert("L")
    deflated = zlib.compress(image.tobytes())
    return {
        "JPEG": encoded(image),
        "JPEG, progressive": encoded(image, progressive=True),
        "JPEG with restarts": encoded(image, restart_marker_blocks=2),
        "JPEG, grey": encoded(grey),
        "JPEG, CMYK": encoded(image.convert("CMYK")),
        "PNG": encoded(image, "PNG"),
        "PNG, animated": encoded(image, "PNG", save_all=True, append_images=[picture(40, 24, 1)]),
        "GIF": encoded(image.quantize(32), "GIF"),
        "WEBP": encoded(image, "WEBP"),
        "WEBP, lossless": encoded(image, "WEBP", lossless=True),
        "BMP": encoded(image, "BMP"),
        "BMP, 1 bit": encoded(image.convert("1"), "BMP"),
        "TIFF": encoded(image, "TIFF"),
        "TIFF, LZW": encoded(image, "TIFF", compression="tiff_lzw"),
        "TIFF, JPEG": encoded(image, "TIFF", compression="jpeg"),
        "TIFF, fax": encoded(image.convert("1"), "TIFF", compression="group4"),
        "TIFF, deflated, directory first": tiff(image.size, layout([8] * 3, 2, compression=(3, [8])), deflated),
        "PPM": encoded(image, "PPM"),
        "PPM of 12 bits": b"P6 9 9 4095\n" + bytes(range(243)) * 2,
    }


def test_netpbm_in_text_is_refused_since_a_number_that_is_cut_is_still_a_number() -> None:
    with pytest.raises(DecodeError, match="netpbm in text"):
        decode(b"P2 2 1 255\n100 180\n")


@pytest.mark.parametrize("kind", small_files())
def test_a_file_cut_anywhere_is_refused_or_whole(kind: str) -> None:
    data = small_files()[kind]
    whole = decode(data, fast=False)
    for fast in (False, True) if data.startswith(b"\xff\xd8") and _torchcodec() else (False,):
        for length in range(len(data)):
            try:
                pixels = decode(data[:length], fast=fast)
            except DecodeError:
                continue
            np.testing.assert_array_equal(pixels, whole, err_msg=f"cut after {length} of {len(data)} bytes")


@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"restart_marker_rows": 1}, {"subsampling": 0}])
def test_zeros_in_the_middle_of_a_jpeg_are_found(options: dict[str, object]) -> None:
    data = encoded(picture(640, 480), quality=95, **options)
    start = data.index(b"\xff\xda") + 20
    assert find_damage(data) is None
    generator = random.Random(0)
    for size in (512, 4096):
        for _ in range(20):
            at = generator.randrange(start, len(data) - size - 2)
            zeroed = data[:at] + bytes(size) + data[at + size :]
            assert "it is damaged: " in (find_damage(zeroed) or "")


def test_even_areas_of_a_jpeg_are_not_taken_for_damage() -> None:
    for colour in ("white", "black", "#0a7"):
        image = Image.new("RGB", (2000, 1000), colour)
        image.paste(picture(200, 100), (900, 400))
        for options in ({}, {"optimize": True}, {"progressive": True}, {"optimize": True, "quality": 20}):
            assert find_damage(encoded(image, **options)) is None
            assert find_damage(encoded(image.convert("L"), **options)) is None
            assert find_damage(encoded(image.convert("CMYK"), **options)) is None


def test_markers_that_may_not_stand_among_pixels_are_found() -> None:
    data = encoded(picture(640, 480), quality=95, restart_marker_rows=1)
    assert find_damage(data) is None
    middle = len(data) // 2
    assert "ff01" in (find_damage(data[:middle] + b"\xff\x01" + data[middle + 2 :]) or "")
    restarts = [at for at in range(middle, len(data)) if data[at] == 0xFF and 0xD0 <= data[at + 1] <= 0xD7]
    assert "restart marker" in (find_damage(data[: restarts[3]] + data[restarts[5] :]) or "")


def test_a_png_with_a_wrong_checksum_is_damaged() -> None:
    data = bytearray(encoded(picture(), "PNG", compress_level=0))
    assert find_damage(bytes(data)) is None
    data[len(data) // 2] ^= 4
    assert "checksum of its IDAT chunk" in (find_damage(bytes(data)) or "")


def test_a_picture_that_packing_finds_damaged_is_left_out_with_the_reason(tmp_path: Path) -> None:
    data = encoded(picture(640, 480), quality=95)
    (tmp_path / "whole.jpg").write_bytes(data)
    (tmp_path / "zeroed.jpg").write_bytes(data[:40_000] + bytes(4096) + data[44_096:])
    summary = pack(FolderListing(tmp_path), tmp_path / "set", "train", workers=1)
    assert [name for name, _ in summary.unreadable] == ["zeroed.jpg"]
    assert "its pixels are zero bytes from byte 40,000 on" in summary.unreadable[0][1]


# Sizes and names

BOMBS = """
import resource
from tests.dirty_files import header_bombs
from foreseen.data.decode import DecodeError, decode
bombs = header_bombs()
decode(bombs["PNG whose pixels unfold to 256 MB"], fast=False)
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), taken + (64 << 20)))
for name, data in bombs.items():
    try:
        print(name, decode(data, fast=False).shape)
    except DecodeError as error:
        print(name, "refused:", error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are the kernel's")
def test_no_header_bomb_takes_more_than_64_mb() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOMBS], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 18
    assert any(line.startswith("WEBP canvas refused: it is 65000 x 65000 pixels") for line in lines), (
        "before it is opened"
    )
    assert [line for line in lines if "refused" not in line] == ["PNG whose pixels unfold to 256 MB (1, 1, 3)"]


@pytest.mark.parametrize("size", [(1, 1), (4000, 20), (20, 4000), (1, 3000)])
def test_views_are_cut_from_pictures_of_any_shape(size: tuple[int, int], tmp_path: Path) -> None:
    views = (
        View("random", (32, 32)),
        View("centre", (32, 32), crop="centre"),
        View("small", (16, 16), scale=(0.05, 0.1)),
    )
    cutter = ViewCutter(views, sample_keys(0, np.arange(8)))
    pixels = decode(encoded(Image.new("RGB", size, (9, 200, 30)), "PNG"))
    for row in range(8):
        cutter.cut(row, pixels)
    for view in views:
        assert (cutter.tensors[view.name] == cutter.tensors[view.name][0, :, :1, :1]).all()


NAMES = [
    b"with space.jpg", b"two.dots.in.it.jpg", b"UPPER.JPG", b"same.jpg", b"same.png", b"caf\xc3\xa9 \xe7\x8c\xab.jpeg",
    b"caf\xe9.jpg", b"line\nbreak.jpg", b"tab\there.jpg", b"-dash.jpg", b"~.jpg", b"a" * 251 + b".jpg", b"%s{0}.jpg",
]  # fmt: skip


def test_any_file_name_is_packed_and_every_picture_is_there(tmp_path: Path) -> None:
    source = os.fsencode(tmp_path / "source")
    os.mkdir(source)
    for number, name in enumerate(NAMES):
        with open(os.path.join(source, name), "wb") as file:
            file.write(encoded(picture(seed=number)))
    for hidden in (b"._with space.jpg", b".DS_Store"):
        with open(os.path.join(source, hidden), "wb") as file:
            file.write(b"\0\x05\x16\x07")
    with open(os.path.join(source, b"Thumbs.db"), "wb") as file:
        file.write(b"\xd0\xcf\x11\xe0")
    listing = FolderListing(tmp_path / "source")
    summary = pack(listing, tmp_path / "set", "train", workers=1)
    assert (summary.samples, summary.unreadable, listing.skipped) == (len(NAMES), [], 1)
    data = ShardSet.open(tmp_path / "set", "train")
    names = [data.facts(sample)["path"] for sample in range(len(data))]
    assert len(set(names)) == len(NAMES)
    assert {"two.dots.in.it.jpg", "same.jpg", "same.png", "line\\nbreak.jpg", "caf�.jpg"} <= set(names)


def test_strict_lists_every_bad_picture_of_a_folder(tmp_path: Path) -> None:
    good = encoded(picture())
    bad = {
        "empty.jpg": b"", "page.jpg": b"<html>", "pointer.png": b"version https://git-lfs.github.com/spec/v1\n",
        "half.jpg": good[:400], "phone.jpg": b"\0\0\0\x18ftypheic", "new\nline.jpg": b"?", "zeros.tif": bytes(999),
    }  # fmt: skip
    for name, data in {**bad, "good.jpg": good}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=r"7 of 8 pictures cannot be read, so nothing was packed"):
        pack(FolderListing(tmp_path), tmp_path / "set", "train", workers=1, strict=True)
    lines = (tmp_path / "set" / "train.unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert {line.split("\t")[0] for line in lines} == {name.replace("\n", "\\n") for name in bad}
    assert all(line.split("\t")[1] for line in lines)


# Loader and packer agree


@pytest.mark.skipif(_torchcodec() is None, reason="torchcodec is not installed")
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_torchcodec_and_pillow_agree_on_damaged_jpegs(options: dict[str, object]) -> None:
    whole, generator, read = encoded(picture(120, 90), **options), random.Random(1), 0
    for _ in range(200):
        data = bytearray(whole)
        for _ in range(generator.choice((1, 3, 20))):
            data[generator.randrange(2, len(data))] = generator.randrange(256)
        outcomes: list[object] = []
        for fast in (False, True):
            try:
                outcomes.append(decode(bytes(data), fast=fast).tolist())
            except DecodeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        read += not isinstance(outcomes[0], str)
    assert 20 < read < 180


def test_what_is_packed_decodes_to_what_was_in_the_source(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "grey16.png": encoded(Image.fromarray(np.arange(0, 60000, 50, dtype=np.uint16).reshape(30, 40)), "PNG"),
        "turned.png": encoded(picture(), "PNG", exif=turned), "turned.tif": encoded(picture(), "TIFF", exif=turned),
        "palette.gif": encoded(picture().quantize(16), "GIF"), "float.tif": floats(-5, 0, 7),
        "cmyk.tif": encoded(picture().convert("CMYK"), "TIFF"), "alpha.png": encoded(picture().convert("LA"), "PNG"),
        "bits.bmp": encoded(picture().convert("1"), "BMP"), "a.ppm": encoded(picture(), "PPM"),
        "jpeg inside.png": encoded(picture()), "gif inside.png": encoded(picture().quantize(16), "GIF"),
    }  # fmt: skip
    for name, data in files.items():
        (source / name).write_bytes(data)
    summary = pack(FolderListing(source), tmp_path / "set", "train", workers=1)
    assert (summary.image, summary.samples) == ("png", len(files))
    packed = ShardSet.open(tmp_path / "set", "train")
    for sample in range(len(packed)):
        original = files[packed.facts(sample)["path"]]
        np.testing.assert_array_equal(decode(packed.read(sample)), decode(original))
