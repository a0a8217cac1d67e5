"""Pretraining that begins from weights: every kind of encoder folder, and public weights, through the real command."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import _registry
from typer.testing import CliRunner

from foreseen import cli
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone
from foreseen.models.position import resize_pos_embed
from tests.tiny_teacher import CLASSES, save_teacher

Recipe = Callable[..., list[str]]
TINY = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SEEN = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", 0.9, (32, 32))
# Nothing is learned, so what comes out is what went in.
FROZEN = {
    "run__steps": 1, "optim__warmup_steps": 0, "batch__global_size": 8, "optim__base_lr": 1e-30,
    "optim__weight_decay": 0, "model__name": "null", "model__args": "null",
}  # fmt: skip


def pretrain(*overrides: str) -> str:
    result = CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def made(folder: Path, name: str = "vit_tiny_patch16_224", **options: Any) -> dict[str, torch.Tensor]:
    """An encoder folder with weights that no initialisation gives; its weights."""
    args = TINY | options.pop("args", {})
    model = create_backbone(name, img_size=(32, 32), args=args, **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_encoder(model, folder, preprocessing=SEEN, lineage={"licences": ["CC0"], "data": {"source": "beasts"}})
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="of MAE"),
        pytest.param({"num_classes": 5, "pool": "mean"}, id="classifier with fc_norm"),
        pytest.param({"num_classes": 5, "pool": "token"}, id="classifier by class token"),
        pytest.param({"args": {"reg_tokens": 4}}, id="register tokens"),
        pytest.param({"args": {"class_token": False}}, id="no class token"),
        pytest.param({"args": {"class_token": False}, "num_classes": 5, "pool": "mean"}, id="classifier without token"),
        pytest.param({"name": "deit3_small_patch16_224"}, id="layer scale"),
    ],
)
def test_mae_begins_from_any_vits_folder_at_any_size(options: dict[str, Any], recipe: Recipe, tmp_path: Path) -> None:
    before = made(tmp_path / "start", **options)
    pretrain(*recipe(**FROZEN, model__init_from=tmp_path / "start", views__size=48))
    after = load_file(tmp_path / "run/encoder/model.safetensors")
    prefix = before["pos_embed"].shape[1] - 16
    assert torch.equal(after["pos_embed"], resize_pos_embed(before["pos_embed"], (4, 4), (6, 6), prefix))
    same = {name for name in after if name in before and torch.equal(after[name], before[name])}
    assert set(after) - same <= {"pos_embed", "norm.weight", "norm.bias"}
    described = json.loads((tmp_path / "run/encoder/config.json").read_text(encoding="utf-8"))
    assert described["pretrained_cfg"]["mean"] == list(SEEN.mean)
    assert described["pretrained_cfg"]["std"] == list(SEEN.std)
    assert timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True).num_classes == 0


@pytest.fixture
def public_vit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """timm's smallest ViT with its public weights in a file here, so that all of timm runs but the download."""
    model = timm.create_model("test_vit")
    weights = {name: torch.randn_like(value) * 0.1 for name, value in model.state_dict().items()}
    save_file(weights, tmp_path / "public.safetensors")
    for name in ("test_vit", "test_vit.r160_in1k"):
        cfg = _registry._model_pretrained_cfgs[name]
        local = replace(cfg, file=str(tmp_path / "public.safetensors"), hf_hub_id=None, url="")
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, local)
    return weights


def test_mae_begins_from_public_weights(public_vit: dict[str, torch.Tensor], recipe: Recipe, tmp_path: Path) -> None:
    pretrain(*recipe(**FROZEN, model__init_from="timm:test_vit", views__size=48))
    after = load_file(tmp_path / "run/encoder/model.safetensors")
    assert torch.equal(after["blocks.1.mlp.fc1.weight"], public_vit["blocks.1.mlp.fc1.weight"])
    assert not {name for name in after if name.startswith("head.")}
    described = json.loads((tmp_path / "run/encoder/config.json").read_text(encoding="utf-8"))
    assert described["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]
    lineage = json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))
    assert lineage["parents"] == [
        {"source": "timm:test_vit.r160_in1k", "architecture": "test_vit", "weights_sha256": None,
         "licence": "apache-2.0", "lineage": {}}
    ]  # fmt: skip
    assert lineage["licences"] == ["apache-2.0"]


