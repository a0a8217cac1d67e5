"""The encoder folder: what every stage hands on, and what the next one begins from.

`timm.create_model("local-dir:FOLDER", pretrained=True)` loads it without this package. It holds

config.json         architecture, its arguments and the preprocessing, in timm's words
model.safetensors   the weights, by timm's names, in float32
lineage.json        where the weights are from: parents, data, seed, step, versions
README.md           a short model card

A folder is written beside its place, loaded back and compared, and only then put there.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import is_model, split_model_name_tag
from torch import Tensor, nn

from foreseen import config
from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD, View
from foreseen.errors import BadInput
from foreseen.files import read_json, sha256_of
from foreseen.handoff.card import keep_sections
from foreseen.handoff.publish import float32_state, published
from foreseen.handoff.terms import describe_teacher
from foreseen.models.backbone import FACTORY, Pool, architecture_of, create_backbone
from foreseen.models.initialise import Initialised, initialise

PUBLIC = "timm:"
_SET_ELSEWHERE = ("img_size", "global_pool", "fc_norm", "use_fc_norm", "num_classes")


@dataclass(frozen=True)
class Preprocessing:
    """What an encoder wants done to an image.

    Attributes:
        mean, std: per channel, for pixels in [0, 1].
        interpolation: "bicubic" or "bilinear".
        crop_fraction: share of the resized image's side that the centre crop keeps.
        size: (H, W) in pixels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop_fraction: float
    size: tuple[int, int]

    @classmethod
    def of_view(cls, view: View) -> "Preprocessing":
        """That of an evaluation view."""
        return cls(view.mean, view.std, view.interpolation, view.centre_fraction, view.size)

    def view(self) -> View:
        """The view, named "image", that shows the encoder what it wants: the middle of each image.

        Raises:
            BadInput: it wants an interpolation that no view has.
        """
        if self.interpolation not in ("bicubic", "bilinear"):
            raise BadInput(
                f"the encoder wants {self.interpolation} interpolation; there are bicubic and bilinear: change "
                "pretrained_cfg.interpolation in its config.json"
            )
        return View(
            name="image", size=self.size, crop="centre", flip=0.0, centre_fraction=self.crop_fraction,
            interpolation="bicubic" if self.interpolation == "bicubic" else "bilinear", mean=self.mean, std=self.std,
        )  # fmt: skip


@dataclass(frozen=True)
class EncoderFolder:
    """An encoder as read, not yet a model.

    Attributes:
        source: the folder, or `timm:NAME`.
        architecture: timm's name.
        model_args: keyword arguments that build it.
        num_classes: of its head; 0 for none.
        class_names: of its head, where they are known.
        state: its weights.
        preprocessing: what it wants done to images.
        licence: terms of public weights, where they say them; those of a run's own are in its lineage.
        weights: sha256 of `model.safetensors`; None for public weights.
        lineage: where it is from; empty for public weights and folders that others made.
    """

    source: str
    architecture: str
    model_args: dict[str, Any]
    num_classes: int
    state: dict[str, Tensor]
    preprocessing: Preprocessing
    licence: str | None
    weights: str | None
    lineage: dict[str, Any]
    class_names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Encoder:
    """A backbone ready to be trained.

    Attributes:
        model: the timm model.
        preprocessing: that of the encoder it begins from, at the size asked for; ImageNet's if it begins from nothing.
        initialised: what of `init_from` was not used; None without `init_from`.
    """

    model: nn.Module
    preprocessing: Preprocessing
    initialised: Initialised | None


def create_encoder(
    model: config.Model,
    *,
    img_size: tuple[int, int],
    num_classes: int = 0,
    pool: Pool | None = None,
    any_size: bool = False,
) -> Encoder:
    """Build the backbone that a config's `model` section asks for, with the weights of its `init_from`.

    Args:
        model: the section.
        img_size: (H, W) in pixels.
        num_classes: outputs of the head; 0 for none.
        pool, any_size: see `create_backbone`.

    Raises:
        BadInput: it cannot be built, or the weights do not fit.
    """
    begin = None if model.init_from is None else load_encoder(model.init_from)
    if begin is not None and model.name is None:
        model = model.model_copy(update={"name": begin.architecture, "args": own_args(begin) | model.args})
    assert model.name is not None, "the config lets no model without both name and init_from pass"
    backbone = create_backbone(
        model.name,
        img_size=img_size,
        num_classes=num_classes,
        pool=pool,
        drop_path_rate=model.drop_path_rate,
        drop_path_uniform=model.drop_path_uniform,
        any_size=any_size,
        args=model.args,
    )
    marked: Any = backbone
    marked.foreseen_parent = begin and describe_parent(begin)
    if begin is None:
        return Encoder(backbone, Preprocessing(IMAGENET_MEAN, IMAGENET_STD, "bicubic", 0.875, img_size), None)
    done = initialise(backbone, begin.state, img_size=begin.preprocessing.size, source=begin.source)
    kept = begin.preprocessing
    return Encoder(backbone, Preprocessing(kept.mean, kept.std, kept.interpolation, kept.crop_fraction, img_size), done)


