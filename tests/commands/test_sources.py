"""Runs straight from pictures, through the real commands: packed once behind the scenes, and anew after a change."""

import csv
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.data.manifest import read_manifest
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput

Recipe = Callable[..., list[str]]
TINY = {"run__steps": 2, "optim__warmup_steps": 1, "batch__global_size": 8}
SCRATCH = {**TINY, "model__init_from": "null", "model__name": "vit_tiny_patch16_224", "data__shots": 3}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    return tmp_path / "cache" / "foreseen"


@pytest.fixture
def pictures(picture_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(picture_folder, tmp_path / "pictures")


def foreseen(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    with pytest.raises(BadInput) as error:
        CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    return str(error.value)


def result(run: Path) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def stamps(folder: Path) -> dict[str, int]:
    return {str(file): file.stat().st_mtime_ns for file in folder.rglob("*")}


def write_csv(file: Path, pictures: Path) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as out:
        names = sorted(pictures.rglob("*.jpg"))
        csv.writer(out).writerows([["file", "breed"], *([name, name.parent.name] for name in names)])
    return file


@pytest.mark.parametrize("kind", ["folder", "csv", "hf"])
def test_finetuning_straight_from_pictures_packs_them_once(
    kind: str, pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    src = {"folder": str(pictures), "csv": str(write_csv(tmp_path / "list.csv", pictures)), "hf": f"hf:{pictures}"}[
        kind
    ]
    said = foreseen("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=src))
    (folder,) = cache.glob("packed-*")
    assert f"packing 37 pictures of {src} into {folder}, once" in said
    assert f"{src} has no test split: 0.2 of each class, 7 pictures, are set aside as one" in said
    assert result(tmp_path / "run")["test"]["count"] == 7
    manifest = read_manifest(folder)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 30, "test": 7}
    assert manifest.classes == ("a", "b", "c")
    before = stamps(folder)
    said = foreseen("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=src, run__dir=tmp_path / "again"))
    assert "packing" not in said
    assert "has no test split" in said
    assert stamps(folder) == before
    assert result(tmp_path / "again")["test"] == result(tmp_path / "run")["test"]


def test_a_changed_folder_is_packed_anew_and_keeps_its_test_pictures(
    pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures))
    (first,) = cache.glob("packed-*")
    shutil.copy(pictures / "a" / "picture 0.jpg", pictures / "a" / "picture 40.jpg")
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures, run__dir=tmp_path / "more"))
    assert "packing 38 pictures" in said
    (second,) = set(cache.glob("packed-*")) - {first}
    old, new = ({*_names(folder, "test")} for folder in (first, second))
    assert len(old - new) <= 1
    assert "changed since the run" in refused("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures))
    os.utime(pictures / "a" / "picture 0.jpg", (1, 1))
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures, run__dir=tmp_path / "most"))
    assert "packing 38 pictures" in said
    assert len(list(cache.glob("packed-*"))) == 3
    assert not list(cache.glob("*.part"))


def _names(folder: Path, split: str) -> list[str]:
    import tarfile

    names = []
    for file in folder.glob(f"{split}-*.tar"):
        with tarfile.open(file) as tar:
            names += [json.load(tar.extractfile(info))["path"] for info in tar if info.name.endswith("json")]  # type: ignore[arg-type]
    return names


def test_pretraining_and_finetuning_share_the_cache_and_hold_the_same_pictures_out(
    pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    assert "packing 37" in foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures))
    said = foreseen(
        "finetune", "cpu_minutes",
        *recipe(**TINY, data__path=pictures, data__shots=3, run__dir=tmp_path / "tuned",
                model__init_from=tmp_path / "run" / "encoder"),
    )  # fmt: skip
    assert "packing" not in said
    lineage = json.loads((tmp_path / "tuned/encoder/lineage.json").read_text(encoding="utf-8"))
    assert lineage["data"]["samples"] == 30
    assert lineage["data"]["source"] == "pictures"


