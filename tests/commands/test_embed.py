"""`foreseen embed`: features in a file with what each row and each number is."""

import csv
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.embedding_files import Id, Layout, embedding_file
from foreseen.data.pictures import ListedPictures, OneSplit
from foreseen.data.source import Blob, SourceSample
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone


def _encoder(folder: Path, name: str, size: tuple[int, int], **args: object) -> Path:
    torch.manual_seed(0)
    model = create_backbone(name, img_size=size, args=dict(args))
    seen = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 1.0, size)
    save_encoder(model, folder, preprocessing=seen, lineage={})
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT whose input is higher than wide: 4 × 3 patches."""
    folder = tmp_path_factory.mktemp("embed") / "encoder"
    return _encoder(folder, "vit_tiny_patch16_224", (32, 24), patch_size=8, embed_dim=48, depth=2, num_heads=3)


def _embed(*arguments: object) -> str:
    words = ["embed", *map(str, arguments), "--workers", "0"]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _ids(out: Path) -> list[dict[str, str]]:
    with open(out.with_suffix(".ids.csv"), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _stacked(table: Any, column: str) -> NDArray[Any]:
    return np.stack(table[column].to_numpy(zero_copy_only=False))


def test_each_vector_is_where_the_layout_says(encoder: Path, small_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "all.npy"
    _embed(encoder, small_shards, "--split", "train", "--features", "patches,cls,mean", "--out", out, "--batch-size", 8)
    array, layout = np.load(out), json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert array.shape == tuple(layout["shape"]) == (37, 14, 48)
    assert array.dtype == np.float32
    assert layout["axes"] == ["sample", "vector", "feature"]
    assert layout["vectors"]["cls"] == {"from": 0, "to": 1}
    assert layout["vectors"]["mean"] == {"from": 1, "to": 2}
    assert layout["vectors"]["patches"] == {"from": 2, "to": 14, "grid": [4, 3]}
    np.testing.assert_allclose(array[:, 1], array[:, 2:].mean(1), atol=1e-5)  # the mean is that of the patches
    ids = _ids(out)
    assert [int(row["row"]) for row in ids] == list(range(37))
    assert all(row["label"] == row["path"][0] and row["key"].startswith("train-0000") for row in ids)

    model = timm.create_model(f"local-dir:{encoder}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    root = small_shards  # pixels from the very shards
    from foreseen.data.decode import decode
    from foreseen.data.shards import ShardSet

    picture = Image.fromarray(decode(ShardSet.open(root, "train").read(5)))
    with torch.no_grad():
        tokens = model.forward_features(transform(picture)[None])[0].numpy()
    np.testing.assert_allclose(array[5, 0], tokens[0], atol=0.05)  # Pillow resizes a little otherwise
    np.testing.assert_allclose(array[5, 2:], tokens[1:], atol=0.05)


def test_parquet_holds_the_same_by_columns(encoder: Path, picture_folder: Path, tmp_path: Path) -> None:
    npy, parquet = tmp_path / "one.npy", tmp_path / "one.parquet"
    for out in (npy, parquet):
        _embed(encoder, picture_folder, "--features", "cls,patches", "--dtype", "float16", "--out", out)
    array, table = np.load(npy), pq.read_table(parquet)
    assert array.dtype == _stacked(table, "cls").dtype == np.float16
    assert table.column_names == ["path", "key", "label", "cls", "patches"]
    assert np.array_equal(_stacked(table, "cls"), array[:, 0])
    assert np.array_equal(_stacked(table, "patches").reshape(37, 12, 48), array[:, 1:])
    assert table["path"].to_pylist() == [row["path"] for row in _ids(npy)]
    assert table["label"].to_pylist() == [row["label"] for row in _ids(npy)]
    said = json.loads(pq.read_metadata(parquet).metadata[b"foreseen"])
    assert said["columns"] == {"cls": {"shape": [48]}, "patches": {"shape": [4, 3, 48]}}
    assert len(said["weights_sha256"]) == 64


def test_one_vector_a_picture_is_a_plain_table(encoder: Path, picture_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain.npy"
    printed = _embed(encoder, picture_folder, "--out", out)  # as the encoder pools: its class token
    assert np.load(out).shape == (37, 48)
    layout = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert (layout["axes"], list(layout["vectors"])) == (["sample", "feature"], ["cls"])
    assert "37 pictures, cls 48" in printed


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_feature_maps_are_patches_in_a_grid(name: str, picture_folder: Path, tmp_path: Path) -> None:
    encoder = _encoder(tmp_path / "encoder", name, (64, 96))
    out = tmp_path / "map.npy"
    _embed(encoder, picture_folder, "--features", "mean,patches", "--out", out)
    layout = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert layout["vectors"]["patches"]["grid"] == [2, 3]
    array = np.load(out)
    if name == "test_resnet":  # ConvNeXt norms what it has pooled
        np.testing.assert_allclose(array[:, 0], array[:, 1:].mean(1), atol=1e-4)


def test_what_cannot_be_read_has_no_row_and_is_named(encoder: Path, picture_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, path in enumerate(sorted(picture_folder.rglob("*.jpg"))[:5]):
        (folder / f"{number}.jpg").write_bytes(path.read_bytes() if number != 2 else b"<html>")
    out = tmp_path / "some.npy"
    printed = _embed(encoder, folder, "--out", out, "--batch-size", 2)
    assert np.load(out).shape == (4, 48)
    assert [row["path"] for row in _ids(out)] == ["0.jpg", "1.jpg", "3.jpg", "4.jpg"]
    layout = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    assert [entry["path"] for entry in layout["unreadable"]] == ["2.jpg"]
    assert "1 of 5 pictures could not be read" in printed
    assert "2.jpg" in printed


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path) -> None:
    rows, layout = np.ones((64, 16, 16, 32), np.float32), Layout({"patches": (16, 16, 32)}, np.dtype(np.float32))
    ids = [Id(f"{number}.jpg", "", None) for number in range(64)]
    tracemalloc.start()
    with embedding_file(tmp_path / "big.npy", layout) as writing:
        for _ in range(40):
            writing.add(ids, {"patches": rows})
        writing.finish({})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big.npy").stat().st_size > 40 * rows.nbytes
    assert peak < 8 * rows.nbytes  # two megabytes a batch
    assert np.load(tmp_path / "big.npy", mmap_mode="r").shape == (2560, 256, 32)


def test_a_failure_leaves_the_older_file_and_no_half_of_a_new_one(
    encoder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "kept.npy"
    _embed(encoder, picture_folder, "--out", out)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/page.jpg").write_bytes(b"<html>")
    for name in ("kept.npy", "none.parquet"):
        with pytest.raises(BadInput, match=r"none of the 1 pictures of .* can be read, the first: page.jpg"):
            _embed(encoder, tmp_path / "bad", "--out", tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_bad_input_is_a_sentence(encoder: Path, picture_folder: Path, small_shards: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.npy")
    for arguments, sentence in (
        ((tmp_path, picture_folder, *out), "is no encoder folder"),
        ((encoder, small_shards, *out), "choose one by --split"),
        ((encoder, picture_folder, "--out", tmp_path / "x.pt"), "ends in .pt: .parquet or .npy"),
        ((encoder, picture_folder, *out, "--features", "cls,token"), "'token' is none; there are cls, mean, patches"),
        ((encoder, picture_folder, *out, "--features", "cls,cls"), "one is named twice"),
        ((encoder, picture_folder, *out, "--dtype", "int8"), "there are float32 and float16"),
    ):
        with pytest.raises(BadInput, match=sentence):
            _embed(*arguments)
    convolutional = _encoder(tmp_path / "resnet", "test_resnet", (32, 32))
    with pytest.raises(BadInput, match="need a class token"):
        _embed(convolutional, picture_folder, *out, "--features", "cls")


def test_features_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    layout = Layout({"cls": (2,)}, np.dtype(np.float16))
    with pytest.raises(BadInput, match=r"cls features reach 1e\+05, and float16 holds 65,504: take --dtype float32"):
        with embedding_file(tmp_path / "x.npy", layout) as writing:
            writing.add([Id("a", "", None)], {"cls": np.array([[1e5, 0]], np.float32)})
    assert list(tmp_path.iterdir()) == []


def test_labels_of_a_folder_are_gathered_once_and_strange_names_are_made_fit(picture_folder: Path) -> None:
    class Counted(list[SourceSample]):
        walks = 0

        def __iter__(self) -> Iterator[SourceSample]:
            Counted.walks += 1
            return super().__iter__()

    blob = Blob(str(picture_folder / "a/picture 0.jpg"), 100)
    samples = Counted(SourceSample(f"{n}.jpg", blob, n % 2) for n in range(20))
    found = OneSplit(ListedPictures(samples), ("\ud800", "\x1b[31mb"))
    assert [found.label(n) for n in range(4)] == [r"\ud800", r"\x1b[31mb"] * 2
    assert Counted.walks == 1  # else the time grows with the square of the pictures
