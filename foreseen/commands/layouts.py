"""Layouts of published weights that `foreseen import` knows: how each is recognised, and what is made of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from foreseen.errors import BadInput
from foreseen.handoff.weight_files import WeightFile

Lineage = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """A kind of published weights.

    Attributes:
        what: its files, for a reader.
        licence: terms of the authors' weights; None where files of many authors look so.
        recognise: the files in the order that `write` takes them, if they are of this layout.
        write: makes a folder of them, with a lineage, and says which kind of folder it is.
    """

    what: str
    licence: str | None
    recognise: Callable[[Sequence[WeightFile]], Sequence[WeightFile] | None]
    write: Callable[[Sequence[WeightFile], Path, Lineage], str]


def _dalle(files: Sequence[WeightFile]) -> Sequence[WeightFile] | None:
    if len(files) != 2 or not all("blocks.input.w" in file.tensors for file in files):
        return None
    first, second = files
    shape = first.tensors["blocks.input.w"].shape
    return files if len(shape) == 4 and shape[1] == 3 else (second, first)


def _write_dalle(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.tokenizers.dvae import from_official
    from foreseen.tokenizers.folder import save_tokenizer

    encoder, decoder = (file.state for file in files)
    save_tokenizer(from_official(encoder, decoder), out, lineage=lineage)
    return "tokenizer"


def _vqkd(files: Sequence[WeightFile]) -> Sequence[WeightFile] | None:
    return files if len(files) == 1 and "quantize.embedding.weight" in files[0].tensors else None


def _write_vqkd(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.tokenizers.folder import save_tokenizer
    from foreseen.tokenizers.vqkd_official import official_tokenizer

    save_tokenizer(official_tokenizer(files[0].state), out, lineage=lineage)
    return "tokenizer"


PLAIN_VITS = {
    # Width, depth and patch size in pixels; the number of heads is in no weight.
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (384, 12, 8): "vit_small_patch8_224",
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
_PLAIN = {"cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "blocks.0.attn.qkv.bias"}
_NOT_PLAIN = {"head.weight", "fc_norm.weight", "blocks.0.gamma_1", "blocks.0.ls1.gamma", "reg_token", "dist_token"}


def _plain_vit(files: Sequence[WeightFile]) -> Sequence[WeightFile] | None:
    names = files[0].tensors.keys() if len(files) == 1 else set()
    return files if names >= _PLAIN and not names & _NOT_PLAIN else None


def _write_plain_vit(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD
    from foreseen.handoff.encoder import Preprocessing, save_encoder
    from foreseen.models.backbone import create_backbone
    from foreseen.pretrain.mae import from_official

    official = {n: t.load() for n, t in files[0].tensors.items() if not n.startswith("decoder_") and n != "mask_token"}
    state = {name.removeprefix("vit."): tensor for name, tensor in from_official(official).items()}
    name, size = _plain_architecture(state)
    model = create_backbone(name, img_size=size)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise BadInput(f"{files[0].path} has not the weights of {name}: {error}") from None
    seen = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, "bicubic", 0.875, size)
    save_encoder(model, out, preprocessing=seen, lineage=lineage)
    return "encoder"


def _plain_architecture(state: Mapping[str, Tensor]) -> tuple[str, tuple[int, int]]:
    """timm's name of a plain ViT and its input in pixels."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    name = PLAIN_VITS.get((width, depth, patch))
    if name is None:
        known = ", ".join(f"{w} wide, {d} deep, {p} px" for w, d, p in PLAIN_VITS)
        raise BadInput(f"a ViT {width} wide and {depth} deep with {patch} px patches is none that is known: {known}")
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    return name, (side, side)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "encoder.pkl and decoder.pkl of DALL·E's discrete VAE (openai/DALL-E)", "Modified MIT License",
        _dalle, _write_dalle,
    ),
    Layout("a VQ-KD tokenizer of BEiT v2 (microsoft/unilm, beit2)", "MIT", _vqkd, _write_vqkd),
    Layout(
        "a pretrained plain ViT without a head in the names of timm, such as MAE's (facebookresearch/mae)", None,
        _plain_vit, _write_plain_vit,
    ),
)  # fmt: skip
