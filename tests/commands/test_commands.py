"""The commands as a user meets them: one process, real shards, small models."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.verbs import Verb, load_recipe
from foreseen.config import recipe_names
from tests.small_methods import patch_of, small_method

Recipe = Callable[..., list[str]]


def _foreseen(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _small(recipe: Recipe, verb: Verb, name: str, **more: object) -> tuple[list[str], int]:
    """Two steps of a recipe with only its width, depth, heads, image sizes and batch changed; and its size.

    That is 4 × 4 patches of a ViT, and 64 px of a ResNet.
    """
    config = load_recipe(verb, name)
    model = config.model
    patch = patch_of(config)
    args = "{embed_dim: 48, depth: 2, num_heads: 3}" if patch else "{layers: [1, 1, 1, 1], channels: [4, 8, 8, 12]}"
    if (model.name or "").startswith("mobilenet"):
        args = "null"  # small as it is
    patch = patch or 16
    size = 4 * patch
    overrides = recipe(
        run__steps=2, run__epochs="null", optim__warmup_steps=1, optim__warmup_epochs="null", batch__global_size=8,
        views__size=size, model__args=args, **more,
    )  # fmt: skip
    small = small_method(config)
    if "method.crops" in small:
        small["method.crops"] = f"{{local_count: 2, local_size: {2 * patch}}}"
    return [*overrides, *(f"{key}={value}" for key, value in small.items())], size


@pytest.mark.parametrize("name", recipe_names("pretrain"))
def test_every_pretraining_recipe_runs_and_ends_in_a_folder_that_timm_loads(
    name: str, recipe: Recipe, tmp_path: Path
) -> None:
    small, size = _small(recipe, "pretrain", name, model__init_from="null")
    output = _foreseen("pretrain", name, *small)
    assert "step 2/2" in output
    model = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, model.head_hidden_size)
    assert json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))["steps"] == 2
    assert len(json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))["starts"]) == 1


@pytest.mark.parametrize("name", recipe_names("finetune"))
def test_every_finetuning_recipe_runs_from_scratch_and_scores_the_test_split(
    name: str, recipe: Recipe, tmp_path: Path
) -> None:
    small, size = _small(recipe, "finetune", name, data__shots=4, model__init_from="null")
    _foreseen("finetune", name, *small)
    result = json.loads((tmp_path / "run/result.json").read_text(encoding="utf-8"))
    assert result["training_samples"] == 12
    assert result["test"]["count"] == 37
    assert 0 <= result["test"]["top1"] <= result["test"]["top5"] <= 1
    model = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert model.eval()(torch.zeros(1, 3, size, size)).shape == (1, 3)


@pytest.mark.slow
def test_an_averaged_compiled_and_recomputed_run_hands_over_folders_that_timm_loads(
    recipe: Recipe, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    ways = {
        "compute__compile": "aot_eager", "compute__checkpoint_activations": True, "compute__precision": "fp16",
        "optim__ema_decay": 0.9, "model__drop_path_rate": 0.2,
    }  # fmt: skip
    common = {"run__steps": 3, "optim__warmup_steps": 1, "batch__global_size": 8, **ways}
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**common))
    average = load_file(tmp_path / "run/checkpoints/step-3/average.safetensors")
    encoder = load_file(tmp_path / "run/encoder/model.safetensors")
    assert torch.equal(encoder["blocks.0.mlp.fc1.weight"], average["vit.blocks.0.mlp.fc1.weight"])

    finetuned = recipe(**common, run__dir=tmp_path / "tuned", data__shots=4, model__init_from=tmp_path / "run/encoder")
    _foreseen("finetune", "cpu_minutes", *finetuned)
    best = json.loads((tmp_path / "tuned/checkpoints/best.json").read_text(encoding="utf-8"))["step"]
    average = load_file(tmp_path / f"tuned/checkpoints/step-{best}/average.safetensors")
    classifier = timm.create_model(f"local-dir:{tmp_path}/tuned/encoder", pretrained=True)
    assert torch.equal(classifier.head.weight, average["model.head.weight"])


def test_an_encoder_goes_on_into_finetuning_and_the_table(recipe: Recipe, tmp_path: Path) -> None:
    common = {"run__steps": 30, "optim__warmup_steps": 3, "batch__global_size": 8, "run__save_every": 10}
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**common))
    encoder = tmp_path / "run/encoder"
    runs = []
    for seed in (0, 1):
        runs.append(str(tmp_path / f"finetune{seed}"))
        overrides = recipe(**common, run__dir=runs[-1], seed=seed, data__shots=6, model__init_from=encoder)
        _foreseen("finetune", "cpu_minutes", *overrides)
    # Each class is a colour: a network that learns anything at all tells them apart.
    assert json.loads(Path(runs[0], "result.json").read_text(encoding="utf-8"))["test"]["top1"] > 0.6
    table = tmp_path / "table.md"
    assert "1 rows" in _foreseen("results", *runs, "--out", str(table))
    row = next(line for line in table.read_text(encoding="utf-8").splitlines() if str(encoder) in line)
    assert "| 0, 1 |" in row
    assert "±" in row
    before = table.read_text(encoding="utf-8")
    _foreseen("results", *runs, "--out", str(table))
    assert table.read_text(encoding="utf-8") == before


def _refused(*arguments: str) -> str:
    from foreseen.errors import BadInput

    with pytest.raises(BadInput) as error:
        CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    return str(error.value)


def test_bad_input_is_a_sentence(recipe: Recipe, tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    common = {"run__steps": 2, "optim__warmup_steps": 1, "batch__global_size": 8}
    assert "nowhere" in _refused("pretrain", "mae_cpu_minutes", *recipe(**common, data__path=nowhere))
    (tmp_path / "empty").mkdir()
    assert "empty" in _refused("pretrain", "mae_cpu_minutes", *recipe(**common, data__path=tmp_path / "empty"))
    assert "did you mean" in _refused("pretrain", "mae_cpu_minutes", *recipe(**common, data__split="trane"))
    patches = _refused("pretrain", "mae_cpu_minutes", *recipe(**common, views__size=30))
    assert "30" in patches
    assert "8" in patches
    assert "views.size" in patches
    assert "nowhere" in _refused("finetune", "cpu_minutes", *recipe(**common, data__shots=4, model__init_from=nowhere))
    many = _refused("finetune", "cpu_minutes", *recipe(**common, data__shots=100, model__init_from="null"))
    assert "data.shots" in many


def test_the_door_prints_the_sentence_and_exits_with_two(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["foreseen", "pretrain", "mae_vit_b16", "optim.l=1"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("foreseen: unknown key 'optim.l'")


def test_recipes_are_listed_and_printed() -> None:
    assert "foreseen pretrain mae_vit_b16" in _foreseen("recipes")
    assert "mask_ratio: 0.75" in _foreseen("recipes", "mae_vit_b16")


def test_labels_that_allow_no_validation_are_refused(picture_folder: Path, recipe: Recipe, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / "few" / name).mkdir(parents=True)
        picture = next((picture_folder / name).iterdir())
        (tmp_path / "few" / name / "only.jpg").write_bytes(picture.read_bytes())
    _foreseen("data", "pack", str(tmp_path / "few"), str(tmp_path / "set"), "--labels", "folder", "--workers", "1")
    small = recipe(run__steps=2, model__init_from="null", data__path=tmp_path / "set", data__shots="null")
    said = _refused("finetune", "cpu_minutes", *small)
    assert "has two labels, so none can be set aside for validation" in said


@pytest.mark.slow
def test_bad_input_that_a_loader_worker_meets_is_a_sentence_too(
    small_shards: Path, recipe: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(small_shards, tmp_path / "damaged")
    for shard in (tmp_path / "damaged").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    small = recipe(run__steps=2, optim__warmup_steps=1, data__path=tmp_path / "damaged", data__workers=1)
    command = [sys.executable, "-m", "foreseen", "pretrain", "mae_cpu_minutes", *small]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("foreseen: 21 samples in a row of")
    assert "the set is damaged, pack it again" in ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
