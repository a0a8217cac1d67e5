"""`foreseen import`: files as the authors publish them, recognised, and loaded back from the folder that is made."""

import argparse
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands import layouts
from foreseen.errors import BadInput
from foreseen.handoff.encoder import load_encoder
from foreseen.models.backbone import create_backbone
from foreseen.tokenizers.dvae import dalle_from_official
from foreseen.tokenizers.folder import load_tokenizer
from tests.golden_cases import load_case, weights
from tests.trust.payload import Canary


def _import(*paths: object) -> str:
    result = CliRunner().invoke(cli.app, ["import", *map(str, paths)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def dall_e(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package `dall_e` to pickle modules of; gone when they are read, as where it is not installed."""
    package = types.ModuleType("dall_e")
    monkeypatch.setitem(sys.modules, "dall_e", package)

    class Module(nn.Module):
        pass

    Module.__module__, Module.__qualname__ = "dall_e", "Module"
    package.Module = Module  # type: ignore[attr-defined]
    return package


def _pickled(state: dict[str, Tensor], file: Path, package: Any, zipped: bool) -> Path:
    """A whole pickled module with such a state dict, as encoder.pkl and decoder.pkl are."""
    root = package.Module()
    for name, tensor in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, package.Module())
            module = module._modules[parent]
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
    root.device, root.requires_grad = torch.device("cpu"), False  # attributes of theirs
    torch.save(root, file, _use_new_zipfile_serialization=zipped)
    return file


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("first", ["encoder", "decoder"])
def test_dalles_pickles_become_a_tokenizer_with_the_authors_codes(
    zipped: bool, first: str, dall_e: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        name: _pickled(weights(load_case("dalle", name)[1]), tmp_path / f"{name}.pkl", dall_e, zipped)
        for name in ("encoder", "decoder")
    }
    monkeypatch.delitem(sys.modules, "dall_e")
    second = "decoder" if first == "encoder" else "encoder"
    assert "tokenizer: " in _import(files[first], files[second], tmp_path / "out")
    found = load_tokenizer(tmp_path / "out")
    _, tensors = load_case("dalle", "encoder")
    images = found.tokenizer.normalised(tensors["in/images_01"])
    assert torch.equal(found.tokenizer.encode(images), tensors["out/indices"])
    case, tensors = load_case("dalle", "decoder")
    torch.testing.assert_close(
        found.tokenizer.decode(tensors["in/indices"]), tensors["out/reconstruction"], **case["tolerance"]
    )
    assert found.lineage["licences"] == ["Modified MIT License"]
    assert [file["name"] for file in found.lineage["files"]] == ["encoder.pkl", "decoder.pkl"]
    assert found.tokenizer.interpolation == "lanczos"
    assert found.tokenizer.grid((112, 112)) == (14, 14)
    own = dalle_from_official(files["encoder"], files["decoder"])
    assert torch.equal(own.encode(images), found.tokenizer.encode(images))


def test_a_payload_in_the_place_of_dalles_files_does_not_run(tmp_path: Path) -> None:
    canary = Canary(tmp_path)
    for name in ("encoder.pkl", "decoder.pkl"):
        (tmp_path / name).write_bytes(canary.checkpoint)
    torch.load(tmp_path / "encoder.pkl", weights_only=False)
    assert canary.sang
    with pytest.raises(BadInput, match="has 0 tensors, none"):
        _import(tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", tmp_path / "out")
    assert not canary.sang
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_maes_checkpoint_becomes_an_encoder_that_timm_loads(kind: str, tmp_path: Path) -> None:
    model: Any = create_backbone("vit_tiny_patch16_224", img_size=(32, 32)).eval()
    official = {**model.state_dict(), "mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    file = tmp_path / f"mae.{kind}"
    if kind == "pth":  # with what torch.load(weights_only=True) refuses
        torch.save({"model": official, "args": argparse.Namespace(lr=1), "epoch": 3}, file)
    else:
        save_file(official, file)
    assert "encoder: " in _import(file, tmp_path / "out")
    images = torch.randn(2, 3, 32, 32)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(loaded(images), model(images))
    found = load_encoder(tmp_path / "out")
    assert found.preprocessing.size == (32, 32)
    assert found.lineage["files"][0]["name"] == file.name


@pytest.fixture
def small_beits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the golden files' BEiTs, 48 wide, be known."""
    monkeypatch.setitem(layouts.BEITS, (48, 2, 8), "beit_base_patch16_224")

    def build(name: str, *, args: Any, img_size: tuple[int, int], num_classes: int, pool: Any) -> nn.Module:
        small = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
        return create_backbone(name, img_size=img_size, num_classes=num_classes, pool=pool, args={**args, **small})

    monkeypatch.setattr("foreseen.models.backbone.create_backbone", build)


@pytest.mark.usefixtures("small_beits")
@pytest.mark.parametrize("case", ["pretrain_shared_rel_pos", "pretrain_layer_rel_pos_abs"])
def test_a_pretrained_beit_becomes_an_encoder(case: str, tmp_path: Path) -> None:
    official = weights(load_case("beit", case)[1])
    torch.save({"model": official, "args": argparse.Namespace(lr=1)}, tmp_path / "beit.pth")
    assert "a pretrained BEiT" in _import(tmp_path / "beit.pth", tmp_path / "out")
    found = load_encoder(tmp_path / "out")
    assert found.preprocessing.mean == (0.5, 0.5, 0.5)
    assert found.preprocessing.size == (32, 32)
    left_out = {"mask_token", "lm_head.weight", "lm_head.bias"}
    assert found.state.keys() == {name for name in official if "index" not in name} - left_out
    assert all(torch.equal(tensor, official[name]) for name, tensor in found.state.items())


@pytest.mark.usefixtures("small_beits")
@pytest.mark.parametrize("pooling", ["true", "false"])
def test_a_finetuned_beit_becomes_an_encoder_with_its_head(pooling: str, tmp_path: Path) -> None:
    case, tensors = load_case("beit", f"finetune_mean_pooling_{pooling}")
    torch.save({"model": weights(tensors)}, tmp_path / "beit.pth")
    assert "a fine-tuned BEiT" in _import(tmp_path / "beit.pth", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    torch.testing.assert_close(model(tensors["in/images"]), tensors["out/logits"], **case["tolerance"])


@pytest.mark.usefixtures("small_beits")
def test_a_finetuned_beit_is_normalised_as_the_version_that_its_file_is_named_after(tmp_path: Path) -> None:
    official = weights(load_case("beit", "finetune_mean_pooling_true")[1])
    means = {"beit_base_ft1k.pth": (0.5, 0.5, 0.5), "beitv2_base_ft1k.pth": (0.485, 0.456, 0.406)}
    for name, mean in means.items():
        torch.save({"model": official}, tmp_path / name)
        _import(tmp_path / name, tmp_path / "out")
        assert load_encoder(tmp_path / "out").preprocessing.mean == mean


def _vqkd_names(**more: Tensor) -> dict[str, Tensor]:
    names = {"quantize.embedding.weight": torch.zeros(4, 2), "encode_task_layer.0.weight": torch.zeros(4, 4)}
    return {**names, **{name.replace("__", "."): value for name, value in more.items()}}


_NAMES_OF_DALLE = ("blocks.input.w", "blocks.input.b", "blocks.output.conv.w", "blocks.output.conv.b")
HOSTILE: list[tuple[list[dict[str, Tensor]], str]] = [
    ([_vqkd_names(encoder__patch_embed__proj__weight=torch.zeros(3))], "no weights of an official VQ-KD"),
    ([_vqkd_names(encoder__blocks__0__attn__q_bias=torch.zeros(4))], r"v_bias is missing beside"),
    (
        [_vqkd_names(encoder__patch_embed__proj__weight=torch.zeros(16_384, 3, 1, 1),
                     encoder__pos_embed=torch.zeros(1, 5, 1))],
        "ask for other weights than it has",
    ),
    ([{name: torch.zeros(8_192, 3, 1, 1) for name in _NAMES_OF_DALLE}] * 2, "no weights of DALL·E's"),
    ([{"cls_token": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(2, 2), "blocks.0.attn.qkv.weight":
       torch.zeros(2), "pos_embed": torch.zeros(1), "norm.weight": torch.zeros(1), "blocks.0.attn.qkv.bias":
       torch.zeros(1)}], "have the names of a pretrained plain ViT.*but are none"),
    ([{"cls_token": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(2, 2), "blocks.0.attn.qkv.weight":
       torch.zeros(2), "head.weight": torch.zeros(1), "blocks.0.attn.q_bias": torch.zeros(1)}], "fine-tuned BEiT"),
]  # fmt: skip


@pytest.mark.parametrize(("states", "sentence"), HOSTILE)
def test_names_of_a_layout_with_tensors_of_none_are_a_sentence_and_take_no_memory(
    states: list[dict[str, Tensor]], sentence: str, tmp_path: Path
) -> None:
    for number, state in enumerate(states):
        torch.save(state, tmp_path / f"{number}.pth")
    with pytest.raises(BadInput, match=sentence):
        _import(*(tmp_path / f"{number}.pth" for number in range(len(states))), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_vqkd_checkpoint_becomes_a_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreseen.tokenizers.vqkd_official._HEAD_DIM", 16)
    _, tensors = load_case("beit2", "vqkd")
    torch.save({"model": weights(tensors), "args": argparse.Namespace(lr=1)}, tmp_path / "vqkd.pth")
    assert "tokenizer: " in _import(tmp_path / "vqkd.pth", tmp_path / "out")
    read = load_tokenizer(tmp_path / "out").tokenizer
    assert torch.equal(read.encode(read.normalised(tensors["in/images_01"])).flatten(1), tensors["out/tokens"])


def test_what_is_not_known_is_said_with_what_is(tmp_path: Path) -> None:
    torch.save({"model": {f"layer{i}.weight": torch.zeros(1) for i in range(9)}}, tmp_path / "resnet.pth")
    with pytest.raises(BadInput) as caught:
        _import(tmp_path / "resnet.pth", tmp_path / "out")
    assert "has 9 tensors, layer0.weight, layer1.weight, layer2.weight, layer3.weight ..." in str(caught.value)
    for layout in layouts.LAYOUTS:
        assert layout.what in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_vit_of_an_unknown_size_and_weights_left_over_are_refused(tmp_path: Path) -> None:
    state = create_backbone("vit_tiny_patch16_224", img_size=(32, 32)).state_dict()
    torch.save({**state, "blocks.0.extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(BadInput, match=r"(?s)has not the weights of vit_tiny_patch16_224.*blocks\.0\.extra"):
        _import(tmp_path / "more.pth", tmp_path / "out")
    torch.save({name: t for name, t in state.items() if "blocks.7" not in name}, tmp_path / "less.pth")
    with pytest.raises(BadInput, match="a ViT 192 wide and 11 deep with patches of 16 px is none that is known"):
        _import(tmp_path / "less.pth", tmp_path / "out")


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["out"], "give the files of weights and, last, the folder"),
        (["missing.pth", "out"], "missing.pth is no file"),
        (["text.safetensors", "out"], "cannot be read as safetensors"),
        (["text.pth", "out"], r"cannot be read as a file of torch\.save"),
    ],
)
def test_files_that_are_none_are_a_sentence(names: list[str], sentence: str, tmp_path: Path) -> None:
    for name in ("text.safetensors", "text.pth"):
        (tmp_path / name).write_text("<html>not found</html>", encoding="utf-8")
    with pytest.raises(BadInput, match=sentence):
        _import(*(tmp_path / name for name in names))


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    torch.save(create_backbone("vit_tiny_patch16_224", img_size=(32, 32)).state_dict(), tmp_path / "vit.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(BadInput, match="is no encoder folder"):
        _import(tmp_path / "vit.pth", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]