def parents_of(model: nn.Module) -> list[dict[str, Any]]:
    """What a backbone of `create_encoder` began from: none, or one parent with its own lineage, as it was then."""
    parent = getattr(model, "foreseen_parent", None)
    return [] if parent is None else [parent]


def describe_parent(encoder: EncoderFolder) -> dict[str, Any]:
    """What the lineage of later weights says of an encoder that they come from."""
    return {
        "source": encoder.source,
        "architecture": encoder.architecture,
        "weights_sha256": encoder.weights,
        "licence": encoder.licence,
        "lineage": encoder.lineage,
    }


def own_args(encoder: EncoderFolder) -> dict[str, Any]:
    """The keyword arguments that build an encoder's architecture, without those that other keys of a config set."""
    return {key: value for key, value in encoder.model_args.items() if key not in _SET_ELSEWHERE}


def load_encoder(init_from: str | Path) -> EncoderFolder:
    """Read an encoder folder, or public weights by explicit wish.

    Args:
        init_from: the folder, or `timm:NAME`, which may download.

    Raises:
        BadInput: it is no encoder folder, or there are no such weights.
    """
    if str(init_from).startswith(PUBLIC):
        return _load_public(str(init_from).removeprefix(PUBLIC))
    folder = Path(init_from)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        inner = f"; did you mean {folder / 'encoder'}?" if (folder / "encoder" / "config.json").is_file() else ""
        raise BadInput(f"{folder} is no encoder folder: config.json or model.safetensors is missing{inner}")
    try:
        described = read_json(folder / "config.json")
        _check_described(described)
        weights = sha256_of(folder / "model.safetensors")
        return EncoderFolder(
            source=str(folder),
            architecture=described["architecture"],
            model_args=described.get("model_args", {}),
            num_classes=described["num_classes"],
            state=load_file(folder / "model.safetensors"),
            preprocessing=_preprocessing(described["pretrained_cfg"]),
            licence=_licence(described["pretrained_cfg"]),
            weights=weights,
            lineage=_read_lineage(folder / "lineage.json"),
            class_names=_class_names(described),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError, SafetensorError) as error:
        what = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}"
        raise BadInput(f"the encoder folder {folder} cannot be read: {what}") from error


def _check_described(described: Mapping[str, Any]) -> None:
    """Refuse a config.json that asks timm for more than a model of its own and the weights beside it.

    Raises:
        BadInput: the architecture is no name of timm's, or an argument is its factory's, which loads from elsewhere.
    """
    architecture = described["architecture"]
    if not isinstance(architecture, str) or any(mark in architecture for mark in ":/\\") or not is_model(architecture):
        raise BadInput(f"its config.json names the architecture {architecture!r}, which is no model of timm")
    if taken := sorted(FACTORY & described.get("model_args", {}).keys()):
        raise BadInput(f"its config.json has model_args.{taken[0]}, which is no argument of a model")


def _class_names(described: Mapping[str, Any]) -> tuple[str, ...] | None:
    names = described.get("label_names")
    if names is None:
        return None
    if not isinstance(names, list) or len(names) != described["num_classes"]:
        raise ValueError("label_names is no list of as many names as num_classes says")
    return tuple(map(str, names))


def _read_lineage(file: Path) -> dict[str, Any]:
    found = read_json(file) if file.is_file() else {}
    if not isinstance(found, dict):
        raise ValueError("lineage.json holds no object")
    return found


