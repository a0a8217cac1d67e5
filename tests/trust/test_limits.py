"""Sizes are checked before memory is taken, nothing hangs on what is no file, and names steer no terminal."""

import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foreseen import cli
from foreseen.data.arrays import map_array
from foreseen.data.decode import DecodeError, decode
from foreseen.data.folder import FolderSource
from foreseen.data.manifest import read_manifest
from foreseen.data.shards import INDEX_ROW, CorruptSample, ShardSet
from foreseen.data.source import Blob
from foreseen.data.table import Columns, TableSource
from foreseen.data.tars import scan_tar
from foreseen.engine.checkpoint import Checkpoints
from foreseen.errors import BadInput
from foreseen.files import MAX_JSON_BYTES, read_json
from foreseen.handoff.encoder import load_encoder
from foreseen.printable import printable

Recipe = Callable[..., list[str]]


@pytest.fixture
def own_shards(small_shards: Path, tmp_path: Path) -> Path:
    shutil.copytree(small_shards, tmp_path / "set")
    return tmp_path / "set"


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG header that promises a size, with any compressed content."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _promising(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose frame header promises another size."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


@pytest.mark.parametrize("fast", [True, False], ids=["torchcodec", "Pillow"])
def test_max_pixels_holds_from_the_header_before_a_decoder_runs(
    fast: bool, jpeg: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a decoder ran")

    decode(jpeg, fast=fast, max_pixels=40 * 48)
    monkeypatch.setattr("foreseen.data.decode._torchcodec", lambda: fail)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises((AssertionError, DecodeError), match="a decoder ran"):
        decode(jpeg, fast=fast)
    for data, limit in ((jpeg, 40 * 48 - 1), (_promising(jpeg, 65_000, 65_000), 64_000_000)):
        with pytest.raises(DecodeError, match="pixels, more than|exceeds limit"):
            decode(data, fast=fast, max_pixels=limit)


@pytest.mark.parametrize("fast", [True, False], ids=["torchcodec", "Pillow"])
def test_max_bytes_holds_before_a_decoder_runs(fast: bool, jpeg: bytes) -> None:
    decode(jpeg, fast=fast, max_bytes=len(jpeg))
    with pytest.raises(DecodeError, match=f"more than the {len(jpeg) - 1:,} allowed"):
        decode(jpeg, fast=fast, max_bytes=len(jpeg) - 1)


def test_an_index_that_promises_four_gigabytes_takes_no_memory(own_shards: Path) -> None:
    index = np.load(own_shards / "train.index.npy")
    index["size"][3] = 0xFFFFFFFF
    np.save(own_shards / "train.index.npy", index)
    shards = ShardSet.open(own_shards, "train")
    with pytest.raises(CorruptSample, match="4,294,967,295 bytes, more than the 67,108,864 allowed"):
        shards.read(3)


def test_an_index_that_points_past_its_shard_is_a_corrupt_sample(own_shards: Path) -> None:
    index = np.load(own_shards / "train.index.npy")
    index["offset_512"][3], index["offset_512"][4] = 0xFFFFFFFF, 0
    np.save(own_shards / "train.index.npy", index)
    shards = ShardSet.open(own_shards, "train")
    for sample in (3, 4):
        with pytest.raises(CorruptSample):
            shards.read(sample)


@pytest.mark.parametrize("rows", [0, 37])
def test_an_array_that_promises_more_than_its_file_takes_no_memory(rows: int, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros(37, INDEX_ROW))
    raw = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(raw.replace(b"(37,)", b"(9e9,)" if rows else b"(3e9,)"))
    with pytest.raises(BadInput, match=r"a\.npy"):
        map_array(tmp_path / "a.npy", INDEX_ROW, rows)
    (tmp_path / "a.npy").write_bytes(raw[:-30])
    with pytest.raises(BadInput, match="cannot be read"):
        map_array(tmp_path / "a.npy", INDEX_ROW, 37)


def test_a_label_past_all_classes_is_refused_before_a_head_is_made_for_it(own_shards: Path, recipe: Recipe) -> None:
    labels = np.load(own_shards / "train.labels.npy")
    labels[5] = 2_000_000_000
    np.save(own_shards / "train.labels.npy", labels)
    small = recipe(
        run__steps=2, optim__warmup_steps=0, data__path=own_shards, data__shots="null", model__init_from="null"
    )
    with pytest.raises(BadInput, match="has the label 2,000,000,000, and labels below 3"):
        CliRunner().invoke(cli.app, ["finetune", "cpu_minutes", *small], catch_exceptions=False)
    manifest = json.loads((own_shards / "manifest.json").read_text(encoding="utf-8"))
    (own_shards / "manifest.json").write_text(json.dumps(manifest | {"classes": None}), encoding="utf-8")
    with pytest.raises(BadInput, match="labels below 1,000,000 are what is believed"):
        _ = ShardSet.open(own_shards, "train").num_classes


BOMBS = {
    "deep": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "a huge number": '{"splits": ' + "9" * 100_000 + "}",
    "an endless mean": json.dumps({"mean": 10**400}),
    "not a number": '{"a": NaN, "samples": Infinity}',
    "no object": "[1, 2]",
    "a word": "null",
    "text": '"x"',
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_json_bombs_are_sentences_everywhere(bomb: str, own_shards: Path, recipe: Recipe, tmp_path: Path) -> None:
    (own_shards / "manifest.json").write_text(bomb, encoding="utf-8")
    with pytest.raises(BadInput, match=r"manifest\.json"):
        read_manifest(own_shards)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/model.safetensors").write_bytes(b"")
    (tmp_path / "encoder/config.json").write_text(bomb, encoding="utf-8")
    with pytest.raises(BadInput, match="cannot be read"):
        load_encoder(tmp_path / "encoder")
    folder = tmp_path / "run/checkpoints/step-2"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(bomb, encoding="utf-8")
    with pytest.raises(BadInput, match="checkpoints in .* are damaged"):
        Checkpoints(folder.parent, 3).newest_sound()


@pytest.mark.parametrize(
    "change",
    [
        {"samples": -1}, {"samples": True}, {"samples": 1e3}, {"samples": 1 << 64}, {"bytes": -5}, {"bytes": "9"},
        {"mean": [10**400]}, {"mean": "abc"}, {"std": {"a": 1}}, {"shards": {"a": 1}}, {"shards": 5}, {"index": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_with_impossible_numbers_is_a_sentence(change: dict[str, object], own_shards: Path) -> None:
    file = own_shards / "manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    train = manifest["splits"]["train"]
    if change.keys() & {"samples", "bytes"}:
        train["shards"][0] |= change
    else:
        train |= change
    file.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadInput, match=r"manifest\.json cannot be used"):
        read_manifest(own_shards)


def test_a_json_file_larger_than_any_of_ours_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "manifest.json", "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # of holes
    with pytest.raises(BadInput, match="more than the 67,108,864 that such a file may have"):
        read_manifest(tmp_path)


def test_a_table_whose_line_never_ends_is_not_read_into_memory(tmp_path: Path) -> None:
    code = """
import resource, sys
from pathlib import Path
from foreseen.data.table import Columns, TableSource
from foreseen.errors import BadInput
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    TableSource(Path(sys.argv[1]), Columns()).read()
except BadInput as error:
    print(error)
print("grew", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used) >> 10)
"""
    file = tmp_path / "a.csv"
    for start in (b"path,label\n", b"path", b'path\n"'):
        with open(file, "wb") as out:
            out.write(start)
            out.seek(1 << 30)
            out.write(b"a\n")
        done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
        sentence, grew = done.stdout.splitlines()
        assert "has a line of more than 1,048,576 characters" in sentence
        assert int(grew.split()[1]) < 100


def test_a_cell_longer_than_any_path_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\n" + "a" * 200_000 + ",cat\n", encoding="utf-8")
    with pytest.raises(BadInput, match="field larger than field limit"):
        TableSource(tmp_path / "a.csv", Columns()).read()


def test_pipes_and_devices_in_the_place_of_files_are_refused_and_do_not_hang(own_shards: Path, tmp_path: Path) -> None:
    shard = own_shards / "train-000000.tar"
    places = {
        "manifest.json": lambda: read_manifest(own_shards),
        "train.labels.npy": lambda: ShardSet.open(own_shards, "train"),
        "train.index.npy": lambda: ShardSet.open(own_shards, "train"),
        shard.name: lambda: [ShardSet.open(own_shards, "train").read(sample) for sample in range(10)],
    }
    for name, read in places.items():
        whole = (own_shards / name).read_bytes()
        for make in (os.mkfifo, lambda file: os.symlink("/dev/zero", file), lambda file: os.symlink("/dev/tty", file)):
            (own_shards / name).unlink()
            make(own_shards / name)
            with pytest.raises(BadInput, match=r"is no regular file|is missing|cannot be read"):
                read()
        (own_shards / name).unlink()
        (own_shards / name).write_bytes(whole)


@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_tar_that_is_a_pipe_or_a_device_is_refused(what: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tar")
    os.symlink("/dev/zero", tmp_path / "device.tar")
    with pytest.raises(BadInput, match="is no regular file"):
        scan_tar(tmp_path / f"{what}.tar")


def test_a_shard_that_is_a_link_to_another_file_gives_no_pixels_of_it(own_shards: Path) -> None:
    shard = own_shards / "train-000000.tar"
    shard.unlink()
    os.symlink("/etc/passwd", shard)
    shards = ShardSet.open(own_shards, "train")
    with pytest.raises(BadInput, match=r"bytes and not the"):
        shards.check_sizes()
    with pytest.raises(BadInput, match="train-000000.tar has changed under this run"):
        shards.read(0)


def test_a_folder_source_follows_links_to_pictures_and_passes_over_what_is_no_file(jpeg: bytes, tmp_path: Path) -> None:
    """Links are how people gather pictures that lie elsewhere; whoever may write into the folder may copy them, too."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jpg").write_bytes(jpeg)
    folder = tmp_path / "folder"
    folder.mkdir()
    os.symlink(tmp_path / "elsewhere/a.jpg", folder / "linked.jpg")
    os.symlink(tmp_path / "elsewhere", folder / "more")
    os.symlink(folder, folder / "round")
    os.symlink("/dev/zero", folder / "device.jpg")
    os.symlink("/etc/passwd", folder / "passwd.jpg")
    os.mkfifo(folder / "pipe.jpg")
    samples = FolderSource(folder).read().splits["train"]
    assert [sample.name for sample in samples] == ["linked.jpg", "more/a.jpg", "passwd.jpg"]
    with pytest.raises(DecodeError, match="it is text and no picture"):
        decode(samples[2].image.read())


def test_a_picture_that_became_a_pipe_after_it_was_listed_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(CorruptSample, match="is no regular file"):
        Blob(str(tmp_path / "a.jpg"), 100).read()


def test_a_pipe_in_a_run_folder_does_not_hang(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run/environment.json")
    os.mkfifo(tmp_path / "run/best.json")
    short = recipe(run__steps=2, optim__warmup_steps=0, batch__global_size=8)
    CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *short], catch_exceptions=False)
    with pytest.raises(BadInput, match="is no regular file"):
        read_json(tmp_path / "run/best.json")


HOSTILE_NAMES = {
    "a\x1b[2Jb": "a\\x1b[2Jb",
    "a\x1b]0;title\x07": "a\\x1b]0;title\\x07",
    "a\x9b31m": "a\\x9b31m",
    "a\rb": "a\\rb",
    "a\nstep 9/9  loss 0": "a\\nstep 9/9  loss 0",
    "a\u202egpj.exe": "a\\u202egpj.exe",
    "a\u2028b": "a\\u2028b",
    "a\x7fb\x00": "a\\x7fb\\x00",
    "a\udcffb": "a\ufffdb",
    chr(0xD800) + "b": "\\ud800b",
    "Füße 猫 🐈\u200d⬛": "Füße 猫 🐈\u200d⬛",
    "[bold]x[/bold]": "[bold]x[/bold]",
}


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_names_are_made_fit_to_print(name: str) -> None:
    assert printable(name) == HOSTILE_NAMES[name]
    printable(name).encode()


def test_names_of_pictures_reach_neither_terminal_nor_list_as_they_are(
    jpeg: bytes, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(jpeg)
    for number, name in enumerate(HOSTILE_NAMES):
        if "\0" not in name and "/" not in name and "\ud800" not in name:
            (folder / f"{name}{number}.jpg").write_bytes(b"no picture")
    result = CliRunner().invoke(cli.app, ["data", "pack", str(folder), str(tmp_path / "set"), "--workers", "1"])
    assert result.exit_code == 0, result.output
    listed = (tmp_path / "set/train.unreadable.txt").read_text(encoding="utf-8")
    for text in (result.output, listed):
        assert not set(text) & set("\x1b\x07\x9b\r\x7f\u202e\u2028")
    assert len(listed.splitlines()) == len(list(folder.iterdir())) - 1

    monkeypatch.setattr("sys.argv", ["foreseen", "data", "pack", "no\x1b[2Jwhere", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        cli.main()
    said = capfd.readouterr().err
    assert "no\\x1b[2Jwhere" in said
    assert "\x1b" not in said


def test_marks_in_a_name_do_not_break_the_bar_of_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from foreseen.engine.log import RunLog

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log = RunLog(tmp_path, 10, 0, speaks=True)
    log.say("unreadable: [/nothing] [link=http://127.0.0.1]a[/link] \x1b]8;;x")
    log.close()
    assert "[/nothing] [link=http://127.0.0.1]a[/link] \\x1b]8;;x" in capfd.readouterr().out


def test_decompression_bombs_stay_under_a_limit_of_memory(tmp_path: Path) -> None:
    """In a child that may take but 1 GB more than it has after its imports: what 64 million pixels need, on the way."""
    bombs = {
        "idat.png": _png(4000, 4000, zlib.compress(bytes(300 << 20), 9)),
        "pixels.png": _png(65_000, 65_000, zlib.compress(bytes(1 << 20), 9)),
        "text.png": _text_bomb(),
    }
    out = BytesIO()
    Image.new("L", (7999, 7999)).save(out, "TIFF", compression="tiff_deflate")
    bombs["large.tif"] = out.getvalue()
    bombs["strips.tif"] = _tiff({256: 100, 257: 100, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 100, 279: 0xF0000000})
    bombs["tile.tif"] = _tiff(
        {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: 60_000, 323: 60_000, 324: 8, 325: 64}
    )
    bombs["samples.tif"] = _tiff({256: 8000, 257: 7999, 258: 64, 259: 1, 262: 1, 273: 8, 277: 60_000, 278: 8, 279: 64})
    bombs["gif.gif"] = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0xF7, 0, 0) + bytes(768) + b"," + struct.pack(
        "<HHHHB", 0, 0, 65_535, 65_535, 0
    ) + b"\x08\x02\x00\x00\x00;"  # fmt: skip
    bombs["wide.bmp"] = b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 30_000, 30_000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
    code = """
import resource, sys
from pathlib import Path
import torchcodec.decoders
from foreseen.data.decode import DecodeError, decode
room = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (1 << 30)
resource.setrlimit(resource.RLIMIT_AS, (room, room))
for file in sorted(Path(sys.argv[1]).glob("*.*")):
    for fast in (True, False):
        try:
            decode(file.read_bytes(), fast=fast)
            print(file.name, "decoded")
        except DecodeError as error:
            print(file.name, error)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 2 * len(bombs)
    decoded = {line.split()[0] for line in done.stdout.splitlines() if line.endswith(" decoded")}
    assert decoded <= {"large.tif", "idat.png", "text.png"}, done.stdout


def _text_bomb() -> bytes:
    """A small PNG with a compressed text of 500 MB."""
    body = b"k\0\0" + zlib.compress(bytes(500 << 20), 9)
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    small = _png(4, 4, zlib.compress(bytes(4 * 13)))
    return small[:33] + chunk + small[33:]


def _tiff(tags: dict[int, int]) -> bytes:
    """A little-endian TIFF of one directory with one number a tag."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)
