"""What reads bytes of strangers, each as a pair: make an input from a seeded generator, and read it.

To read may end well, or in our own words: BadInput, or CorruptSample for one sample. Anything else is a fault.
"""

import io
import json
import random
import struct
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save as save_tensors

from foreseen.commands.verbs import load_recipe
from foreseen.config import RECIPES, read_yaml
from foreseen.data.arrays import map_array
from foreseen.data.decode import decode
from foreseen.data.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from foreseen.data.shards import INDEX_ROW, CorruptSample, ShardSet, rows_digest
from foreseen.data.table import Columns, TableSource
from foreseen.data.tars import scan_tar
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.log import _drop_lines_after
from foreseen.engine.run_folder import record_start
from foreseen.engine.unreadable import FILE_NAME, UnreadableList
from foreseen.handoff.encoder import load_encoder
from foreseen.printable import printable
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_png, mutate_text


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        make: an input.
        read: reads it, in an empty folder of its own.
    """

    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], None]


@cache
def _pictures() -> dict[str, bytes]:
    """A small picture of every format and some of its kinds."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "jpeg": (rgb, "JPEG", {}),
        "jpeg progressive": (rgb, "JPEG", {"progressive": True, "exif": exif}),
        "jpeg grey": (rgb.convert("L"), "JPEG", {}),
        "jpeg cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "png": (rgb, "PNG", {"exif": exif}),
        "png palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "png 16": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PNG", {}),
        "png alpha": (rgb.convert("RGBA"), "PNG", {}),
        "gif": (rgb.convert("P"), "GIF", {"save_all": True, "append_images": [rgb.convert("P").rotate(90)]}),
        "bmp": (rgb, "BMP", {}),
        "bmp palette": (rgb.convert("P"), "BMP", {}),
        "webp": (rgb, "WEBP", {"exif": exif}),
        "webp lossless": (rgb.convert("RGBA"), "WEBP", {"lossless": True}),
        "tiff": (rgb, "TIFF", {}),
        "tiff lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tiff deflate": (rgb.convert("L"), "TIFF", {"compression": "tiff_deflate"}),
        "tiff jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff g4": (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        "tiff 16": (Image.fromarray(pixels[..., 0].astype(np.uint16)), "TIFF", {}),
    }
    made = {}
    for name, (image, kind, options) in kinds.items():
        out = io.BytesIO()
        image.save(out, kind, **options)
        made[name] = out.getvalue()
    return made