def test_a_source_with_val_alone_is_scored_on_it(
    picture_folder: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    for split in ("train", "val"):
        shutil.copytree(picture_folder, tmp_path / "set" / split)
    said = foreseen("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=tmp_path / "set"))
    assert "has no split test: its val is read as the test split, once, at the end" in said
    assert result(tmp_path / "run")["test"]["count"] == 37
    said = refused("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=tmp_path / "set", data__split="trian"))
    assert "has no split 'trian', it has train, val; did you mean train?" in said


def test_nothing_is_cut_where_it_is_not_wanted_or_there_are_no_labels(
    pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures, data__test_fraction=0))
    assert "test split" not in said
    (first,) = cache.glob("packed-*")
    assert len(ShardSet.open(first, "train")) == 37
    for file in list(pictures.rglob("*.jpg")):
        file.rename(pictures / f"{file.parent.name} {file.name}")
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures, run__dir=tmp_path / "flat"))
    (second,) = set(cache.glob("packed-*")) - {first}
    assert list(read_manifest(second).splits) == ["train"]
    assert "has no labels" in refused("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=pictures))


def test_classes_with_a_single_picture_are_named(pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path) -> None:
    for file in sorted((pictures / "b").iterdir())[1:]:
        file.unlink()
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures))
    assert "1 classes of" in said
    assert "have a single picture, such as 'b': it stays in train" in said
    shutil.rmtree(pictures / "a")
    shutil.rmtree(pictures / "c")
    more = {**TINY, "run__dir": tmp_path / "more", "batch__global_size": 1}
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**more, data__path=pictures))
    assert "no class of" in said
    assert "has two pictures, so no test split is cut from it" in said


def test_unreadable_pictures_are_left_out_and_listed(pictures: Path, recipe: Recipe, cache: Path) -> None:
    (pictures / "a" / "bad.jpg").write_text("<html>")
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures))
    (folder,) = cache.glob("packed-*")
    assert "1 pictures of t" in said
    assert "such as a/bad.jpg: it is a web page" in said
    (listed,) = folder.glob("*.unreadable.txt")
    assert str(listed) in said


