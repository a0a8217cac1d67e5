"""What a study varies: the section `study` of its recipe, whose other sections are those of `foreseen finetune`."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

from pydantic import Field, model_validator

from foreseen.config import Section, checked, read_recipe
from foreseen.errors import BadInput

Start = Literal["scratch", "pretrained", "hard", "soft"]
TAUGHT: tuple[Start, ...] = ("hard", "soft")
BEST = "best"
_AXES = ("labels", "models", "starts", "augmentations")
_PARTS = ("labels", "model", "start", "augmentation")  # of a cell, in the same order


# Keys of `data` that leave all cells of a seed the same labels, validation and test pictures.
_OF_READING = frozenset({"balance", "repeats", "workers", "fast_decode", "max_bad_fraction", "max_pixels", "max_bytes"})


class Changes(Section):
    """Keys of a fine-tuning recipe that are other for a part of the cells, section by section."""

    run: dict[str, Any] = Field(default_factory=dict)
    data: dict[str, Any] = Field(default_factory=dict)
    model: dict[str, Any] = Field(default_factory=dict)
    method: dict[str, Any] = Field(default_factory=dict)
    views: dict[str, Any] = Field(default_factory=dict)
    optim: dict[str, Any] = Field(default_factory=dict)
    batch: dict[str, Any] = Field(default_factory=dict)
    compute: dict[str, Any] = Field(default_factory=dict)

    def onto(self, raw: dict[str, Any]) -> dict[str, Any]:
        """The recipe with these keys in the place of its own."""
        changed = dict(raw)
        for section in Changes.model_fields:
            changed[section] = {**raw.get(section, {}), **getattr(self, section)}
        return changed


class Labels(Changes):
    """So many labels a class as its name says: "k5", or "all"."""

    seeds: int | None = Field(None, ge=1)
    """How many here; null takes `study.seeds`."""


class Pretrained(Changes):
    """Where a model's pretrained weights are from; the sections change keys of `recipe`."""

    init_from: str | None = None
    """An encoder folder, or `timm:NAME` for public weights."""
    recipe: str | None = None
    """A recipe of `foreseen pretrain`, which the study runs on the unlabelled pictures of `data.split`."""
    features_of: str | None = None
    """Another model of the study, whose pretrained weights are the `method.teacher` of `recipe`."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.init_from is None) == (self.recipe is None):
            raise ValueError(
                f"pretrained.init_from is {self.init_from} and pretrained.recipe {self.recipe}; give one of them"
            )
        if self.features_of is not None and self.recipe is None:
            raise ValueError("pretrained.features_of names the teacher of pretrained.recipe, which is null")
        return self


class Candidate(Changes):
    """A model to be trained."""

    family: str
    """What it is: "ViT" and "CNN" are compared with each other."""
    pretrained: Pretrained | None = None


def shots_of(labels: str) -> int | None:
    """How many labels a class a level's name says; None for all."""
    return None if labels == "all" else int(labels.removeprefix("k"))


def in_words(labels: str) -> str:
    """A level for people."""
    shots = shots_of(labels)
    return "all labels" if shots is None else f"{shots} labels a class" if shots > 1 else "one label a class"


class Without(Section):
    """Cells that are not made: those that agree with all that is named."""

    labels: str | None = None
    model: str | None = None
    start: str | None = None
    augmentation: str | None = None

    def covers(self, labels: str, model: str, start: str, augmentation: str) -> bool:
        """Whether a cell is one of these."""
        pairs = ((self.labels, labels), (self.model, model), (self.start, start), (self.augmentation, augmentation))
        return all(named is None or named == part for named, part in pairs)


