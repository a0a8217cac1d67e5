"""What reads bytes of strangers, each as a pair: make an input from a seeded generator, and read it.

To read may end well, or in our own words: BadInput, or CorruptSample for one sample. Anything else is a fault.
"""

import argparse
import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save as save_tensors

from foreseen.commands.replay import _config as replay_config
from foreseen.commands.verbs import load_recipe
from foreseen.config import RECIPES, read_yaml
from foreseen.data.arrays import map_array
from foreseen.data.batch import BatchLayout
from foreseen.data.check import check_set, check_tars
from foreseen.data.decode import decode
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from foreseen.data.picture_header import read_header
from foreseen.data.shards import INDEX_ROW, CorruptSample, ShardSet, rows_digest
from foreseen.data.table import Columns, TableSource
from foreseen.data.tar_labels import LabelRule, read_classes
from foreseen.data.tar_paths import find_tars, holds_tars
from foreseen.data.tar_source import TarSource
from foreseen.data.tars import scan_tar
from foreseen.data.unpack_tar import unpack_tar
from foreseen.data.urls import check_url, is_stream, is_url, join
from foreseen.engine.bundle import Bundle, Sample, read_bundle
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.ledger import PIXELS, SAMPLES, Ledger, read_ledger
from foreseen.engine.log import _drop_lines_after
from foreseen.engine.recorder import Record
from foreseen.engine.run_folder import record_start
from foreseen.engine.unreadable import FILE_NAME, UnreadableList
from foreseen.handoff.encoder import load_encoder
from foreseen.handoff.weight_files import open_weights
from foreseen.masked import masked
from foreseen.printable import printable
from foreseen.tokenizers.dvae import DVAE
from foreseen.tokenizers.folder import load_tokenizer
from foreseen.tokenizers.fsq import FSQ
from foreseen.tokenizers.pixel_clusters import PixelClusters
from foreseen.tokenizers.vqkd import VQKD
from tests.fuzz.mutate import mutate_bytes, mutate_json, mutate_pickle, mutate_png, mutate_text


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
        "ppm": (rgb, "PPM", {}),
        "ppm grey": (rgb.convert("L"), "PPM", {}),
        "ppm bits": (rgb.convert("1"), "PPM", {}),
        "ppm 16": (Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), "PPM", {}),
        "ppm floats": (rgb.convert("F"), "PPM", {}),
    }
    made = {}
    for name, (image, kind, options) in kinds.items():
        out = io.BytesIO()
        image.save(out, kind, **options)
        made[name] = out.getvalue()
    made["ppm 10 bits"] = b"P6 # ten bits\n8 4\n1023\n" + bytes(range(192))
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


def _make_header(rng: random.Random) -> bytes:
    data = _make_picture(rng.choice(sorted({name.split()[0] for name in _pictures()})))(rng)
    return data[: rng.randrange(len(data) + 1)] if rng.random() < 0.3 else data


def _read_header(data: bytes, folder: Path) -> None:
    header = read_header(data)
    assert min(header.width, header.height, header.bits) >= 0
    assert all(isinstance(value, int) for value in header[2:])
    printable(f"{header.format} {header.mode}").encode()


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
    for split in read_manifest(folder).splits.values():
        for shard in split.shards:
            printable(join("https://host/set", shard.name)).encode()
    _use_set(folder)
    check_set(folder, workers=1)


@cache
def _foreign_tars() -> tuple[bytes, ...]:
    """As others make them: labels in cls or json, label maps, pickles, scattered members, a key twice."""
    mask = io.BytesIO()
    Image.new("L", (24, 20)).save(mask, "PNG")
    made = []
    for scattered in (False, True):
        samples = [
            [
                (f"s/{number}.jpg", _pictures()["jpeg"]),
                (f"s/{number}.cls", str(number % 3).encode()),
                (f"s/{number}.json", json.dumps({"label": "abc"[number % 3], "n": number, "x": [None, 0.5]}).encode()),
                (f"s/{number}.seg.png", mask.getvalue()),
                (f"s/{number}.pyd", b"\x80\x04."),
            ]
            for number in range(3)
        ]
        members = [member for sample in samples for member in sample]
        if scattered:
            members = members[::2] + members[1::2] + [*samples[0][:1], ("._x.jpg", b"x"), ("nameless", b"x")]
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        made.append(out.getvalue())
    return tuple(made)


