"""Probes of a run while it trains, through the real loop and a real method."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.config import Compute
from foreseen.data.loader import BatchBuilder
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import FolderListing
from foreseen.data.views import Request, View
from foreseen.engine.extract import extract
from foreseen.errors import BadInput
from foreseen.models.backbone import create_backbone

Recipe = Callable[..., list[str]]
LENGTH = {"run__steps": 6, "run__log_every": 1, "run__save_every": 2, "optim__warmup_steps": 0, "batch__global_size": 8}


def _pretrain(recipe: Recipe, folder: Path, **more: Any) -> list[dict[str, Any]]:
    pretrain.run(load_recipe("pretrain", "mae_cpu_minutes", recipe(run__dir=folder, **LENGTH, **more)))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def _probes(lines: list[dict[str, Any]]) -> dict[int, dict[str, float]]:
    timed = ("probe/seconds", "probe/time_share")
    return {
        line["step"]: {name: value for name, value in line.items() if name.startswith("probe/") and name not in timed}
        for line in lines
        if "probe/seconds" in line
    }


@pytest.mark.parametrize(
    "more",
    [{}, {"optim__ema_decay": 0.5, "compute__compile": "aot_eager", "compute__checkpoint_activations": True}],
    ids=["plain", "averaged, compiled, recomputed"],
)
def test_a_run_with_probes_is_bit_for_bit_the_run_without(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    drop = {"model__drop_path_rate": 0.3, **more}
    bare = _pretrain(recipe, tmp_path / "bare", probe__every="null", **drop)
    capsys.readouterr()
    probed = _pretrain(recipe, tmp_path / "probed", probe__every=4, probe__labels=True, probe__linear=True, **drop)
    assert _losses(probed) == _losses(bare)
    weights = [(tmp_path / run / "checkpoints/step-6/model.safetensors").read_bytes() for run in ("bare", "probed")]
    assert weights[0] == weights[1]
    found = _probes(probed)
    assert list(found) == [0, 4, 6]
    names = {"rankme", "rankme_centred", "alpha_req", "knn_top1", "linear_top1"}
    assert all(numbers.keys() == {f"probe/{name}" for name in names} for numbers in found.values())
    assert all(0 < line["probe/time_share"] <= 1 for line in probed if "probe/seconds" in line)
    assert capsys.readouterr().out.count("k-NN (k = 20) is right on") == 3


def test_a_run_that_goes_on_probes_what_is_due_once_and_remembers_the_rest(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken = _pretrain(recipe, tmp_path / "unbroken", probe__every=2)
    from foreseen.engine import train

    save = train.save

    def killed(trainer: Any, step: int, score: float | None) -> None:
        save(trainer, step, score)
        if step == 4:
            raise KeyboardInterrupt  # saved, not yet probed

    monkeypatch.setattr(train, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        _pretrain(recipe, tmp_path / "killed", probe__every=2)
    monkeypatch.setattr(train, "save", save)
    lines = _pretrain(recipe, tmp_path / "killed", probe__every=2)
    assert [line["step"] for line in lines if "probe/seconds" in line] == [0, 2, 4, 6]
    assert _probes(lines) == _probes(unbroken)
    assert _pretrain(recipe, tmp_path / "killed", probe__every=2) == lines  # nothing is left to do


def test_without_a_word_about_labels_none_is_read(recipe: Recipe, tmp_path: Path) -> None:
    found = _probes(_pretrain(recipe, tmp_path / "run", probe__every=6, probe__linear=True))
    assert all(
        numbers.keys() == {"probe/rankme", "probe/rankme_centred", "probe/alpha_req"} for numbers in found.values()
    )


def test_other_labelled_data_judges_and_its_test_split_is_not_needed(
    recipe: Recipe, tmp_path: Path, picture_folder: Path
) -> None:
    listing = FolderListing(picture_folder, labels="folder")
    pack(listing, tmp_path / "labelled", "train", classes=listing.classes, workers=1)
    plain = FolderListing(picture_folder)
    pack(plain, tmp_path / "plain", "train", classes=plain.classes, workers=1)
    named = {"data__path": tmp_path / "plain", "probe__every": 6}
    found = _probes(_pretrain(recipe, tmp_path / "run", probe__data=tmp_path / "labelled", **named))
    assert all("probe/knn_top1" in numbers for numbers in found.values())
    with pytest.raises(BadInput, match="has no labels to probe by; name labelled data in probe.data"):
        _pretrain(recipe, tmp_path / "refused", probe__labels=True, **named)


def test_features_are_of_the_samples_that_could_be_read_and_the_model_stays_as_it_was(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet.open(small_shards, "train")
    torch.manual_seed(0)
    args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = create_backbone("vit_tiny_patch16_224", img_size=(32, 32), drop_path_rate=0.5, args=args).train()
    model.get_submodule("blocks.0").eval()  # a frozen part keeps its own mode
    modes = [module.training for module in model.modules()]
    builder = BatchBuilder(shards, Request((View("image", (32, 32), crop="centre", flip=0.0),)), seed=0)
    samples = np.array([1, 4, 9, 16, 25])

    def look(batch_size: int) -> Any:
        accelerator = Accelerator(cpu=True)
        compute = Compute(precision="fp32")
        return extract(model, "cls", builder, samples, accelerator, compute, batch_size=batch_size, workers=0)

    whole, alone = look(5), look(1)
    assert whole.unreadable == 0
    assert torch.allclose(whole.features, alone.features, atol=1e-5)  # no drop path, and each in its row
    read = ShardSet.read
    damaged = lambda self, numbers, **_: (b"no picture" if n == 9 else read(self, n) for n in numbers)  # noqa: E731
    monkeypatch.setattr(ShardSet, "read_many", damaged)
    partly = look(2)
    assert (partly.samples.tolist(), partly.unreadable) == ([1, 4, 16, 25], 1)
    assert [problem.sample for problem in partly.problems] == [9]
    assert torch.allclose(partly.features, whole.features[[0, 1, 3, 4]], atol=1e-5)
    known = partly.labelled(np.array([4, 9, 25]), shards.labels)
    assert known.labels.tolist() == [shards.labels[4], shards.labels[25]]
    assert torch.equal(known.features, partly.features[[1, 3]])
    assert [module.training for module in model.modules()] == modes