class Study(Section, allow_inf_nan=True):  # its own check of the rates says it better
    """Every cell is one of each: labels, models, starts, augmentations. An entry that is null is left out."""

    seeds: int = Field(3, ge=1)
    """Of labels and fine-tuning, from the recipe's seed on; the same for all cells."""
    labels: dict[str, Labels]
    models: dict[str, Candidate]
    starts: dict[Start, Changes]
    """From "scratch"; from "pretrained" weights; from scratch with a teacher, "hard" or "soft"."""
    augmentations: dict[str, Changes]
    rates: tuple[float, ...] = Field((1.0,), min_length=1)
    """Factors of each cell's lr, of which validation chooses one on the first seed."""
    teacher: str = BEST
    """Of "hard" and "soft": the "best" cell of as many labels by validation, that of MODEL/START/AUGMENTATION, or an
    encoder folder."""
    leave_out: tuple[Without, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> Self:
        for axis in _AXES:
            names = getattr(self, axis)
            if not names:
                raise ValueError(f"study.{axis} is empty; name one at least")
            for name in names:
                if not re.fullmatch(r"[A-Za-z0-9_.]+", name) or name.startswith("."):
                    raise ValueError(f"study.{axis} has {name!r}: a name is letters, digits, _ and . only")
            for name, changes in names.items():
                for key in sorted(changes.data.keys() - _OF_READING):
                    raise ValueError(
                        f"study.{axis}.{name}.data.{key} would give cells of one seed other pictures or labels; set "
                        f"data.{key} for all cells"
                    )
                if "dir" in changes.run:
                    raise ValueError(f"study.{axis}.{name}.run.dir: cells have folders below run.dir of the study")
        for name in self.labels:
            if name != "all" and not re.fullmatch(r"k[1-9][0-9]{0,8}", name):
                raise ValueError(f"study.labels has {name!r}: it must be k and a number of labels a class, or all")
        told = {f"{rate:.3g}" for rate in self.rates}  # as in the names of run folders
        if not all(0 < rate < math.inf for rate in self.rates) or len(told) < len(self.rates):
            raise ValueError(f"study.rates must be different factors above 0, got {list(self.rates)}")
        for rule in self.leave_out:
            for axis, name in zip(_AXES, (rule.labels, rule.model, rule.start, rule.augmentation), strict=True):
                known = get_args(Start) if axis == "starts" else getattr(self, axis)
                if name is not None and name not in known:
                    raise ValueError(f"study.leave_out names {name!r}, which is not among study.{axis}")
        before: list[str] = []
        for name, model in self.models.items():
            other = model.pretrained and model.pretrained.features_of
            if other is not None and other not in before:
                raise ValueError(
                    f"study.models.{name}.pretrained.features_of is {other!r}; it must be a model that stands before it"
                )
            before.append(name)
        return self


class _Whole(Section):
    study: Study


def load_study(recipe: str, overrides: Sequence[str]) -> tuple[dict[str, Any], Study]:
    """The fine-tuning recipe that all cells share, not checked yet, and what is varied.

    Args:
        recipe: name of a study, or the path of a YAML.
        overrides: dotted `key=value`.

    Raises:
        BadInput: names the keys that are wrong.
    """
    raw = read_recipe("study", recipe, overrides)
    varied = raw.pop("study", None)
    if not isinstance(varied, dict):
        raise BadInput(f"{recipe} has no section `study`, which says what is compared; see `foreseen recipes`")
    for section in Changes.model_fields:
        raw[section] = {} if raw.get(section) is None else raw[section]
        if not isinstance(raw[section], dict):
            raise BadInput(f"{section} must be a section of keys and values, got {raw[section]!r}")
    return raw, checked(_Whole, {"study": _without_nulls(varied)}).study


def _without_nulls(varied: dict[str, Any]) -> dict[str, Any]:
    """The section without entries that are null, and without rules on them."""
    kept = dict(varied)
    gone = set()
    for axis, part in zip(_AXES, _PARTS, strict=True):
        if isinstance(entries := kept.get(axis), dict):
            kept[axis] = {name: entry for name, entry in entries.items() if entry is not None}
            gone |= {(part, name) for name in entries.keys() - kept[axis].keys()}
    if isinstance(rules := kept.get("leave_out"), list):
        kept["leave_out"] = [rule for rule in rules if not (isinstance(rule, dict) and gone & _named(rule))]
    return kept


def _named(rule: dict[str, Any]) -> set[tuple[str, str]]:
    return {(part, str(name)) for part, name in rule.items()}