def _make_foreign_tar(rng: random.Random) -> bytes:
    if rng.random() < 0.2:
        return _make_tar(rng)
    raw = bytearray(rng.choice(_foreign_tars()))
    for _ in range(rng.randint(1, 3)):  # a name or a small member, with a header that is right
        at = rng.choice([at for at in range(0, len(raw), 512) if raw[at + 257 : at + 262] == b"ustar"])
        size = int(raw[at + 124 : at + 135], 8)
        if rng.random() < 0.4:
            names = (
                b"s/0.jpg",
                b"s/1.json",
                b"s/0.cls",
                b"s/2.png",
                b"../x.jpg",
                b"a\xff.jpg",
                b".",
                b"a.",
                b"s/0.SEG.PNG",
            )
            raw[at : at + 100] = rng.choice(names).ljust(100, b"\0")
        elif 0 < size < 200:
            words = (
                b"-1",
                b"9" * 150,
                b"1e400",
                b"{}",
                b"[1]",
                b'{"label": [1]}',
                b'{"label": NaN}',
                b"\xff",
                b"",
                b"x\n",
            )
            body = (
                rng.choice(words) if rng.random() < 0.5 else mutate_bytes(bytes(raw[at + 512 : at + 512 + size]), rng)
            )
            raw[at + 512 : at + 1024] = body[:512].ljust(512, b"\0")
            raw[at + 124 : at + 136] = b"%011o\0" % min(len(body), 512)
        raw[at + 148 : at + 156] = b" " * 8
        raw[at + 148 : at + 156] = b"%06o\0 " % sum(raw[at : at + 512])
    return mutate_bytes(bytes(raw), rng) if rng.random() < 0.3 else bytes(raw)


def _read_as_source(data: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(data)
    for salvage in (True, False):
        splits = TarSource([str(folder / "a.tar")], salvage=salvage).read()
        for note in splits.notes:
            printable(note).encode()
        for samples in splits.splits.values():
            for sample in samples:
                printable(sample.name).encode()
                json.dumps(dict(sample.meta))
                with contextlib.suppress(CorruptSample):
                    sample.image.read()
                    for blob in sample.masks.values():
                        blob.read()


def _read_as_index(data: bytes, folder: Path) -> None:
    (folder / "a.tar").write_bytes(data)
    for fault in check_tars([folder / "a.tar"], workers=1).faults:
        printable(f"{fault.key}: {fault.reason}").encode()
    for labels in (None, LabelRule("json", "label")):
        options = IndexOptions(labels=labels, checksums=True, statistics=True)
        index_tars({"train": [folder / "a.tar"]}, folder, options, workers=1, overwrite=True)
        _use_set(folder)
    assert check_set(folder, workers=1).splits.keys() == {"train"}


def _make_compressed(rng: random.Random) -> bytes:
    pack = rng.choice((partial(gzip.compress, mtime=0), bz2.compress, lzma.compress))  # else the time is in it
    data = pack(_foreign_tars()[0])
    data = data + pack(_foreign_tars()[0][:512]) if rng.random() < 0.2 else data  # a second stream
    return mutate_bytes(data, rng, head=rng.choice((0, 30)))


def _read_compressed(data: bytes, folder: Path) -> None:
    (folder / "a.tar.gz").write_bytes(data)
    unpack_tar(folder / "a.tar.gz", folder / "a.tar")
    assert (folder / "a.tar").stat().st_size <= 1 << 30


_ADDRESSES = (
    "train-{000..123}.tar", "{a,b}/{train,val}-{0..3}.tar", "{a..z}.tar", "x{0..9..2}.tar", "~/train-{00..10}.tar",
    "s3://bucket/train-{0..9}.tar", "https://user:secret@host:80/a/b.tar?x=1", "http://host/set", "pipe:cat a.tar",
    "file::s3://x/a.tar", "a.tar", "{a.tar,}", "a{.tar,}",
)  # fmt: skip


def _make_address(rng: random.Random) -> bytes:
    text = rng.choice(_ADDRESSES)
    if rng.random() < 0.5:
        bombs = (
            "{0..999999999}", "{0..9999999999999999999999}", "{a,b}" * 40, "{a..z}" * 9, "{x,{y," * 300 + "}}" * 300,
            "{a{0..99999}{0..99999},b}", "{" * 3000, "{" * 3000 + "}" * 3000, "{0.." + "9" * 5000 + "}", "{1..2}" * 18,
        )  # fmt: skip
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(bombs) + text[at:]
    return (mutate_text(text, rng) if rng.random() < 0.7 else text).encode("utf-8", "replace")


def _read_address(data: bytes, folder: Path) -> None:
    text = data.decode("utf-8", "replace")
    is_stream(text)
    printable(masked(text)).encode()
    holds_tars(text)
    if is_url(text):
        check_url(text, "data.path")
        printable(join(text, "a b.tar")).encode()
    (folder / "a.tar").touch()
    find_tars([f"{folder}/{text}"])


_ROW: dict[str, Any] = {"path": "0.jpg", "label": "a", "split": "train", "weight": 0.5, "tags": ["x"]}


def _make_json_lines(rng: random.Random) -> bytes:
    rows = [json.dumps(_ROW | {"path": f"{number}.jpg", "label": number % 2}).encode() for number in range(4)]
    rows[rng.randrange(4)] = mutate_json(_ROW, rng)
    data = b"\n".join(rows) + b"\n"
    return mutate_bytes(data, rng) if rng.random() < 0.2 else data


def _make_list(rng: random.Random) -> bytes:
    rows = rng.choice((["0.jpg", "# x", "a b.jpg", "/x/2.jpg"], ["0.jpg\ta", "1.jpg\tb"], ["0.jpg 3", "n/1.JPEG  -1"]))
    text = mutate_text("\n".join(rows) + "\n", rng)
    return mutate_bytes(text.encode("utf-8", "replace"), rng) if rng.random() < 0.3 else text.encode("utf-8", "replace")


def _make_ledger(rng: random.Random) -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(12, dtype="<u8").reshape(3, 4))
    data = out.getvalue()
    start = 10 + int.from_bytes(data[8:10], "little")
    if rng.random() < 0.5:
        return mutate_bytes(data, rng, head=start)
    header = mutate_text(data[10:start].decode("latin1"), rng).encode("latin1", "replace")[:60_000]
    return data[:8] + struct.pack("<H", len(header)) + header + data[start:]


