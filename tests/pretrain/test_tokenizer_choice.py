"""A run fits or takes its tokenizer at its first start, judges it there, and leaves both alone when going on."""

import json
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from foreseen.config import Config, resolve
from foreseen.data.loader import BatchBuilder
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput
from foreseen.pretrain import tokenizer_choice
from foreseen.pretrain.tokenizer_choice import TokenizedOptions, choose_tokenizer
from foreseen.tokenizers.folder import load_tokenizer, save_tokenizer
from foreseen.tokenizers.looking import Cut
from foreseen.tokenizers.pixel_clusters import PixelClusters


class Options(TokenizedOptions):
    name: Literal["learner"] = "learner"


class Start:
    """A start of a run on the small set."""

    def __init__(self, run: Path, shards: Path, **method: object) -> None:
        raw = {
            "run": {"dir": run, "steps": 2},
            "data": {"path": str(shards), "workers": 0},
            "model": {"name": "vit_tiny_patch16_224", "args": {"patch_size": 8, "embed_dim": 48, "depth": 1}},
            "method": {"name": "learner", "pixel_clusters": {"clusters": 12}, **method},
            "views": {"size": [32, 48]},
            "optim": {"base_lr": 1e-3},
            "batch": {"global_size": 4},
        }
        self.config = resolve(raw, {"learner": Options})
        self.pictures = ShardSet.open(shards, "train")

    def cut(self) -> Cut:
        return lambda request: BatchBuilder.configured(self.pictures, request, self.config)

    def make(self) -> Config:
        self.config.run.dir.mkdir(parents=True, exist_ok=True)  # as whoever holds it does
        return choose_tokenizer(self.config, self.cut(), Accelerator(cpu=True))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def named(config: Config) -> Path:
    assert isinstance(config.method, TokenizedOptions)
    assert config.method.tokenizer is not None
    return Path(config.method.tokenizer)


def dead_tokenizer(folder: Path) -> Path:
    tokenizer = PixelClusters(32, 4, (16, 24))
    tokenizer.centroids.fill_(9.0)  # farther from any picture than the one that is left
    tokenizer.centroids[3] = 0.5
    save_tokenizer(tokenizer, folder, lineage={})
    return folder


def test_a_run_without_a_tokenizer_fits_pixel_clusters_with_a_code_for_each_patch(
    run: Path, small_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Start(run, small_shards).make()
    assert named(config) == run.resolve() / "tokenizer"
    found = load_tokenizer(named(config))
    assert isinstance(found.tokenizer, PixelClusters)
    assert found.tokenizer.codebook_size == 12
    assert found.tokenizer.grid(found.tokenizer.input_size) == (4, 6)
    assert found.lineage["method"] == "pixel_clusters"
    assert found.lineage["data"]["samples"] == 37
    assert found.health["used"] == 12
    assert "12 of 12 codes used (100%)" in capsys.readouterr().out


def test_the_verdict_is_kept_with_the_run(run: Path, small_shards: Path) -> None:
    Start(run, small_shards).make()
    assert json.loads((run / "tokenizer_health.json").read_text(encoding="utf-8"))["codes"] == 37 * 24
    with Image.open(run / "tokenizer_health.png") as sheet:
        assert sheet.width > 500


def test_fitting_moves_no_draw_of_the_initial_weights(run: Path, small_shards: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Start(run, small_shards).make()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_same_start_fits_the_same_tokenizer_and_only_once(run: Path, small_shards: Path, tmp_path: Path) -> None:
    first = named(Start(run, small_shards).make())
    elsewhere = named(Start(tmp_path / "elsewhere", small_shards).make())
    weights = (first / "model.safetensors").read_bytes()
    assert (elsewhere / "model.safetensors").read_bytes() == weights
    os.utime(first / "model.safetensors", (1, 1))
    Start(run, small_shards).make()  # as after a kill before the first checkpoint
    assert (first / "model.safetensors").stat().st_mtime == 1


def test_before_the_first_checkpoint_another_vocabulary_is_fitted_anew(run: Path, small_shards: Path) -> None:
    Start(run, small_shards).make()
    config = Start(run, small_shards, pixel_clusters={"clusters": 9}).make()
    assert load_tokenizer(named(config)).tokenizer.codebook_size == 9


def test_a_tokenizer_that_someone_put_into_the_run_folder_is_taken(run: Path, small_shards: Path) -> None:
    tokenizer = PixelClusters(7, 4, (16, 24))
    tokenizer.centroids.copy_(torch.linspace(0, 1, 7)[:, None].expand(7, 48))
    save_tokenizer(tokenizer, run / "tokenizer", lineage={"method": "by hand"})
    assert load_tokenizer(named(Start(run, small_shards, min_usage=0).make())).lineage == {"method": "by hand"}


def test_going_on_neither_fits_nor_measures(run: Path, small_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "checkpoints/step-2").mkdir(parents=True)
    for work in ("fit_pixel_clusters", "measure_health"):
        monkeypatch.setattr(tokenizer_choice, work, None)
    assert named(Start(run, small_shards).make()) == run.resolve() / "tokenizer"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints"]


def test_a_dead_tokenizer_is_refused_with_its_number(run: Path, small_shards: Path, tmp_path: Path) -> None:
    dead = dead_tokenizer(tmp_path / "dead")
    with pytest.raises(BadInput, match=r"only 1 of 32 codes are used \(3\.1%\).*set method\.min_usage=0"):
        Start(run, small_shards, tokenizer=str(dead)).make()
    assert (run / "tokenizer_health.png").is_file()  # to look at
    config = Start(run, small_shards, tokenizer=str(dead), min_usage=0).make()
    assert named(config) == dead


def test_what_was_measured_on_the_same_pictures_is_not_measured_again(
    run: Path, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = named(Start(tmp_path / "first", small_shards).make())
    monkeypatch.setattr(tokenizer_choice, "measure_health", None)
    Start(run, small_shards, tokenizer=str(folder)).make()
    assert (run / "tokenizer_health.json").read_text(encoding="utf-8") == (
        tmp_path / "first/tokenizer_health.json"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("sheet", ["text", "large", "missing"])
def test_a_sheet_that_is_none_or_a_bomb_is_drawn_anew(
    sheet: str, run: Path, small_shards: Path, tmp_path: Path
) -> None:  # fmt: skip
    folder = named(Start(tmp_path / "first", small_shards).make())
    drawn = (tmp_path / "first/tokenizer_health.png").read_bytes()
    (folder / "health.png").unlink()
    if sheet == "text":
        (folder / "health.png").write_text("no picture", encoding="utf-8")
    elif sheet == "large":
        Image.new("1", (9000, 9000)).save(folder / "health.png")
    Start(run, small_shards, tokenizer=str(folder)).make()
    assert (run / "tokenizer_health.png").read_bytes() == drawn


def test_too_few_different_patches_are_told(
    run: Path, small_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    Start(run, small_shards, pixel_clusters={"clusters": 5000}).make()
    assert "888 different patches of 4×4 px were found" in capsys.readouterr().out.replace(",", "")


def test_a_tokenizer_that_is_not_there_is_a_sentence(run: Path, small_shards: Path) -> None:
    with pytest.raises(BadInput, match="nowhere is no tokenizer folder"):
        Start(run, small_shards, tokenizer="nowhere").make()