def _load_public(name: str) -> EncoderFolder:
    if ":" in name or "/" in name or not is_model(name):
        raise BadInput(f"model.init_from {PUBLIC}{name} names no model of timm")
    try:
        with torch.random.fork_rng(devices=[]):
            model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm's own, the hub's, and those of the network behind it
        raise BadInput(f"the weights of model.init_from {PUBLIC}{name} cannot be had: {error}") from error
    architecture, cfg = split_model_name_tag(name)[0], model.pretrained_cfg
    return EncoderFolder(
        source=f"{PUBLIC}{architecture}.{cfg['tag']}" if cfg.get("tag") else f"{PUBLIC}{name}",
        architecture=architecture,
        model_args={},
        num_classes=model.num_classes,
        state=model.state_dict(),
        preprocessing=_preprocessing(cfg),
        licence=_licence(cfg),
        weights=None,
        lineage={},
    )


def _licence(cfg: Mapping[str, Any]) -> str | None:
    terms = cfg.get("license")
    return ", ".join(map(str, terms)) if isinstance(terms, list) else terms and str(terms)


def _preprocessing(cfg: Mapping[str, Any]) -> Preprocessing:
    _, height, width = cfg["input_size"]
    return Preprocessing(tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"], cfg["crop_pct"], (height, width))


def save_encoder(
    model: nn.Module, folder: Path, *, preprocessing: Preprocessing, lineage: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Write an encoder folder, in the place of an older one.

    Args:
        model: a backbone of `create_backbone`, on any device; left as it is.
        folder: where to.
        preprocessing: what the encoder wants done to images.
        lineage: where the weights are from; plain values.
        class_names: of the outputs of its head, where it has one and they are known.

    Raises:
        BadInput: `folder` holds something else.
        RuntimeError: timm makes another model of what was written; the older folder is still there.
    """
    with published(folder, "encoder folder") as new:
        _write(model, new, folder.name, preprocessing, lineage, class_names)
        _verify(model, new, preprocessing.size)
        if folder.exists():
            keep_sections(folder, new)


def _write(
    model: nn.Module, folder: Path, name: str, preprocessing: Preprocessing, lineage: Mapping[str, Any],
    class_names: Sequence[str] | None,
) -> None:  # fmt: skip
    described = _config(model, preprocessing)
    if class_names is not None:
        described["label_names"] = list(class_names)
    save_file(float32_state(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n")
    (folder / "README.md").write_text(_card(name, described, lineage))


def _config(model: nn.Module, preprocessing: Preprocessing) -> dict[str, Any]:
    described: Any = model
    architecture, model_args = architecture_of(model)
    return {
        "architecture": architecture,
        "num_classes": described.num_classes,
        "num_features": described.num_features,
        "global_pool": model_args.get("global_pool", described.pretrained_cfg.get("global_pool")),
        "model_args": model_args,
        "pretrained_cfg": {
            "input_size": [3, *preprocessing.size],
            "fixed_input_size": bool(described.pretrained_cfg.get("fixed_input_size", False)),
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_fraction,
            "num_classes": described.num_classes,
            "first_conv": described.pretrained_cfg.get("first_conv"),
            "classifier": described.pretrained_cfg.get("classifier"),
        },
    }


def _card(name: str, described: Mapping[str, Any], lineage: Mapping[str, Any]) -> str:
    height, width = described["pretrained_cfg"]["input_size"][1:]
    teachers = "".join(f"\nIt learned from a teacher: {describe_teacher(t)}\n" for t in lineage.get("teachers") or [])
    return f"""---
library_name: timm
tags: [image-feature-extraction, timm, foreseen]
---
# {described["architecture"]}, {height}×{width} px

Trained with foreseen. With timm alone:

```python
import timm

model = timm.create_model("local-dir:{name}", pretrained=True)  # num_classes=N gives it a new head
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
{teachers}
Where the weights are from (`lineage.json`):

```json
{json.dumps(lineage, indent=2)}
```
"""


def _verify(model: nn.Module, folder: Path, size: tuple[int, int]) -> None:
    # Sines rather than random numbers: saving must not move the generator of the run.
    images = torch.arange(2 * 3 * size[0] * size[1], dtype=torch.float32).mul(0.7).sin().view(2, 3, *size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        original = copy.deepcopy(model).to("cpu", torch.float32).eval()
        ours = dict(original.named_modules())
        for name, theirs in loaded.named_modules():  # by name: a drop path may be a module in one of them alone
            if hasattr(theirs, "fused_attn"):  # the engine may have chosen another kernel, which rounds otherwise
                ours[name].fused_attn = theirs.fused_attn
        if not torch.equal(loaded(images), original(images)):
            raise RuntimeError(f"timm makes another model of the encoder written to {folder}; it is thrown away")