def test_what_cannot_be_packed_is_a_sentence_and_leaves_no_set(
    pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "a.txt").touch()
    assert "none of them pictures" in refused(
        "pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=tmp_path / "none")
    )
    lost = tmp_path / "lost.csv"
    lost.write_text("path,label\ngone.jpg,a\n")
    said = refused("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=lost))
    assert "1 of 1 pictures cannot be read, so nothing was packed; gone.jpg: row 2 of lost.csv names no file" in said
    assert not list(cache.glob("packed-*/manifest.json"))
    cache.chmod(0o500)
    if not os.access(cache, os.W_OK):
        said = refused("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures))
        assert "set XDG_CACHE_HOME" in said
    cache.chmod(0o700)


def test_the_pack_command_takes_csvs_hugging_face_sets_and_split_folders(picture_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(picture_folder, tmp_path / "set" / split)
    out = tmp_path / "from_folder"
    foreseen("data", "pack", tmp_path / "set", out, "--labels", "folder", "--workers", 1)
    assert set(read_manifest(out).splits) == {"train", "test"}
    file = write_csv(tmp_path / "list.csv", picture_folder)
    said = foreseen("data", "pack", file, out, "--split", "extra", "--workers", 1)
    assert "split extra" in said
    assert read_manifest(out).classes == ("a", "b", "c")
    hf = tmp_path / "from_hf"
    foreseen("data", "pack", f"hf:{tmp_path / 'set'}", hf, "--workers", 1)
    assert read_manifest(hf).classes == ("a", "b", "c")
    assert (ShardSet.open(hf, "train").labels >= 0).all()  # type: ignore[operator]
    (hf / "manifest.json").unlink()
    foreseen("data", "pack", file, tmp_path / "bare", "--labels", "none", "--workers", 1)
    assert ShardSet.open(tmp_path / "bare", "train").labels is None
    assert "--image-column" in refused("data", "pack", file, tmp_path / "x", "--image-column", "nix")
    assert not (tmp_path / "x").exists()


def test_a_killed_packing_of_several_splits_goes_on(picture_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        shutil.copytree(picture_folder, tmp_path / "set" / split)
    pack = ("data", "pack", tmp_path / "set", tmp_path / "out", "--workers", 1)
    foreseen(*pack, "--split", "train")  # as far as a killed one came
    said = foreseen(*pack)
    assert "kept 37 pictures, packed from the same files before" in said
    assert "split test" in said
    assert foreseen(*pack).count("kept 37 pictures") == 2


def test_a_split_of_another_source_is_never_taken_for_one_of_this(picture_folder: Path, tmp_path: Path) -> None:
    for place, first in (("one", "a"), ("two", "b")):
        for split in ("train", "test"):
            shutil.copytree(picture_folder / first, tmp_path / place / split)
    foreseen("data", "pack", tmp_path / "one", tmp_path / "out", "--split", "train", "--workers", 1)
    assert "already has a split 'train'" in refused("data", "pack", tmp_path / "two", tmp_path / "out", "--workers", 1)


def test_a_test_split_without_labels_is_no_test_split(pictures: Path, recipe: Recipe, tmp_path: Path) -> None:
    """As Kaggle hands them out: train/class/*.jpg and test/*.jpg."""
    root = tmp_path / "set"
    shutil.copytree(pictures, root / "train")
    shutil.copytree(pictures / "a", root / "test")
    said = foreseen("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=root))
    assert "the split test of" in said
    assert "has no labels to judge by, and is called test_unlabelled" in said
    assert result(tmp_path / "run")["test"]["count"] == 7
    shutil.copytree(pictures, root / "val")
    said = foreseen("finetune", "cpu_minutes", *recipe(**SCRATCH, data__path=root, run__dir=tmp_path / "more"))
    assert "its val is read as the test split" in said
    assert result(tmp_path / "more")["test"]["count"] == 37
    more = {"data__path": root, "data__split": "test_unlabelled", "run__dir": tmp_path / "pretrained"}
    foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, **more))


def test_finetuning_says_before_it_trains_that_there_is_nothing_to_be_scored_by(
    picture_folder: Path, recipe: Recipe, tmp_path: Path
) -> None:
    for split, labels in (("train", "folder"), ("test", "none")):
        foreseen("data", "pack", picture_folder, tmp_path / "set", "--split", split, "--labels", labels, "--workers", 1)
    named = {**SCRATCH, "data__path": tmp_path / "set"}
    assert "split 'test' of" in refused("finetune", "cpu_minutes", *recipe(**named))
    assert not (tmp_path / "run" / "checkpoints").exists()
    said = foreseen("finetune", "cpu_minutes", *recipe(**named, data__test_split="none"))
    assert said.index("there will be no test score") < said.index("training and")


def test_converted_pictures_are_counted(pictures: Path, recipe: Recipe) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(pictures / "a" / "one.png")
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=pictures, data__test_fraction=0))
    assert "1 pictures of train are of other formats and were converted to jpg" in said


def test_probes_read_the_packed_copy_that_training_reads(
    pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path
) -> None:
    file = write_csv(tmp_path / "list.csv", pictures)
    file.write_text(file.read_text().replace("file,breed", "where,kind"))
    columns = {"data__columns__image": "where", "data__columns__label": "kind", "data__test_fraction": 0.4}
    foreseen("pretrain", "mae_cpu_minutes",
             *recipe(**TINY, **columns, data__path=file, probe__data=file, probe__every=2))  # fmt: skip
    assert len(list(cache.glob("packed-*"))) == 1
    encoder = tmp_path / "run" / "encoder"
    said = foreseen("probe", encoder, file, "--image-column", "where", "--label-column", "kind", "--workers", 0)
    assert "7 pictures judged" in said
    assert "--image-column" in refused("probe", encoder, file)


def test_runs_that_start_together_draw_procedural_pets_once(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from accelerate import Accelerator

    from foreseen.commands import session
    from foreseen.data import procedural

    drawn: list[Path] = []

    def draw(out: Path, **_: object) -> None:
        with pytest.raises(BlockingIOError), open(cache / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        out.mkdir()
        (out / "manifest.json").touch()
        drawn.append(out)

    monkeypatch.setattr(procedural, "write_procedural_pets", draw)
    accelerator = Accelerator(cpu=True)
    paths = {session.procedural_pets(32, accelerator) for _ in range(2)}
    assert paths == {*drawn}
    assert len(drawn) == 1


@pytest.mark.slow
def test_two_processes_wait_for_the_packing(pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    small = recipe(**TINY, data__path=pictures, batch__micro_size=4)
    job = subprocess.run(
        [sys.executable, *launcher, "-m", "foreseen", "pretrain", "mae_cpu_minutes", *small],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    assert job.stdout.count("packing 37 pictures") == 1
    assert (tmp_path / "run/encoder/model.safetensors").is_file()


def test_the_pack_command_takes_lists_json_lines_and_sets_of_torchvision(picture_folder: Path, tmp_path: Path) -> None:
    names = sorted(picture_folder.rglob("*.jpg"))
    (tmp_path / "list.txt").write_text("".join(f"{name}\t{name.parent.name}\n" for name in names))
    rows = [{"path": str(name), "breed": name.parent.name, "age": 3} for name in names]
    (tmp_path / "list.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sources = {"list": tmp_path / "list.txt", "json": tmp_path / "list.jsonl"}
    sources["torchvision"] = f"torchvision:ImageFolder@{picture_folder}"  # type: ignore[assignment]
    for name, source in sources.items():
        out = tmp_path / name
        foreseen("data", "pack", source, out, "--workers", 1)
        assert read_manifest(out).classes == ("a", "b", "c")
        assert sorted(ShardSet.open(out, "train").labels) == [0] * 13 + [1] * 12 + [2] * 12  # type: ignore[arg-type]
    assert _facts(tmp_path / "json")[0]["age"] == 3
    foreseen("data", "pack", sources["json"], tmp_path / "bare", "--workers", 1, "--keep-columns", "none")
    assert set(_facts(tmp_path / "bare")[0]) == {"path", "width", "height", "label"}


def _facts(folder: Path) -> list[dict[str, object]]:
    import tarfile

    facts = []
    for file in folder.glob("*.tar"):
        with tarfile.open(file) as tar:
            facts += [json.load(tar.extractfile(info)) for info in tar if info.name.endswith("json")]  # type: ignore[arg-type]
    return facts


def test_the_pack_command_divides_by_shares_and_cuts_by_size(picture_folder: Path, tmp_path: Path) -> None:
    pack = ("data", "pack", picture_folder, tmp_path / "set", "--labels", "folder", "--workers", 1)
    foreseen(*pack, "--split-fractions", "train=0.8,test=0.2", "--shard-size", 0.1)
    splits = read_manifest(tmp_path / "set").splits
    assert {name: split.samples for name, split in splits.items()} == {"train": 30, "test": 7}
    assert all(shard.bytes <= 100_000 for split in splits.values() for shard in split.shards)
    assert not {*_names(tmp_path / "set", "train")} & {*_names(tmp_path / "set", "test")}
    assert "sum to 1.2" in refused(*pack, "--split-fractions", "train=0.8,test=0.4")
    assert "--download is for torchvision" in refused(*pack, "--download")


@pytest.mark.parametrize("kind", ["list", "torchvision"])
def test_pretraining_straight_from_lists_and_sets_of_torchvision(
    kind: str, pictures: Path, recipe: Recipe, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{name}\n" for name in sorted(pictures.rglob("*.jpg"))))
    src = {"list": "list.txt", "torchvision": "torchvision:ImageFolder@pictures"}[kind]
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=src))
    assert f"packing 37 pictures of {src} into" in said
    monkeypatch.chdir(pictures)
    again = {"list": "../list.txt", "torchvision": "torchvision:ImageFolder@."}[kind]
    said = foreseen("pretrain", "mae_cpu_minutes", *recipe(**TINY, data__path=again, run__dir=tmp_path / "again"))
    assert "packing" not in said
    assert len(list(cache.glob("packed-*"))) == 1


def test_a_place_of_tars_is_refused_for_pictures_that_are_packed(
    pictures: Path, recipe: Recipe, tmp_path: Path
) -> None:
    for path in (pictures, "null"):
        said = refused("pretrain", "mae_cpu_minutes", *recipe(data__path=path, data__shards_at=tmp_path, **TINY))
        assert f"data.shards_at {tmp_path} says where the tars of a set lie" in said
