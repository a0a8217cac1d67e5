import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.data.pack import pack
from foreseen.data.source import FolderListing
from foreseen.errors import BadInput


@pytest.fixture(scope="module")
def encoder(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe") / "run"
    overrides = {
        "run.dir": folder, "run.steps": 2, "optim.warmup_steps": 0, "data.path": small_shards, "data.workers": 0,
        "views.size": 32, "model.args": "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",
        "batch.global_size": 8, "compute.precision": "fp32", "probe.every": "null",
    }  # fmt: skip
    config = load_recipe("pretrain", "mae_cpu_minutes", [f"{key}={value}" for key, value in overrides.items()])
    pretrain.run(config)
    return folder / "encoder"


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["probe", *map(str, arguments), "--workers", "0"])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.output


def test_labelled_shards_give_a_table_a_sentence_and_numbers(encoder: Path, small_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    printed = _run(encoder, small_shards, "--out", out)
    for shown in ("37 pictures judged", "k-NN, k = 10", "k-NN, k = 20", "linear", "lr ", "centred", "α-ReQ"):
        assert shown in printed
    assert "k = 100" not in printed  # of a bank of 37
    assert printed.splitlines()[-2].startswith("k-NN (k = 20) is right on")
    assert printed.splitlines()[-1].startswith("TRANSDUCTIVE: pretraining saw 37 of the 37 test pictures")
    result = json.loads(out.read_text(encoding="utf-8"))
    assert (result["features"], result["judged"], result["unreadable"], result["seed"]) == ("cls", 37, 0, 0)
    assert result["test_pictures_seen"] == 37
    assert result["knn"]["10"]["top1"] > 0.5  # `test` holds the same pictures, told apart by colour
    _run(encoder, small_shards, "--out", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == out.read_text()


def test_an_attentive_probe_looks_at_the_patches_and_is_chosen_on_validation(
    encoder: Path, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    out = tmp_path / "result.json"
    printed = _run(encoder, small_shards, "--attentive", "--out", out)
    line = next(line for line in printed.splitlines() if line.startswith("attentive"))
    assert re.search(r"attentive +\d+\.\d% +100\.0%  lr \S+.*weight decay \S+, by \d+\.\d% on validation", line)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["attentive"]["accuracy"]["top1"] > 0.5  # three colours
    assert list((tmp_path / "scratch").iterdir()) == []  # gigabytes, for real sets
    _run(encoder, small_shards, "--attentive", "--out", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == out.read_text()


def test_patches_that_no_disk_holds_are_refused_with_the_arithmetic(
    encoder: Path, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foreseen.engine import extract_patches

    monkeypatch.setattr(extract_patches.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
    sentence = r"patches of 37 pictures, 16 × 48 numbers of 2 bytes each, take 0.0 GB, and .* set TMPDIR"
    with pytest.raises(BadInput, match=sentence):
        _run(encoder, small_shards, "--attentive")


def test_few_shots_leave_fewer_neighbours(encoder: Path, small_shards: Path) -> None:
    printed = _run(encoder, small_shards, "--shots", 4, "--no-linear", "--features", "both")
    assert "k-NN, k = 10" in printed
    assert "k = 20" not in printed  # of a bank of 12
    assert "linear" not in printed
    assert "features both" in printed


def test_unlabelled_pictures_give_the_numbers_that_need_no_labels(
    encoder: Path, picture_folder: Path, tmp_path: Path
) -> None:
    listing = FolderListing(picture_folder)
    pack(listing, tmp_path / "plain", "train", classes=listing.classes, workers=1)
    printed = _run(encoder, tmp_path / "plain")
    assert "RankMe" in printed
    assert "k-NN" not in printed
    assert "features differ along" in printed


def test_bad_input_is_a_sentence(encoder: Path, small_shards: Path, tmp_path: Path) -> None:
    for arguments, sentence in [
        ((tmp_path, small_shards), "is no encoder folder"),
        ((encoder.parent, small_shards), "did you mean"),
        (("timm:no_such_model", small_shards), "names no model of timm"),
        ((encoder, tmp_path), "is empty"),
        ((encoder, small_shards, "--test-split", "tset"), "has no split 'tset'.*did you mean test"),
        ((encoder, small_shards, "--shots", 400), "400 are asked for; lower .*--shots of a probe"),
    ]:
        with pytest.raises(BadInput, match=sentence):
            _run(*arguments)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(encoder: Path, small_shards: Path, tmp_path: Path) -> None:
    found = {}
    for ranks in (1, 2):
        launcher = [
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ]
        out = tmp_path / f"{ranks}.json"
        command = [sys.executable, *(launcher if ranks == 2 else []), "-m", "foreseen", "probe", encoder, small_shards]
        done = subprocess.run(
            [*map(str, command), "--out", str(out), "--workers", "0"],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("is right on") == 1  # only rank 0 speaks
        found[ranks] = json.loads(out.read_text(encoding="utf-8"))
    assert found[2]["knn"] == found[1]["knn"]
    assert found[2]["linear"] == found[1]["linear"]
    assert found[2]["rankme"] == pytest.approx(found[1]["rankme"], rel=1e-4)
