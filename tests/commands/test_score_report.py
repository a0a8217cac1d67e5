"""After fine-tuning: what the classifier gets wrong, in RUN/report, from the one pass that gave the score."""

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.score_report import write_report
from foreseen.data import loader
from foreseen.data.manifest import read_manifest
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import FolderListing
from foreseen.engine.predictions import Predictions
from foreseen.errors import BadInput
from tests.conftest import small_recipe

SHORT = {
    "run__steps": 2, "optim__base_lr": 1e-6, "optim__warmup_steps": 1, "batch__global_size": 6, "data__shots": 4,
    "model__init_from": "null",
}  # fmt: skip
Recipe = Callable[..., list[str]]


def _finetune(overrides: list[str]) -> str:
    result = CliRunner().invoke(cli.app, ["finetune", "cpu_minutes", *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _rows(file: Path) -> list[dict[str, str]]:
    with open(file, encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.fixture(scope="module")
def run(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run that has hardly learned anything, and what it said."""
    folder = tmp_path_factory.mktemp("report") / "run"
    return folder, _finetune(small_recipe(folder, small_shards, **SHORT))


def test_the_report_adds_up_to_the_score(run: tuple[Path, str]) -> None:
    folder, _ = run
    score = json.loads((folder / "result.json").read_text(encoding="utf-8"))["test"]
    confusion = _rows(folder / "report/confusion.csv")
    assert [row["label"] for row in confusion] == ["a", "b", "c"]
    counts = np.array([[int(row[name]) for name in "abc"] for row in confusion])
    assert counts.sum(1).tolist() == [13, 12, 12]
    assert counts.trace() == round(score["top1"] * score["count"])
    for name, row, own, taken in zip("abc", _rows(folder / "report/classes.csv"), counts, counts.T, strict=True):
        assert (row["class"], int(row["n"]), int(row["predicted"])) == (name, own.sum(), taken.sum())
        assert float(row["recall"]) == pytest.approx(int(row["right"]) / own.sum(), abs=1e-5)
        assert (row["precision"] == "") == (taken.sum() == 0)


def test_the_worst_mistakes_come_first_and_are_shown(run: tuple[Path, str]) -> None:
    folder, _ = run
    mistakes = _rows(folder / "report/mistakes.csv")
    confusion = _rows(folder / "report/confusion.csv")
    assert len(mistakes) == 37 - sum(int(row[row["label"]]) for row in confusion)
    assert len(mistakes) > 0
    likely = [float(row["label_probability"]) for row in mistakes]
    assert likely == sorted(likely)
    for row in mistakes:
        assert row["path"].startswith(f"{row['label']}/picture ")  # the class folder that it was packed from
        assert row["predicted"] != row["label"]
        assert float(row["probability"]) >= float(row["label_probability"])
    page = (folder / "report/index.html").read_text(encoding="utf-8")
    assert page.count("<img ") == min(24, len(mistakes))
    assert mistakes[0]["path"] in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # it needs no other file and no network


def test_the_test_split_is_read_once(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept: list[tuple[str, int]] = []
    build = loader.BatchBuilder.build

    def counted(self, positions, samples, pool):  # type: ignore[no-untyped-def]
        swept.append((self.shards.split, len(positions)))
        return build(self, positions, samples, pool)

    monkeypatch.setattr(loader.BatchBuilder, "build", counted)
    _finetune(small_recipe(tmp_path / "run", small_shards, **SHORT))
    assert sum(count for split, count in swept if split == "test") == 37
    assert (tmp_path / "run/report/index.html").is_file()


def test_without_a_test_split_the_report_is_of_validation(small_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    _finetune(small_recipe(folder, small_shards, **SHORT, data__test_split="none"))
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert "test" not in result
    classes = _rows(folder / "report/classes.csv")
    assert sum(int(row["n"]) for row in classes) == result["validation"]["count"]
    assert "validation pictures" in (folder / "report/index.html").read_text(encoding="utf-8")


def test_names_of_classes_cannot_change_the_page(picture_folder: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(picture_folder.rglob("*.jpg"))[:18]):
        folder = tmp_path / "pictures" / ("<script>alert(1)<", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"<b>{number}.jpg").write_bytes(path.read_bytes())
    listing = FolderListing(tmp_path / "pictures", labels="folder")
    for split in ("train", "test"):
        pack(listing, tmp_path / "set", split, classes=listing.classes, workers=1)
    _finetune(small_recipe(tmp_path / "run", tmp_path / "set", **SHORT))
    page = (tmp_path / "run/report/index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<b>" not in page
    assert "&lt;script&gt;" in page


def test_names_that_are_no_text_spoil_no_report(small_shards: Path, tmp_path: Path) -> None:
    data = _relabelled(small_shards, tmp_path / "set", "test", lambda labels: None, ["a", "\udce9\x1b[31m", "c"])
    _finetune(small_recipe(tmp_path / "run", data, **SHORT))
    assert [row["class"] for row in _rows(tmp_path / "run/report/classes.csv")] == ["a", r"�\x1b[31m", "c"]


def test_a_test_split_that_breaks_in_the_middle_leaves_a_report_of_validation_alone(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = loader.BatchBuilder.build

    def breaks(self, positions, samples, pool):  # type: ignore[no-untyped-def]
        if self.shards.split == "test" and positions[0] > 0:
            raise BadInput("samples in a row could not be read")
        return build(self, positions, samples, pool)

    monkeypatch.setattr(loader.BatchBuilder, "build", breaks)
    said = _finetune(small_recipe(tmp_path / "run", small_shards, **SHORT))
    assert "no test score: samples in a row could not be read" in said
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert "test" not in result
    assert "validation pictures" in result["notes"]
    assert "samples in a row could not be read" in result["notes"]
    classes = _rows(tmp_path / "run/report/classes.csv")
    assert sum(int(row["n"]) for row in classes) == result["validation"]["count"]


def test_very_many_classes_need_no_square_of_them(small_shards: Path, tmp_path: Path) -> None:
    classes, mistakes = 100_000, 5
    label = np.arange(37) * 2_500
    predicted = np.where(np.arange(37) < mistakes, 99_999, label)
    found = Predictions(np.arange(37), label, predicted, np.full(37, 0.9), np.full(37, 0.1))
    shards = ShardSet.open(small_shards, "test")
    shards.classes = None
    page = write_report(tmp_path, shards, found, what="", num_classes=classes)
    assert page.stat().st_size < 2_000_000
    assert "1,000 of 100,000; classes.csv has all" in page.read_text(encoding="utf-8")
    rows = {int(row["class"]): row for row in _rows(tmp_path / "report/classes.csv")}
    assert len(rows) == classes
    assert (rows[99_999]["predicted"], rows[99_999]["right"], rows[2_500]["recall"]) == ("5", "0", "0")
    assert (rows[12_500]["recall"], rows[45_000]["precision"], rows[1]["recall"]) == ("1", "1", "")
    assert len(_rows(tmp_path / "report/mistakes.csv")) == mistakes


def test_test_pictures_that_are_trained_on_are_told_at_the_start_and_in_the_scores(run: tuple[Path, str]) -> None:
    folder, said = run
    assert "LEAK: 37 of the 37 test pictures are, byte for byte, in split 'train' too, such as test-" in said
    assert said.index("LEAK") < said.index("step 2/2")
    leak = json.loads((folder / "result.json").read_text(encoding="utf-8"))["leak"]
    assert leak["identical"] == 37
    assert "--near-duplicates" in leak["said"]
    assert "LEAK: 37" in (folder / "report/index.html").read_text(encoding="utf-8")


def test_splits_without_a_common_picture_raise_no_alarm(picture_folder: Path, tmp_path: Path) -> None:
    listing = FolderListing(picture_folder, labels="folder")
    for split, part in (("train", listing[::2]), ("test", listing[1::2])):
        pack(part, tmp_path / "set", split, classes=listing.classes, workers=1)
    said = _finetune(small_recipe(tmp_path / "run", tmp_path / "set", **SHORT, data__validation_fraction=0.3))
    assert "LEAK" not in said
    leak = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))["leak"]
    assert leak["identical"] == 0
    assert "near-identical ones are found by" in leak["said"]


def _relabelled(
    small_shards: Path, folder: Path, split: str, change: Callable[[np.ndarray], None], names: list[str] | None = None
) -> Path:
    """A copy of the small set with other labels in one split, and other class names or none."""
    import shutil

    shutil.copytree(small_shards, folder)
    file = folder / str(read_manifest(folder).splits[split].labels)
    labels = np.load(file)
    change(labels)
    np.save(file, labels)
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["classes"] = names
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def test_a_label_that_training_does_not_know_is_named_by_its_sample(small_shards: Path, tmp_path: Path) -> None:
    def spoil(labels: np.ndarray) -> None:
        labels[13] = 7

    data = _relabelled(small_shards, tmp_path / "set", "test", spoil)
    sentence = r"test-000001.tar: sample 3 \(key \d+\) of split 'test' has the label 7, .* are below 3: pack both"
    with pytest.raises(BadInput, match=sentence):
        _finetune(small_recipe(tmp_path / "run", data, **SHORT))


def test_a_label_that_no_one_would_believe_is_named_by_its_sample(small_shards: Path, tmp_path: Path) -> None:
    def spoil(labels: np.ndarray) -> None:
        labels[4] = 2_000_000

    data = _relabelled(small_shards, tmp_path / "set", "train", spoil)
    with pytest.raises(BadInput, match=r"train-000000.tar: sample 4 \(key \d+\) of split 'train' .* label 2,000,000"):
        _finetune(small_recipe(tmp_path / "run", data, **SHORT))


def test_samples_without_a_label_are_counted_and_the_first_is_named(small_shards: Path, tmp_path: Path) -> None:
    def forget(labels: np.ndarray) -> None:
        labels[[5, 8]] = -1

    data = _relabelled(small_shards, tmp_path / "set", "train", forget)
    said = _finetune(small_recipe(tmp_path / "run", data, **SHORT))
    assert re.search(r"2 of the 37 pictures of split 'train' have no label .* train-000000.tar: sample 5 \(key", said)


@pytest.mark.slow
def test_two_processes_report_what_one_reports(small_shards: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        more = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
        overrides = small_recipe(tmp_path / str(ranks), small_shards, **SHORT, data__balance="sqrt", method__freeze=1)
        command = [sys.executable, *(more if ranks == 2 else []), "-m", "foreseen", "finetune", "cpu_minutes"]
        done = subprocess.run(
            [*command, *overrides], capture_output=True, text=True, timeout=300, check=False,
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("what it gets wrong:") == 1
    for name in ("confusion.csv", "classes.csv"):
        assert (tmp_path / "1/report" / name).read_bytes() == (tmp_path / "2/report" / name).read_bytes()
    one, two = (_rows(tmp_path / ranks / "report/mistakes.csv") for ranks in "12")
    assert [row["path"] for row in one] == [row["path"] for row in two]
