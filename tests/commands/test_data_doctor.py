"""`foreseen data check`, `index`, `repair`, and tars given to `pack`: what a user sees."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen.commands.data import app
from foreseen.data.shards import ShardSet
from foreseen.data.tars import scan_tar
from foreseen.errors import BadInput
from tests.tars_of_others import make_tar, members_of, sound


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for name, numbers in (("train-0", range(8)), ("val-0", range(8, 12))):
        sound(tmp_path / "tars" / f"{name}.tar", numbers)
    return tmp_path / "tars"


def test_tars_of_others_go_from_check_to_index_to_training(tars: Path) -> None:
    said = run("check", tars)
    assert f"checked {tars}: 12 samples, 2 shards" in said
    assert "no index: structure alone" in said
    assert f"sound: no faults\nnext: foreseen data index {tars}" in said
    said = run("index", tars)
    assert f"indexed 8 samples (jpg) in 1 tars, labels cls: {tars}, split train" in said
    assert f"next: foreseen pretrain mae_vit_b16 data.path={tars} data.split=train\n" in said
    assert "12 samples have no checksum yet: --write-checksums puts them into the index" in run("check", tars)
    assert "wrote the checksums of 8 samples of train into train.index.npy" in run("check", tars, "--write-checksums")
    assert "no checksum yet" not in run("check", tars, "--no-decode")


def test_an_index_elsewhere_is_used_with_the_folder_of_the_tars(tars: Path, tmp_path: Path) -> None:
    out = tmp_path / "index"
    said = run("index", tars / "{train,val}-0.tar", "--out", out, "--labels", "json:breed", "--split", "all")
    assert f"data.path={out} data.split=all data.shards_at={tars}" in said
    assert ShardSet.open(out, "all").classes == ("a", "b", "c")
    assert "sound: no faults" in run("check", out, "--shards-at", tars)
    said = run("check", out, code=1)
    assert said.endswith("remedy: bring the shards back, or say by --shards-at FOLDER where they are\n")


def test_faults_are_printed_counted_and_written_with_the_remedy_last(small_shards: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(small_shards, tmp_path / "set"))
    os.truncate(folder / "train-000001.tar", scan_tar(folder / "train-000001.tar")[8].offset + 7)
    report = tmp_path / "faults.jsonl"
    said = run("check", folder, "--report", report, "--workers", 1, code=1)
    found = [json.loads(line) for line in report.read_text().splitlines()]
    assert f"{len(found)} faults: " in said
    assert {"kind": "truncated", "split": "train", "shard": "train-000001.tar"}.items() <= next(
        fault for fault in found if fault["kind"] == "truncated"
    ).items()
    assert "train-000001.tar: truncated: it is truncated: 000000014.jpg should end at byte" in said
    assert said.count("\n") < 40, "the first few are printed"
    for kind in ("leak", "truncated", "size", "index"):
        assert f" {kind}" in said
    assert said.splitlines()[-1] == f"remedy: foreseen data repair {folder} OUT makes a clean copy of what is sound"


def test_pictures_that_two_splits_share_are_no_case_for_repair(small_shards: Path) -> None:
    said = run("check", small_shards, "--workers", 1, code=1)
    assert "37 faults: 37 leak; 17 are not shown" in said
    assert said.endswith("remedy: pack one of the splits again without the pictures that the other has\n")


def test_repair_says_what_was_left_out(tars: Path, tmp_path: Path) -> None:
    members = [member for number in range(4) for member in members_of(number, 0)]
    make_tar(tars / "train-0.tar", members[::2] + members[1::2] + [("s/x.jpg", b"<html>")])
    with pytest.raises(BadInput, match="4 scattered"):
        run("index", tars)
    said = run("repair", tars, tmp_path / "out", "--workers", 1)
    assert "4 keys were scattered or stood twice: their members are sorted out" in said
    assert f"copied 4 samples (jpg) in 1 shards: {tmp_path / 'out'}, split train" in said
    assert f"1 left out in all: {tmp_path / 'out'}/train.unreadable.txt" in said
    assert "sound: no faults" in run("check", tmp_path / "out", "--workers", 1)


def test_pack_takes_tars_with_their_labels(tars: Path, tmp_path: Path) -> None:
    said = run("pack", tars, tmp_path / "set", "--workers", 1)
    assert "packed 8 pictures (jpg) in 1 shards" in said
    assert ShardSet.open(tmp_path / "set", "val").classes == ("0", "1", "2")
    run("pack", tars, tmp_path / "named", "--workers", 1, "--label-column", "breed", "--split", "val")
    assert ShardSet.open(tmp_path / "named", "val").classes == ("a", "b", "c")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["check", "nowhere"], "nowhere does not exist: give a tar"),
        (["check", "."], "is empty: pack pictures"),
        (["index", "nowhere-{0..3}.tar"], "nowhere-0.tar does not exist"),
        (["index", "a.tar", "--labels", "folder"], "--labels is 'folder', it must be cls, json:FIELD or none"),
        (["index", "a.tar", "--classes", "none.txt"], "none.txt cannot be read"),
        (["index", "a.tar", "--workers", "0"], "--workers is 0, it must lie in [1, 1024]"),
        (["repair", "nowhere", "out"], "nowhere does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    if "a.tar" in arguments:
        sound(tmp_path / "a.tar", range(2))
    command = [sys.executable, "-m", "foreseen", "data", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert {file.name for file in tmp_path.iterdir()} <= {"a.tar"}