def _make_picture(kind: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        name = rng.choice([name for name in _pictures() if name.split()[0] == kind])
        data = _pictures()[name]
        if kind == "png" and rng.random() < 0.7:
            return mutate_png(data, rng)
        return mutate_bytes(data, rng, head=200)

    return make


def _read_picture(data: bytes, folder: Path) -> None:
    refused = None
    for fast in (True, False):
        try:
            pixels = decode(data, fast=fast, max_pixels=1_000_000)
        except CorruptSample as error:
            printable(str(error)).encode()
            refused = error
        else:
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            assert pixels.shape[2] == 3
            assert pixels.shape[0] * pixels.shape[1] <= 1_000_000
            assert pixels.flags.writeable
            assert pixels.flags.c_contiguous
    if refused is not None:
        raise refused


@cache
def _tars() -> tuple[bytes, ...]:
    """Of the three formats, with long names, links, folders and a pipe."""
    made = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for number in range(4):
                for extension, data in (("jpg", _pictures()["jpeg"]), ("json", b"{}")):
                    name = f"{number:04d}.{extension}"
                    if number == 2:
                        name = f"{'deep/' * 24}{name}" if form == tarfile.USTAR_FORMAT else f"{'long' * 60}ü{name}"
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
                info = tarfile.TarInfo(f"other{kind.decode()}")
                info.type, info.linkname = kind, "../../etc/passwd"
                tar.addfile(info)
        made.append(out.getvalue())
    return tuple(made)


def _make_tar(rng: random.Random) -> bytes:
    raw = bytearray(rng.choice(_tars()))
    for _ in range(rng.randint(0, 3)):  # a header whose checksum is right
        at = rng.randrange(len(raw) // 512) * 512
        field = rng.choice(((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
        fills = (
            b"9" * 155,
            b"7" * 155,
            b"\xff" * 155,
            b"\x80" + b"\xff" * 154,
            bytes(155),
            rng.randbytes(155),
            b"LKSxgV5",
        )
        fill = rng.choice(fills)
        raw[at + field[0] : at + field[0] + field[1]] = fill[: field[1]].ljust(field[1], b"\0")
        raw[at + 148 : at + 156] = b" " * 8
        raw[at + 148 : at + 156] = b"%06o\0 " % (sum(raw[at : at + 512]) % 8**6)
    return mutate_bytes(bytes(raw), rng) if rng.random() < 0.6 else bytes(raw)


def _read_tar(data: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(data)
    for member in scan_tar(folder / "a.tar"):
        assert 0 <= member.offset <= member.offset + member.size <= len(data)
        printable(member.name).encode()


ROWS = 4


@cache
def _arrays() -> dict[str, bytes]:
    found = [member for member in _scan(_tars()[0]) if member[0].endswith(".jpg")]
    index = np.array([(offset // 512, size, 0) for _, offset, size in found], dtype=INDEX_ROW)
    made = {}
    for name, array in (("index", index), ("labels", np.array([0, 1, -1, 1], dtype="<i4"))):
        out = io.BytesIO()
        np.save(out, array)
        made[name] = out.getvalue()
    return made


def _scan(tar: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        return [(info.name, info.offset_data, info.size) for info in opened if info.isreg()]


def _make_array(name: str) -> Callable[[random.Random], bytes]:
    def make(rng: random.Random) -> bytes:
        data = _arrays()[name]
        start = 10 + int.from_bytes(data[8:10], "little")
        if rng.random() < 0.4:
            return data[:start] + mutate_bytes(data[start:], rng)[: len(data) - start].ljust(len(data) - start, b"\xff")
        if rng.random() < 0.5:
            return mutate_bytes(data, rng, head=start)
        header = mutate_text(data[10:start].decode("latin1"), rng).encode("latin1", "replace")[:60_000]
        version = rng.choice((b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00"))
        length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
        return b"\x93NUMPY" + version + length + header + data[start:]

    return make


def _write_set(folder: Path, **other: bytes) -> None:
    """A set of one shard, with some of its files as given."""
    parts = {"tar": _tars()[0], **_arrays(), **other}
    (folder / "train-000000.tar").write_bytes(parts["tar"])
    (folder / "train.index.npy").write_bytes(parts["index"])
    (folder / "train.labels.npy").write_bytes(parts["labels"])
    index = np.zeros(ROWS, INDEX_ROW)
    split = Split(
        samples=ROWS, shards=(Shard("train-000000.tar", ROWS, len(parts["tar"])),), image="jpg",
        index="train.index.npy", index_digest=rows_digest(index), labels="train.labels.npy", mean=(0.5,) * 3,
        std=(0.2,) * 3, source="fuzz", licence=None, plan=None,
    )  # fmt: skip
    write_manifest(folder, Manifest({"train": split}, ("a", "b")))
    if "manifest" in other:
        (folder / "manifest.json").write_bytes(other["manifest"])


def _use_set(folder: Path) -> None:
    shards = ShardSet.open(folder, "train")
    assert shards.num_classes >= 0
    assert shards.labels_fingerprint is None or len(shards.labels_fingerprint) == 32
    for sample in range(min(len(shards), 8)):
        try:
            decode(shards.read(sample), max_pixels=1_000_000)
        except CorruptSample as error:
            printable(str(error)).encode()
        printable(shards.describe(sample)).encode()
    shards.check_sizes()


def _read_index(data: bytes, folder: Path) -> None:
    _write_set(folder, index=data)
    _use_set(folder)


def _read_labels(data: bytes, folder: Path) -> None:
    _write_set(folder, labels=data)
    map_array(folder / "train.labels.npy", np.dtype("<i4"), ROWS)
    _use_set(folder)


def _read_shard(data: bytes, folder: Path) -> None:
    _write_set(folder, tar=data)
    _use_set(folder)


@cache
def _manifest() -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        _write_set(Path(folder))
        return json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))


def _read_manifest(data: bytes, folder: Path) -> None:
    _write_set(folder, manifest=data)
    read_manifest(folder)
    _use_set(folder)


def _make_recipe(rng: random.Random) -> bytes:
    path = rng.choice(sorted((RECIPES / "pretrain").glob("*.yaml")))
    return mutate_text(path.read_text(encoding="utf-8"), rng).encode("utf-8", "replace")


def _read_recipe(data: bytes, folder: Path) -> None:
    (folder / "recipe.yaml").write_bytes(data)
    load_recipe("pretrain", str(folder / "recipe.yaml"), []).with_length(1000)


_KEYS = (
    "run.steps",
    "run.dir",
    "model.args",
    "model.name",
    "views.size",
    "method.decoder.depth",
    "data.columns",
    "optim.betas",
)


def _make_override(rng: random.Random) -> bytes:
    return mutate_text(
        f"{rng.choice(_KEYS)}={rng.choice(('1', '[1, 2]', '{a: 1}', 'null', 'a/b', '0.5'))}", rng
    ).encode("utf-8", "replace")


def _read_override(data: bytes, folder: Path) -> None:
    load_recipe("pretrain", "mae_cpu_minutes", [data.decode("utf-8", "replace")])


def _make_resolved(rng: random.Random) -> bytes:
    return mutate_text("seed: 0\nrun: {dir: a, steps: 3}\ndata:\n- &x [1, 2]\n- *x\n", rng).encode("utf-8", "replace")


def _read_resolved(data: bytes, folder: Path) -> None:
    (folder / "config.yaml").write_bytes(data)
    read_yaml(folder / "config.yaml")


def _make_table(rng: random.Random) -> bytes:
    rows = [f"{number}.jpg,{'ab'[number % 2]},{'train' if number % 3 else 'test'}" for number in range(6)]
    text = mutate_text("\n".join(["path,label,split", *rows, '"x, y.jpg",c,train']) + "\n", rng)
    return mutate_bytes(text.encode("utf-8", "replace"), rng) if rng.random() < 0.3 else text.encode("utf-8", "replace")


def _read_table(data: bytes, folder: Path) -> None:
    (folder / "0.jpg").write_bytes(b"x")
    (folder / "table.csv").write_bytes(data)
    source = TableSource(folder / "table.csv", Columns())
    source.digest()
    for samples in source.read().splits.values():
        for number in range(min(len(samples), 20)):
            printable(samples[number].name).encode()


@cache
def _tensors() -> bytes:
    return save_tensors({"a": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.int64)})


def _make_tensors(rng: random.Random) -> bytes:
    data = _tensors()
    (length,) = struct.unpack_from("<Q", data)
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, head=8 + length)
    header = mutate_json(json.loads(data[8 : 8 + length]), rng)
    return struct.pack("<Q", rng.choice((len(header), len(header), 2**63, 0, 2**40))) + header + data[8 + length :]


def _read_tensors(data: bytes, folder: Path) -> None:
    step = folder / "checkpoints/step-3"
    step.mkdir(parents=True)
    for name in ("model", "optimizer"):
        (step / f"{name}.safetensors").write_bytes(data)
    (step / "state.json").write_text("{}", encoding="utf-8")
    Checkpoints(folder / "checkpoints", 3).load(3)


_STATE = {"files": {"model.safetensors": "0" * 64}, "step": 3, "score": 0.5, "starts": [{"started": "2026"}]}
_LINE = {"step": 3, "use": "training", "path": "a", "split": "b", "shard": "c", "key": "d", "sample": 4, "reason": "e"}


def _make_run_json(rng: random.Random) -> bytes:
    return mutate_json(rng.choice((_STATE, _LINE)), rng)


def _read_run_json(data: bytes, folder: Path) -> None:
    step = folder / "checkpoints/step-3"
    step.mkdir(parents=True)
    for name in ("model", "optimizer"):
        (step / f"{name}.safetensors").write_bytes(_tensors())
    for file in (step / "manifest.json", step / "state.json", folder / "metrics.jsonl", folder / FILE_NAME):
        file.write_bytes(data)
    for file in (folder / "environment.json", folder / "checkpoints/best.json"):
        file.write_bytes(data)
    checkpoints = Checkpoints(folder / "checkpoints", 3)
    assert checkpoints.find_damage(3) is not None, "its checksums are zeros"
    checkpoints.load(3)
    _drop_lines_after(folder / "metrics.jsonl", 3)
    unreadable = UnreadableList(folder, _accelerator())
    unreadable.recall(3)
    unreadable.summary(10)
    try:
        record_start(folder, {})
    finally:
        _ = checkpoints.best


@cache
def _accelerator() -> Accelerator:
    return Accelerator(cpu=True)


_ENCODER = {
    "architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 48, "global_pool": "token",
    "model_args": {"img_size": [32, 32], "patch_size": 8, "embed_dim": 48, "depth": 1, "num_heads": 3},
    "pretrained_cfg": {
        "input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "interpolation": "bicubic",
        "crop_pct": 0.9, "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head", "license": "x",
    },
}  # fmt: skip


def _make_encoder(rng: random.Random) -> bytes:
    return mutate_json(_ENCODER, rng)


def _read_encoder(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    (folder / "lineage.json").write_bytes(data)
    (folder / "model.safetensors").write_bytes(_tensors())
    load_encoder(folder)


TARGETS: dict[str, Target] = {
    **{kind: Target(_make_picture(kind), _read_picture) for kind in ("jpeg", "png", "gif", "bmp", "webp", "tiff")},
    "tar": Target(_make_tar, _read_tar),
    "index": Target(_make_array("index"), _read_index),
    "labels": Target(_make_array("labels"), _read_labels),
    "shard": Target(_make_tar, _read_shard),
    "manifest": Target(lambda rng: mutate_json(_manifest(), rng), _read_manifest),
    "recipe": Target(_make_recipe, _read_recipe),
    "override": Target(_make_override, _read_override),
    "resolved config": Target(_make_resolved, _read_resolved),
    "table": Target(_make_table, _read_table),
    "tensors": Target(_make_tensors, _read_tensors),
    "run folder": Target(_make_run_json, _read_run_json),
    "encoder": Target(_make_encoder, _read_encoder),
}
