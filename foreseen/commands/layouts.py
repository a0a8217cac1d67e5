"""Layouts of published weights that `foreseen import` knows: how each is recognised, and what is made of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from foreseen.errors import BadInput
from foreseen.handoff.weight_files import WeightFile

if TYPE_CHECKING:
    from foreseen.models.backbone import Pool

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
    names = files[0].tensors.keys() if len(files) == 1 else set()
    return files if names >= {"quantize.embedding.weight", "encode_task_layer.0.weight"} else None


def _write_vqkd(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.tokenizers.folder import save_tokenizer
    from foreseen.tokenizers.vqkd_official import official_tokenizer

    save_tokenizer(official_tokenizer(files[0].state), out, lineage=lineage)
    return "tokenizer"


# Width, depth and patch size in pixels of each architecture of timm; the number of heads is in no weight.
BEITS = {(768, 12, 16): "beit_base_patch16_224", (1024, 24, 16): "beit_large_patch16_224"}
PLAIN_VITS = {
    (192, 12, 16): "vit_tiny_patch16_224",
    (384, 12, 16): "vit_small_patch16_224",
    (384, 12, 8): "vit_small_patch8_224",
    (768, 12, 16): "vit_base_patch16_224",
    (768, 12, 8): "vit_base_patch8_224",
    (1024, 24, 16): "vit_large_patch16_224",
    (1280, 32, 14): "vit_huge_patch14_224",
}
_ANY_VIT = {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def _pretrained_beit(files: Sequence[WeightFile]) -> Sequence[WeightFile] | None:
    names = files[0].tensors.keys() if len(files) == 1 else set()
    return files if names >= _ANY_VIT | {"mask_token", "lm_head.weight", "norm.weight"} else None


def _write_pretrained_beit(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.pretrain.beit_official import from_official

    renamed = from_official(files[0].state)
    state = {name.removeprefix("vit."): tensor for name, tensor in renamed.items() if name.startswith("vit.")}
    is_v2 = any(name.startswith("cls_pt_layers.") for name in files[0].tensors)
    _write_beit(files[0], state, out, lineage, is_v2=is_v2, pool=None)
    return "encoder"


def _finetuned_beit(files: Sequence[WeightFile]) -> Sequence[WeightFile] | None:
    names = files[0].tensors.keys() if len(files) == 1 else set()
    return files if names >= _ANY_VIT | {"head.weight", "blocks.0.attn.q_bias"} else None


def _write_finetuned_beit(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.handoff.official_beit import beit_finetuned_from_official

    state = beit_finetuned_from_official(files[0].state)
    # No weight tells the versions apart, and they are normalised differently; the authors' names of files do.
    is_v2 = "beitv2" in files[0].path.name.lower()
    _write_beit(files[0], state, out, lineage, is_v2=is_v2, pool="mean" if "fc_norm.weight" in state else "token")
    return "encoder"


def _write_beit(
    file: WeightFile, state: Mapping[str, Tensor], out: Path, lineage: Lineage, *, is_v2: bool, pool: "Pool | None"
) -> None:  # fmt: skip
    shared, own = _SHARED_TABLE, "blocks.0.attn.relative_position_bias_table"
    name = _architecture(state, BEITS)
    args = {
        "use_rel_pos_bias": own in state, "use_shared_rel_pos_bias": shared in state,
        "use_abs_pos_emb": "pos_embed" in state, "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
    }  # fmt: skip
    if shared in state or own in state:
        side = (round((state[shared if shared in state else own].shape[0] - 3) ** 0.5) + 1) // 2
    else:
        side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    size = side * state["patch_embed.proj.weight"].shape[-1]
    classes = len(state["head.bias"]) if "head.bias" in state else 0
    # What timm knows of the authors' files: v1 is normalised by halves, v2 as is usual.
    half = None if is_v2 else (0.5, 0.5, 0.5)
    _write_encoder(file, state, out, lineage, name, size, args=args, classes=classes, pool=pool, mean=half, std=half)


_PLAIN = _ANY_VIT | {"pos_embed", "norm.weight", "blocks.0.attn.qkv.bias"}
_NOT_PLAIN = {"head.weight", "fc_norm.weight", "blocks.0.gamma_1", "blocks.0.ls1.gamma", "reg_token", "dist_token"}


def _plain_vit(files: Sequence[WeightFile]) -> Sequence[WeightFile] | None:
    names = files[0].tensors.keys() if len(files) == 1 else set()
    return files if names >= _PLAIN and not names & _NOT_PLAIN else None


def _write_plain_vit(files: Sequence[WeightFile], out: Path, lineage: Lineage) -> str:
    from foreseen.pretrain.mae import from_official

    official = {n: t.load() for n, t in files[0].tensors.items() if not n.startswith("decoder_") and n != "mask_token"}
    state = {name.removeprefix("vit."): tensor for name, tensor in from_official(official).items()}
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    size = side * state["patch_embed.proj.weight"].shape[-1]
    _write_encoder(files[0], state, out, lineage, _architecture(state, PLAIN_VITS), size)
    return "encoder"


def _architecture(state: Mapping[str, Tensor], known: Mapping[tuple[int, int, int], str]) -> str:
    """timm's name of a ViT."""
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    name = known.get((width, depth, patch))
    if name is None:
        sizes = "; ".join(f"{w} wide, {d} deep, {p} px" for w, d, p in known)
        raise BadInput(f"a ViT {width} wide and {depth} deep with patches of {patch} px is none that is known: {sizes}")
    return name


def _write_encoder(
    file: WeightFile, state: Mapping[str, Tensor], out: Path, lineage: Lineage, name: str, size: int, *,
    args: Mapping[str, Any] | None = None, classes: int = 0, pool: "Pool | None" = None,
    mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None,
) -> None:  # fmt: skip
    """Write an encoder folder; every weight must have its place, and every place its weight."""
    from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD
    from foreseen.handoff.encoder import Preprocessing, save_encoder
    from foreseen.models.backbone import create_backbone

    model = create_backbone(name, img_size=(size, size), num_classes=classes, pool=pool, args=args)
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise BadInput(f"{file.path} has not the weights of {name}: {error}") from None
    seen = Preprocessing(mean or IMAGENET_MEAN, std or IMAGENET_STD, "bicubic", 0.875, (size, size))
    save_encoder(model, out, preprocessing=seen, lineage=lineage)


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "encoder.pkl and decoder.pkl of DALL·E's discrete VAE (openai/DALL-E)", "Modified MIT License",
        _dalle, _write_dalle,
    ),
    Layout("a VQ-KD tokenizer of BEiT v2 (microsoft/unilm, beit2)", "MIT", _vqkd, _write_vqkd),
    Layout("a pretrained BEiT or BEiT v2 (microsoft/unilm)", "MIT", _pretrained_beit, _write_pretrained_beit),
    Layout("a fine-tuned BEiT or BEiT v2 (microsoft/unilm)", "MIT", _finetuned_beit, _write_finetuned_beit),
    Layout(
        "a pretrained plain ViT without a head in the names of timm, such as MAE's (facebookresearch/mae)", None,
        _plain_vit, _write_plain_vit,
    ),
)  # fmt: skip
