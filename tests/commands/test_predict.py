"""`foreseen predict`: class names and probabilities for pictures in any form, and no crash on what is no picture."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

from foreseen import cli
from foreseen.errors import BadInput
from foreseen.handoff.encoder import load_encoder
from tests.conftest import small_recipe


@pytest.fixture(scope="module")
def run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of three colours that has learned to tell them apart."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    short = {"run__steps": 20, "optim__warmup_steps": 2, "batch__global_size": 12, "model__init_from": "null"}
    overrides = small_recipe(folder, small_shards, **short, data__shots=8)
    done = CliRunner().invoke(cli.app, ["finetune", "cpu_minutes", *overrides], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return folder


def _predict(*arguments: object) -> tuple[str, str]:
    words = ["predict", *map(str, arguments), "--workers", "0"]
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def _csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_class_names_are_in_the_hand_off_where_timm_looks_for_them(run: Path) -> None:
    assert load_encoder(run / "encoder").class_names == ("a", "b", "c")
    model = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == ["a", "b", "c"]


def test_a_folder_is_told_apart_by_name(run: Path, picture_folder: Path) -> None:
    said, counted = _predict(run, picture_folder)
    rows = _csv(said)
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert len(rows) == 37
    right = [row["path"].split("/")[0] == row["prediction"] for row in rows]  # the class is the folder
    assert sum(right) > 30
    for row in rows:
        shares = [float(row["probability"]), float(row["top2_probability"]), float(row["top3_probability"])]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        assert {row["prediction"], row["top2"], row["top3"]} == set("abc")
    assert "37 pictures predicted" in counted


def test_predictions_are_those_of_timm_on_the_same_pixels(run: Path, picture_folder: Path) -> None:
    model = timm.create_model(f"local-dir:{run / 'encoder'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    rows = {row["path"]: row for row in _csv(_predict(run, picture_folder)[0])}
    for name in ("a/picture 0.jpg", "c/picture 35.jpg"):
        with torch.no_grad():
            shares = model(transform(Image.open(picture_folder / name))[None]).softmax(1)[0]
        # Pillow's resizing and torch's differ by a grey level here and there.
        assert float(rows[name]["probability"]) == pytest.approx(float(shares.max()), abs=0.02)
        assert rows[name]["prediction"] == "abc"[int(shares.argmax())]


def test_packed_sets_lists_tables_tars_and_single_pictures_are_read(
    run: Path, picture_folder: Path, small_shards: Path, tmp_path: Path
) -> None:
    by_name = {row["path"]: row["probability"] for row in _csv(_predict(run, picture_folder)[0])}
    packed = _csv(_predict(run, small_shards, "--split", "test")[0])
    assert {row["path"]: row["probability"] for row in packed} == by_name
    assert all(row["key"].startswith("test-00000") for row in packed)
    names = ["b/picture 1.jpg", "a/picture 3.jpg"]
    (tmp_path / "list.txt").write_text("".join(f"{picture_folder / name}\n" for name in names), encoding="utf-8")
    table = "".join(f"{picture_folder / name},{what}\n" for name, what in zip(names, ("1", "cat"), strict=True))
    (tmp_path / "table.csv").write_text("photo,label\n" + table, encoding="utf-8")  # labels that no one could train on
    for path, more in ((tmp_path / "list.txt", ()), (tmp_path / "table.csv", ("--image-column", "photo"))):
        rows = _csv(_predict(run, path, *more)[0])
        assert [row["probability"] for row in rows] == [by_name[name] for name in names]
    tar = next(small_shards.glob("test-*.tar"))
    assert len(_csv(_predict(run, tar)[0])) == 10
    (single,) = _csv(_predict(run / "encoder", picture_folder / names[0], "--top-k", 1)[0])
    assert single["probability"] == by_name[names[0]]
    assert "top2" not in single


def test_json_lines_hold_the_same(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    rows = _csv(_predict(run, picture_folder)[0])
    out = tmp_path / "new" / "predictions.jsonl"
    printed, _ = _predict(run, picture_folder, "--out", out, "--top-k", 2, "--batch-size", 5)
    assert printed == ""
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [line["path"] for line in lines] == [row["path"] for row in rows]
    for line, row in zip(lines, rows, strict=True):
        assert line["prediction"] == row["prediction"]
        assert line["probability"] == pytest.approx(float(row["probability"]), abs=1e-5)
        assert [entry["class"] for entry in line["top"]] == [row["prediction"], row["top2"]]


def test_what_is_no_picture_is_named_and_counted(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    good = sorted(picture_folder.rglob("*.jpg"))[0]
    for name, content in (
        ("page.jpg", b"<html>"), ("cut.jpg", good.read_bytes()[:300]), ("empty.png", b""), ("z.jpg", good.read_bytes()),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
    said, counted = _predict(run, tmp_path)
    rows = {row["path"]: row for row in _csv(said)}
    assert list(rows) == ["cut.jpg", "empty.png", "page.jpg", "z.jpg"]
    assert rows["z.jpg"]["prediction"] == "a"
    assert rows["z.jpg"]["error"] == ""
    for name in ("cut.jpg", "empty.png", "page.jpg"):
        assert rows[name]["prediction"] == ""
        assert rows[name]["error"]
        assert name in counted
    assert "3 of 4 pictures could not be read" in counted
    (tmp_path / "z.jpg").unlink()  # and nothing but such
    assert len(_csv(_predict(run, tmp_path)[0])) == 3


def test_a_damaged_sample_of_a_packed_set_is_named(run: Path, small_shards: Path, tmp_path: Path) -> None:
    shutil.copytree(small_shards, tmp_path / "set")
    tar = sorted((tmp_path / "set").glob("train-*.tar"))[1]
    content = bytearray(tar.read_bytes())
    content[700] ^= 0xFF
    tar.write_bytes(content)
    out = tmp_path / "out.jsonl"
    _predict(run, tmp_path / "set", "--split", "train", "--out", out)
    lines: list[dict[str, Any]] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [number for number, line in enumerate(lines) if "error" in line] == [10]
    assert "crc32 differs" in lines[10]["error"]
    assert lines[10]["key"].startswith("train-000001.tar/")  # it is found again by its key, as the others
    keys = [row["key"] for row in _csv(_predict(run, tmp_path / "set", "--split", "train")[0])]
    assert keys == [line["key"] for line in lines]


def test_loader_processes_change_nothing(run: Path, picture_folder: Path) -> None:
    one, _ = _predict(run, picture_folder)
    result = CliRunner().invoke(cli.app, ["predict", str(run), str(picture_folder), "--workers", "2"])
    assert result.stdout == one


def test_classes_without_names_are_called_by_their_numbers(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "encoder", tmp_path / "encoder")
    file = tmp_path / "encoder/config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    del described["label_names"]
    file.write_text(json.dumps(described), encoding="utf-8")
    assert {row["prediction"] for row in _csv(_predict(tmp_path / "encoder", picture_folder)[0])} == {"0", "1", "2"}


def test_class_names_of_strangers_steer_no_terminal(run: Path, picture_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "encoder", tmp_path / "encoder")
    file = tmp_path / "encoder/config.json"
    described = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**described, "label_names": ["\x1b[31ma", "\ud800", "c\nd"]}), encoding="utf-8")
    said, _ = _predict(tmp_path / "encoder", picture_folder, "--top-k", 1)
    assert {row["prediction"] for row in _csv(said)} == {r"\x1b[31ma", r"\ud800", r"c\nd"}


def test_bad_input_is_a_sentence(run: Path, picture_folder: Path, small_shards: Path, tmp_path: Path) -> None:
    for change, sentence in (
        ({"label_names": ["a"]}, "as many names"),
        ({"label_names": "a"}, "no list"),
    ):
        shutil.copytree(run / "encoder", tmp_path / "spoiled", dirs_exist_ok=True)
        described = json.loads((run / "encoder/config.json").read_text(encoding="utf-8"))
        (tmp_path / "spoiled/config.json").write_text(json.dumps(described | change), encoding="utf-8")
        with pytest.raises(BadInput, match=sentence):
            _predict(tmp_path / "spoiled", picture_folder)
    for arguments, sentence in (
        ((tmp_path, picture_folder), "is no encoder folder"),
        ((run, tmp_path / "nowhere"), "nowhere does not exist"),
        ((run, small_shards), "has the splits test, train: choose one by --split"),
        ((run, small_shards, "--split", "tset"), "has no split 'tset'"),
        ((run, picture_folder, "--out", tmp_path / "x.xlsx"), "ends in .xlsx: .csv or .jsonl"),
        ((run, picture_folder, "--precision", "int8"), "--precision is 'int8', there are bf16, fp16, fp32"),
        ((run, picture_folder, "--out", picture_folder / "a/picture 0.jpg/x.csv"), "cannot be written"),
    ):
        with pytest.raises(BadInput, match=sentence):
            _predict(*arguments)


def test_memory_that_runs_out_is_a_sentence_and_leaves_no_file(
    run: Path, picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = timm.models.VisionTransformer.forward

    def hungry(self, images):  # type: ignore[no-untyped-def]
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    monkeypatch.setattr(timm.models.VisionTransformer, "forward", hungry)
    out = tmp_path / "out.csv"
    with pytest.raises(BadInput, match="memory ran out at --batch-size 64; give a smaller one"):
        _predict(run, picture_folder, "--out", out)
    assert list(tmp_path.iterdir()) == []
    _predict(run, picture_folder, "--out", out, "--batch-size", 4)
    assert out.is_file()


def test_an_encoder_without_a_head_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    from foreseen.handoff.encoder import Preprocessing, save_encoder
    from foreseen.models.backbone import create_backbone

    args = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = create_backbone("vit_tiny_patch16_224", img_size=(32, 32), args=args)
    seen = Preprocessing((0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, (32, 32))
    save_encoder(model, tmp_path / "encoder", preprocessing=seen, lineage={})
    with pytest.raises(BadInput, match="has no classes yet: fine-tune it first"):
        _predict(tmp_path / "encoder", picture_folder)