def _read_ledger(data: bytes, folder: Path) -> None:
    (folder / "ledger").mkdir()
    for kind in (SAMPLES, PIXELS):
        (folder / f"ledger/{kind}.npy").write_bytes(data)
    ledger = Ledger(folder, BatchLayout(4, 4), 3, _accelerator(), pixels=False)
    try:
        numbers = read_ledger(folder, PIXELS)
        assert numbers.ndim == 2
        assert numbers.nbytes <= len(data)
    finally:
        ledger.forget(1, 2)  # a run goes on, whatever it finds there
    assert read_ledger(folder).shape == (3, 4)


@cache
def _bundle() -> Any:
    recipe = load_recipe("pretrain", "mae_cpu_minutes", ["run.dir=a", "data.path=b"]).with_length(1000)
    run = {
        "config": recipe.model_dump(mode="json"), "parents": [], "order_version": 1, "dataset_fingerprint": "a",
        "labels_fingerprint": None,
    }  # fmt: skip
    bundle = Bundle(
        verb="pretrain", reason="non-finite", sentence="a", step=3, rewinds=((1, 2),), checkpoint=2, ranks=1,
        micro_size=4, accumulation=1, samples=(Sample(position=12, sample=1, name="a"),), environment={}, run=run,
        ring=(Record(step=3, values={"loss": float("nan")}, finite=False, lr=0.1, bad="non-finite"),),
    )  # fmt: skip
    return json.loads(bundle.model_dump_json())


def _read_bundle(data: bytes, folder: Path) -> None:
    (folder / "bundle.json").write_bytes(data)
    replay_config(read_bundle(folder), folder, None)


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


def _read_table(suffix: str) -> Callable[[bytes, Path], None]:
    def read(data: bytes, folder: Path) -> None:
        (folder / "0.jpg").write_bytes(b"x")
        file = folder / f"table{suffix}"
        file.write_bytes(data)
        source = TableSource(file, Columns(), keep=None)
        source.digest()
        for samples in source.read().splits.values():
            for number in range(min(len(samples), 20)):
                printable(samples[number].name).encode()
                json.dumps(dict(samples[number].meta))

    return read


def _read_list(data: bytes, folder: Path) -> None:
    (folder / "classes.txt").write_bytes(data)
    try:
        read_classes(folder / "classes.txt")
    finally:
        _read_table(".txt")(data, folder)


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


