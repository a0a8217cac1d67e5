"""Files that Pillow would not write: TIFFs and PNGs of any layout, JPEGs of odd colours, headers that lie."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageChops

BOMB_SIDE = 65_000  # pixels a side that a header bomb promises


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A smooth coloured picture with some noise."""
    y, x = np.mgrid[:height, :width]
    planes = np.stack([x * 200 / width, y * 200 / height, (x + y) * 150 / (width + height)], axis=-1)
    noise = np.random.default_rng(seed).integers(0, 40, planes.shape)
    return Image.fromarray((planes + noise).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    """The picture as a file's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def tiff(
    size: tuple[int, int], tags: Mapping[int, tuple[int, Sequence[int]]], data: bytes, *, order: str = "<"
) -> bytes:
    """A TIFF of one strip whose directory stands before its pixels; tags are number: (type, values)."""
    width, height = size
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]), 257: (4, [height]), 259: (3, [1]), 278: (4, [height]), 279: (4, [len(data)]), 273: (4, [0]),
        **tags,
    }  # fmt: skip
    letters = {1: "B", 2: "B", 3: "H", 4: "I"}
    packed = {tag: struct.pack(f"{order}{len(v)}{letters[kind]}", *v) for tag, (kind, v) in entries.items()}
    beyond_at = 8 + 2 + 12 * len(entries) + 4
    pixels_at = beyond_at + sum(len(raw) for raw in packed.values() if len(raw) > 4)
    packed[273] = struct.pack(f"{order}I", pixels_at)
    directory, beyond = b"", b""
    for tag, (kind, values) in sorted(entries.items()):
        raw = packed[tag]
        directory += struct.pack(f"{order}HHI", tag, kind, len(values))
        directory += raw.ljust(4, b"\0") if len(raw) <= 4 else struct.pack(f"{order}I", beyond_at + len(beyond))
        beyond += raw if len(raw) > 4 else b""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + directory + bytes(4) + beyond + data


def layout(
    bits: Sequence[int], photometric: int, **more: tuple[int, Sequence[int]]
) -> dict[int, tuple[int, Sequence[int]]]:
    """The tags of a TIFF that say what its pixels are."""
    names = {"compression": 259, "orientation": 274, "extra": 338, "sample_format": 339, "subfile": 254}
    return {258: (3, bits), 262: (3, [photometric]), 277: (3, [len(bits)])} | {names[n]: tag for n, tag in more.items()}


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk with its checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colour_type: int, rows: bytes, *chunks: bytes) -> bytes:
    """A PNG of raw rows, each of them with its filter byte; `chunks` stand before the pixels."""
    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def ycck(cmyk: Image.Image) -> bytes:
    """A JPEG as Photoshop writes it: inverted CMYK, of which three channels are stored as luminance and colour."""
    cyan, magenta, yellow, black = cmyk.split()
    planes = [ImageChops.invert(p) for p in Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr").split()]
    data = bytearray(encoded(Image.merge("CMYK", (*planes, black)), quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # the transform of the APP14 segment
    return bytes(data)


def without_segment(data: bytes, marker: int) -> bytes:
    """A JPEG without its first segment of a kind."""
    at = data.index(bytes([0xFF, marker]))
    return data[:at] + data[at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") :]


def exif(entry: bytes) -> bytes:
    """An EXIF block with one directory entry of 12 bytes."""
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)


def header_bombs() -> dict[str, bytes]:
    """Small files whose headers promise 65,000 x 65,000 pixels, or whose chunks unfold to 256 MB."""
    side = BOMB_SIDE
    jpeg = bytearray(encoded(picture()))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    gif = bytearray(encoded(picture().quantize(16), "GIF"))
    gif[6:10] = struct.pack("<HH", side, side)
    gif_frame = bytearray(encoded(picture().quantize(16), "GIF"))
    at = gif_frame.index(b"\x2c\0\0\0\0")
    gif_frame[at + 5 : at + 9] = struct.pack("<HH", side, side)
    bmp = bytearray(encoded(picture(), "BMP"))
    bmp[18:26] = struct.pack("<ii", side, side)
    webp = bytearray(encoded(picture(), "WEBP", save_all=True, append_images=[picture(seed=1)]))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (side - 1).to_bytes(3, "little") * 2
    lossy, lossless = (bytearray(encoded(picture(), "WEBP", lossless=flag)) for flag in (False, True))
    lossy[26:30] = struct.pack("<HH", 16383, 16383)
    lossless[21:25] = struct.pack("<I", 16383 | 16383 << 14)
    rgb = layout([8, 8, 8], 2)
    packer = zlib.compressobj(1)
    zeros = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    plain_row = b"\0" + bytes(3)
    return {
        "JPEG": bytes(jpeg),
        "PNG": png((side, side), 8, 2, bytes(100)),
        "PNG with a text that unfolds to 256 MB": png((1, 1), 8, 2, plain_row, chunk(b"zTXt", b"a\0\0" + zeros)),
        "PNG with a profile that unfolds to 256 MB": png((1, 1), 8, 2, plain_row, chunk(b"iCCP", b"a\0\0" + zeros)),
        "PNG whose pixels unfold to 256 MB": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zeros),
        "GIF canvas": bytes(gif),
        "GIF frame": bytes(gif_frame),
        "BMP": bytes(bmp),
        "WEBP canvas": bytes(webp),
        "WEBP, lossy": bytes(lossy),
        "WEBP, lossless": bytes(lossless),
        "PPM": b"P6 %d %d 255\n" % (side, side) + bytes(100),
        "PPM in text": b"P3 %d %d 255\n" % (side, side) + b"1 " * 100,
        "PPM that Python decodes": b"P3 3000 3000 255\n" + b"1 " * 100,
        "TIFF strips": tiff((side, side), rgb, bytes(100)),
        "TIFF tile": tiff(
            (8, 8), {**rgb, 322: (4, [side]), 323: (4, [side]), 324: (4, [8]), 325: (4, [100])}, bytes(200)
        ),
        "TIFF, deflated": tiff((side, side), {**rgb, 259: (3, [8])}, zlib.compress(bytes(1000))),
        "TIFF with a tag of 4 GB": tiff((8, 8), rgb, bytes(192)).replace(
            struct.pack("<HHI", 258, 3, 3), struct.pack("<HHI", 258, 3, 0x7FFFFFFF)
        ),
    }
