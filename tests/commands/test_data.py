"""`foreseen data`: what a user sees."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen.commands.data import app
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_packing_a_folder_says_what_was_packed_and_what_comes_next(picture_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    said = run("pack", picture_folder, out, "--labels", "folder", "--max-side", 50, "--workers", 1, "--licence", "CC0")
    assert "packed 37 pictures (jpg) in 1 shards" in said
    assert "pictures were shrunk" in said
    assert f"next: foreseen pretrain mae_vit_b16 data.path={out} data.split=train" in said
    assert ShardSet.open(out, "train").classes == ("a", "b", "c")
    with pytest.raises(BadInput, match="already has a split 'train'"):
        run("pack", picture_folder, out, "--workers", 1)
    assert "split val" in run("pack", picture_folder, out, "--split", "val", "--labels", "folder", "--workers", 1)


def test_unreadable_pictures_are_counted_and_shown(tmp_path: Path, picture_folder: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "good.jpg").write_bytes(next(picture_folder.rglob("*.jpg")).read_bytes())
    (source / "bad.jpg").write_text("<html>")
    (source / "notes.txt").touch()
    said = run("pack", source, tmp_path / "set", "--workers", 1)
    assert "1 files of" in said
    assert "1 pictures cannot be read and were left out, such as bad.jpg: it is a web page (HTML)" in said
    assert str(tmp_path / "set" / "train.unreadable.txt") in said


def test_pictures_of_kinds_that_are_not_read_are_named_with_what_to_do(tmp_path: Path, picture_folder: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    for name in ("a.heic", "b.HEIC", "deep/c.avif", "d.jxl", "e.svg", "f.psd", "deep/g.NEF", "notes.txt", ".h.heic"):
        (source / name).touch()
    with pytest.raises(BadInput, match=r"7 of them are pictures of kinds that are not read \(2 \.heic, 1 \.avif"):
        run("pack", source, tmp_path / "set", "--workers", 1)
    (source / "good.jpg").write_bytes(next(picture_folder.rglob("*.jpg")).read_bytes())
    said = run("pack", source, tmp_path / "set", "--workers", 1)
    assert f"8 files of {source} are no pictures that are read, by their names, and are passed over" in said
    assert (
        "7 of them are pictures of kinds that are not read (2 .heic, 1 .avif, 1 .jxl, 1 .nef, 1 .psd, 1 .svg): " in said
    )
    assert "convert them to JPEG or PNG, export them as PNG or TIFF, develop the raw ones to JPEG or TIFF\n" in said


def test_duplicates_are_counted_and_a_leak_across_splits_is_said_loudly(tmp_path: Path, picture_folder: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "source" / f"{name}.jpg").write_bytes(next(picture_folder.rglob("*.jpg")).read_bytes())
    said = run("pack", tmp_path / "source", tmp_path / "set", "--workers", 1)
    assert "1 pictures repeat an earlier one byte for byte, and were kept" in said
    said = run("pack", tmp_path / "source", tmp_path / "set", "--split", "test", "--workers", 1)
    assert "LEAK: 2 pictures are also in the split train, byte for byte" in said
    assert str(tmp_path / "set" / "test.duplicates.txt") in said


@pytest.mark.parametrize("arguments", [["pack", "nowhere", "out"], ["pets", "out", "--from", "nowhere"]])
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "foreseen", "data", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("foreseen: nowhere")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_needs_no_heavy_import() -> None:
    script = (
        "import sys; from foreseen.commands import data\n"
        "assert not {'torch', 'numpy', 'PIL', 'rich.progress'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