_NETWORK = {"groups": 2, "blocks": 1, "width": 4, "decoder_input": 4}
_VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@cache
def _tokenizers() -> list[tuple[dict[str, Any], bytes]]:
    """config.json and weights of a small tokenizer of every kind."""
    made = (
        PixelClusters(4, 4, (16, 16)), DVAE(8, (16, 16), _NETWORK), FSQ([4, 3], (16, 16), _NETWORK),
        VQKD(architecture="vit_tiny_patch16_224", model_args=_VIT, input_size=(16, 16), codebook_size=8, code_dim=4),
    )  # fmt: skip
    found = []
    for tokenizer in made:
        weights = save_tensors({name: tensor.contiguous() for name, tensor in tokenizer.state_dict().items()})
        described = {
            "format": 1, "kind": tokenizer.kind, "codebook_size": tokenizer.codebook_size,
            "arguments": tokenizer.arguments(), "weights_sha256": hashlib.sha256(weights).hexdigest(),
        }  # fmt: skip
        found.append((described, weights))
    return found


def _make_tokenizer(rng: random.Random) -> bytes:
    number = rng.randrange(len(_tokenizers()))
    described = _tokenizers()[number][0]
    if rng.random() < 0.3:
        return bytes([number]) + mutate_json(described, rng)
    arguments = mutate_json(described["arguments"], rng)  # where most of what can go wrong lies
    return bytes([number]) + json.dumps(described | {"arguments": "HERE"}).encode().replace(b'"HERE"', arguments)


def _read_tokenizer(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data[1:])
    (folder / "model.safetensors").write_bytes(_tokenizers()[data[0]][1])
    tokenizer = load_tokenizer(folder).tokenizer
    tokenizer.encode(torch.zeros(1, 3, *tokenizer.input_for((2, 2))))


@cache
def _saved() -> list[bytes]:
    """Files of torch.save, zip and legacy: a checkpoint with more than weights, and a whole module."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    kept = {"model": module.state_dict(), "args": argparse.Namespace(lr=1.0), "rates": [0.1, (1, 2)], "epoch": 3}
    files = []
    for what in (kept, module):
        for zipped in (True, False):
            out = io.BytesIO()
            torch.save(what, out, _use_new_zipfile_serialization=zipped)
            files.append(out.getvalue())
    return files


def _make_saved(rng: random.Random) -> bytes:
    data = rng.choice(_saved())
    if not data.startswith(b"PK"):
        kind = rng.random()  # the fourth program is what was saved; the fifth lists the storages
        return (
            mutate_pickle(data, rng, skip=rng.choice((3, 3, 4))) if kind < 0.7 else mutate_bytes(data, rng, head=1000)
        )
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = mutate_pickle(content, rng) if rng.random() < 0.7 else mutate_bytes(content, rng)
            new.writestr(zipfile.ZipInfo(entry.filename), content)
    return out.getvalue()


def _read_saved(data: bytes, folder: Path) -> None:
    (folder / "a.pth").write_bytes(data)
    for tensor in open_weights(folder / "a.pth").tensors.values():
        tensor.load()


TARGETS: dict[str, Target] = {
    **{
        kind: Target(_make_picture(kind), _read_picture)
        for kind in ("jpeg", "png", "gif", "bmp", "webp", "tiff", "ppm")
    },
    "header": Target(_make_header, _read_header),
    "tar": Target(_make_tar, _read_tar),
    "index": Target(_make_array("index"), _read_index),
    "labels": Target(_make_array("labels"), _read_labels),
    "shard": Target(_make_tar, _read_shard),
    "manifest": Target(lambda rng: mutate_json(_manifest(), rng), _read_manifest),
    "recipe": Target(_make_recipe, _read_recipe),
    "override": Target(_make_override, _read_override),
    "resolved config": Target(_make_resolved, _read_resolved),
    "table": Target(_make_table, _read_table(".csv")),
    "json lines": Target(_make_json_lines, _read_table(".jsonl")),
    "list": Target(_make_list, _read_list),
    "tensors": Target(_make_tensors, _read_tensors),
    "run folder": Target(_make_run_json, _read_run_json),
    "encoder": Target(_make_encoder, _read_encoder),
    "tokenizer": Target(_make_tokenizer, _read_tokenizer),
    "file of torch.save": Target(_make_saved, _read_saved),
    "tar source": Target(_make_foreign_tar, _read_as_source),
    "tar index": Target(_make_foreign_tar, _read_as_index),
    "compressed tar": Target(_make_compressed, _read_compressed),
    "address": Target(_make_address, _read_address),
    "ledger": Target(_make_ledger, _read_ledger),
    "bundle": Target(lambda rng: mutate_json(_bundle(), rng), _read_bundle),
}