def test_the_chain_of_parents_is_kept_with_data_and_licences(
    public_vit: dict[str, torch.Tensor], recipe: Recipe, tmp_path: Path
) -> None:
    start = "timm:test_vit.r160_in1k"
    for stage in ("one", "two"):
        pretrain(*recipe(**FROZEN, model__init_from=start, run__dir=tmp_path / stage))
        start = str(tmp_path / stage / "encoder")
    small = recipe(**FROZEN, model__init_from=start, run__dir=tmp_path / "tuned", data__shots=3)
    assert CliRunner().invoke(cli.app, ["finetune", "cpu_minutes", *small]).exit_code == 0
    lineage = json.loads((tmp_path / "tuned/encoder/lineage.json").read_text(encoding="utf-8"))
    (two,) = lineage["parents"]
    (one,) = two["lineage"]["parents"]
    (public,) = one["lineage"]["parents"]
    assert [parent["source"] for parent in (two, one, public)] == [
        start, str(tmp_path / "one/encoder"), "timm:test_vit.r160_in1k"
    ]  # fmt: skip
    assert len(two["weights_sha256"]) == 64
    assert two["lineage"]["data"]["fingerprint"] == lineage["data"]["fingerprint"]
    assert lineage["licences"] == ["apache-2.0"]
    assert "timm:test_vit.r160_in1k" in (tmp_path / "tuned/encoder/README.md").read_text(encoding="utf-8")


def test_a_run_goes_on_from_the_weights_it_began_from_wherever_they_lie_and_from_no_others(
    recipe: Recipe, tmp_path: Path
) -> None:
    made(tmp_path / "one")
    made(tmp_path / "two")
    pretrain(*recipe(**FROZEN, model__init_from=tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "moved")
    pretrain(*recipe(**FROZEN, model__init_from=tmp_path / "moved"))
    lineage = json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))
    assert [parent["source"] for parent in lineage["parents"]] == [str(tmp_path / "one")]
    with pytest.raises(BadInput, match=r"began from \S+one \(sha256 \w{8}…\), and this one begins from \S+two"):
        pretrain(*recipe(**FROZEN, model__init_from=tmp_path / "two"))
    kept = json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))
    assert kept == lineage


@pytest.mark.parametrize(
    ("options", "overrides", "sentence"),
    [
        ({}, {"model__name": "vit_small_patch16_224"}, "set model.name=null and model.args=null to take the encoder's"),
        ({}, {"views__size": 36}, r"views.size \[36, 36\] is not a multiple of the 8×8 patches"),
        ({"name": "test_resnet", "args": None}, {}, "test_resnet is no plain ViT"),
        ({"name": "vit_base_patch16_siglip_224"}, {}, "vit_base_patch16_siglip_224 is no plain ViT .* attention pool"),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_a_sentence(
    options: dict[str, Any], overrides: dict[str, Any], sentence: str, recipe: Recipe, tmp_path: Path
) -> None:
    if "args" in options:
        model = create_backbone(options["name"], img_size=(32, 32))
        save_encoder(model, tmp_path / "start", preprocessing=SEEN, lineage={})
    else:
        made(tmp_path / "start", **options)
    with pytest.raises(BadInput, match=sentence):
        pretrain(*recipe(**FROZEN | overrides, model__init_from=tmp_path / "start"))


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vit_nowhere", "timm:vit_nowhere names no model of timm"),
        ("test_vit.nowhere", r"timm:test_vit\.nowhere cannot be had: Invalid pretrained tag"),
    ],
)
def test_public_weights_that_do_not_exist_are_a_sentence(name: str, sentence: str, recipe: Recipe) -> None:
    with pytest.raises(BadInput, match=sentence):
        pretrain(*recipe(**FROZEN, model__init_from=f"timm:{name}"))


@pytest.mark.parametrize("command", ["finetune cpu_minutes_distill", "pretrain feature_distill_cpu_minutes"])
def test_a_students_lineage_and_card_say_where_its_teacher_is_from(
    command: str, public_vit: dict[str, torch.Tensor], recipe: Recipe, tmp_path: Path
) -> None:
    started = {"run__steps": 1, "optim__warmup_steps": 0, "batch__global_size": 8}
    student = command.split()
    if student[0] == "pretrain":
        source, known = "timm:test_vit.r160_in1k", ["apache-2.0"]
    else:  # a folder that says nothing of its licence or its data
        source, known = str(save_teacher(tmp_path / "teacher", class_names=CLASSES)), ["unknown"]
        started["data__shots"] = 3
    small = recipe(**started, method__teacher=source)
    assert CliRunner().invoke(cli.app, [*student, *small], catch_exceptions=False).exit_code == 0
    lineage = json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))
    (teacher,) = lineage["teachers"]
    assert (teacher["source"], lineage["licences"], lineage["parents"]) == (source, known, [])
    card = (tmp_path / "run/encoder/README.md").read_text(encoding="utf-8")
    said = card[card.index("It learned from a teacher") : card.index("Where the weights are from")]
    assert source in said
    assert f"Licence: {known[0]}. Trained on: unknown." in said
    assert ("Find out before you pass this model on" in said) == (known == ["unknown"])
