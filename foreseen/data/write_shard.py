"""Write one shard: what a worker process of `pack` does.

Every picture is decoded once, which finds the unreadable ones and gives the channel statistics; its bytes go into the
tar as they came unless it is shrunk or of another format than the set.

The tar is written with the standard library. webdataset's writer gives the same layout, but importing it imports
torch: half a gigabyte and several seconds in each of many workers.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.damage import find_damage
from foreseen.data.decode import DecodeError, decode
from foreseen.data.shards import TAR_BLOCK, CorruptSample
from foreseen.data.source import Box, SourceSample, read_bounded
from foreseen.data.tars import scan_tar
from foreseen.files import read_json, write_atomically
from foreseen.printable import printable

_STATISTICS_GRID = 64  # pixels a side, about: the mean over many pictures needs no more of each
_PILLOW_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
# A picture of another format than the set's keeps as much as the set's format can hold.
_CONVERSION: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 95, "subsampling": 0},
    "png": {},
    "webp": {"lossless": True},
}


@dataclass(frozen=True)
class ShardJob:
    """A shard to write: its file, the number of its first key, its samples and how their pictures are stored."""

    file: Path
    first_key: int
    samples: list[SourceSample]
    image: str
    max_side: int | None
    quality: int


@dataclass
class ShardResult:
    """What a finished shard holds; kept as json beside it, so that a killed packing goes on.

    Attributes:
        bytes: size of the tar.
        rows: offset / 512, size, crc32 and label (-1: none) of each sample.
        unreadable: name and reason of each sample left out.
        converted, shrunk: pictures that were encoded anew, because of their format or their size.
        sums, squares: over pictures, of the mean of each channel and of its square, in [0, 1].
    """

    bytes: int = 0
    rows: list[list[int]] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: int = 0
    shrunk: int = 0
    sums: list[float] = field(default_factory=lambda: [0.0] * 3)
    squares: list[float] = field(default_factory=lambda: [0.0] * 3)

    @classmethod
    def read(cls, shard: Path) -> "ShardResult":
        """The result of a shard that was finished earlier."""
        return cls(**read_json(done_file(shard)))


def done_file(shard: Path) -> Path:
    """The json beside a shard that says it is finished."""
    return shard.with_suffix(".done.json")


def write_shard(job: ShardJob) -> ShardResult:
    """Write a tar and, after it, the json that says it is finished. The same job gives the same bytes."""
    result = ShardResult()
    part = job.file.with_suffix(f".{os.getpid()}.part")
    checksums: list[tuple[int, int]] = []
    with open(part, "wb") as out:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, sample in enumerate(job.samples):
                try:
                    members, means = _make_members(sample, job, result)
                except (CorruptSample, OSError) as error:
                    result.unreadable.append((printable(sample.name), printable(str(error))))
                    continue
                for extension, data in members.items():
                    _add(tar, f"{job.first_key + number:09d}.{extension}", data)
                checksums.append((zlib.crc32(members[job.image]), -1 if sample.label is None else sample.label))
                result.sums = [total + float(mean) for total, mean in zip(result.sums, means[0], strict=True)]
                result.squares = [total + float(mean) for total, mean in zip(result.squares, means[1], strict=True)]
        out.flush()
        os.fsync(out.fileno())
    images = [member for member in scan_tar(part) if member.name.split(".", 1)[1] == job.image]
    for member, (crc32, label) in zip(images, checksums, strict=True):
        result.rows.append([member.offset // TAR_BLOCK, member.size, crc32, label])
    result.bytes = part.stat().st_size
    os.replace(part, job.file)
    write_atomically(done_file(job.file), json.dumps(asdict(result)).encode())
    return result


def _make_members(
    sample: SourceSample, job: ShardJob, result: ShardResult
) -> tuple[dict[str, bytes], NDArray[np.float64]]:
    """The encoded members of a sample by extension, and its channel statistics [2, 3]."""
    data = read_bounded(sample.image)
    pixels = decode(data, fast=False)
    if (damage := find_damage(data)) is not None:
        raise DecodeError(damage)
    statistics = channel_statistics(pixels)
    height, width = pixels.shape[:2]
    scale = 1.0 if job.max_side is None else min(1.0, job.max_side / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    masks = {
        extension: _scale_mask(read_bounded(blob), extension, (width, height), size)
        for extension, blob in sample.masks.items()
    }
    is_converted = _format_of(data) != job.image
    if scale < 1.0:
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        data = _encode(picture, job.image, {"quality": job.quality})
    elif is_converted:
        data = _encode(Image.fromarray(pixels), job.image, _CONVERSION[job.image])
    result.shrunk += scale < 1.0
    result.converted += is_converted and scale == 1.0
    facts = {"path": printable(sample.name), "width": size[0], "height": size[1], "label": sample.label, **sample.meta}
    facts |= {key: _scale_box(box, (width, height), size) for key, box in sample.boxes.items()}
    return {job.image: data, "json": json.dumps(facts).encode(), **masks}, statistics


def channel_statistics(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean and mean square of each channel, [2, 3], in [0, 1], on a grid of the picture's pixels."""
    down, right = (max(1, side // _STATISTICS_GRID) for side in pixels.shape[:2])
    values = np.ascontiguousarray(pixels[::down, ::right].reshape(-1, 3).T, dtype=np.float64)  # whole: sums are exact
    sums, squares = values.sum(1), np.einsum("cn,cn->c", values, values)
    return np.stack([sums / 255, squares / 255**2]) / np.float64(values.shape[1])


def _format_of(data: bytes) -> str | None:
    """The member extension that fits these bytes, or None for a format that is always converted."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _encode(picture: Image.Image, image: str, options: Mapping[str, Any]) -> bytes:
    out = io.BytesIO()
    try:
        picture.save(out, _PILLOW_NAMES[image], **options)
    except (OSError, ValueError) as error:  # more than 65,500 pixels a side in a JPEG, 16,383 in a WEBP
        raise DecodeError(f"{picture.width} x {picture.height} pixels cannot be stored as {image}: {error}") from None
    return out.getvalue()


def _scale_mask(data: bytes, extension: str, picture: tuple[int, int], size: tuple[int, int]) -> bytes:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as mask:
            if mask.size != picture:
                is_wrong = (
                    f"{extension} is {mask.width} x {mask.height} pixels, the picture {picture[0]} x {picture[1]}"
                )
                raise DecodeError(is_wrong)
            mask.load()
            return data if size == picture else _encode(mask.resize(size, Image.Resampling.NEAREST), "png", {})
    except DecodeError:
        raise
    except Exception as error:  # Pillow's plugins raise nearly everything on malformed input
        raise DecodeError(f"{extension}: {error}") from None


def _scale_box(box: Box | None, picture: tuple[int, int], size: tuple[int, int]) -> list[int] | None:
    if box is None:
        return None
    return [min(size[i % 2], max(0, round(value * size[i % 2] / picture[i % 2]))) for i, value in enumerate(box)]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # owner 0, time 0: the bytes depend on the content alone
    info.size, info.mode = len(data), 0o444
    tar.addfile(info, io.BytesIO(data))
