"""The fits of a study: which cells there are, which cannot be, and the config of each run.

A cell is a number of labels, a model, where it starts from, and an augmentation. Its runs are ordinary fine-tuning runs
in folders of their own: `DIR/k5/vit-scratch-deit-lr-0.001/seed-0`. All cells of a seed have the same labels. A teacher
of the study's own is, for each seed, the run of that very seed at as many labels, so it knows no label that its student
does not have.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from foreseen.commands.controls import Arm, validation_of
from foreseen.commands.study_leaks import leak_of
from foreseen.commands.study_options import BEST, TAUGHT, Pretrained, Study, in_words, shots_of
from foreseen.commands.verbs import method_options
from foreseen.config import Config, read_recipe, resolve
from foreseen.errors import BadInput

if TYPE_CHECKING:
    from foreseen.data.shards import ShardSet
    from foreseen.handoff.encoder import EncoderFolder

    Weights = tuple[EncoderFolder, ...] | str  # networks from elsewhere that a model's weights are made of; or why none

_OF_LABELS = ("shots", "subset_seed", "balance", "repeats")  # keys of `data` that pretraining has no use for


class Key(NamedTuple):
    """Which cell: the names of its parts."""

    labels: str
    model: str
    start: str
    augmentation: str

    @property
    def name(self) -> str:
        """Of its folder, and in `study.teacher` with slashes."""
        return "-".join(self[1:])

    def __str__(self) -> str:
        return f"{self.model}, {self.start}, {self.augmentation}"


@dataclass(frozen=True)
class Fit(Arm):
    """A cell at one learning rate; taught, by the run of the same seed of another cell, or by a folder's weights."""

    teacher: "Arm | str | None" = None

    def seeded(self, seed: int) -> Config:
        """The run of one seed, which also draws the labels."""
        config = super().seeded(seed)
        if not isinstance(self.teacher, Arm):
            return config
        folder = self.teacher.seeded(seed).run.dir / "encoder"
        return config.model_copy(update={"method": config.method.model_copy(update={"teacher": str(folder)})})


@dataclass(frozen=True)
class Cell:
    """A cell whose teacher, if it has one, is known.

    Attributes:
        family: of its model.
        rates: it at each learning rate.
        seeds: the first one chooses the rate.
        taught_by: whom it learns from, in words.
    """

    key: Key
    family: str
    rates: tuple[Fit, ...]
    seeds: tuple[int, ...]
    taught_by: str | None = None

    def tuning(self) -> list[Config]:
        """The runs that the rate is chosen by."""
        return [fit.seeded(self.seeds[0]) for fit in self.rates]

    def chosen(self) -> Fit:
        """It at the rate that validation prefers on the first seed."""
        if len(self.rates) == 1:
            return self.rates[0]
        return max(self.rates, key=lambda fit: validation_of(fit.seeded(self.seeds[0])))

    def others(self) -> list[Config]:
        """The runs of the other seeds, once the rate is chosen."""
        fit = self.chosen()
        return [fit.seeded(seed) for seed in self.seeds[1:]]


@dataclass
class Plan:
    """All of a study.

    Attributes:
        raw: the recipe that the cells share, as nested dicts.
        study: what is varied.
        folder: of the study.
        keys: the cells that are made, level by level of labels.
        left_out: cells that cannot be made, with the reason.
        samples: how many training labels each level has.
        pretraining: the runs that make weights, by model.
    """

    raw: dict[str, Any]
    study: Study
    folder: Path
    first_seed: int
    keys: list[Key] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    samples: dict[str, int] = field(default_factory=dict)
    pretraining: dict[str, Config] = field(default_factory=dict)

    def held_out(self, labels: str) -> float:
        """The share of each class that validation has at a level."""
        return self._config(Key(labels, *_first(self)), None).data.validation_fraction

    def leave_out(self, what: str, why: str) -> None:
        """Note what cannot be made, once."""
        if (what, why) not in self.left_out:
            self.left_out.append((what, why))

    def seeds(self, labels: str) -> tuple[int, ...]:
        """Those of a level."""
        count = self.study.labels[labels].seeds or self.study.seeds
        return tuple(range(self.first_seed, self.first_seed + count))

    def level(self, labels: str, *, taught: bool) -> list[Key]:
        """The cells of a level that have a teacher, or those that have none."""
        return [key for key in self.keys if key.labels == labels and (key.start in TAUGHT) == taught]

    def cell(self, key: Key, teacher: Cell | None = None) -> Cell:
        """A cell, with its runs' configs checked.

        Args:
            key: which.
            teacher: whom it learns from; None for the folder that the study names, or for no teacher.

        Raises:
            BadInput: its config is wrong.
        """
        taught_by, source, suffix = None, None, ""
        if key.start in TAUGHT:
            source = self.study.teacher if teacher is None else teacher.chosen()
            taught_by = self.study.teacher if teacher is None else str(teacher.key)
            suffix = f"-from-{source.name}" if isinstance(source, Arm) else ""
        fits = []
        for factor in self.study.rates:
            config = self._config(key, source)
            rate = config.optim.base_lr * factor
            name = f"{key.name}{suffix}-lr-{rate:.3g}"
            run = config.run.model_copy(update={"dir": self.folder / key.labels / name})
            optim = config.optim.model_copy(update={"base_lr": rate})
            title = f"{key}, lr {rate:.3g}"
            fits.append(Fit(name, title, config.model_copy(update={"run": run, "optim": optim}), source))
        family = self.study.models[key.model].family
        return Cell(key, family, tuple(fits), self.seeds(key.labels), taught_by)

    def steps(self, key: Key) -> int:
        """Updates of one of its runs."""
        config = self._config(key, "not known yet" if key.start in TAUGHT else None)
        return config.with_length(self.samples[key.labels]).run.steps or 0

    def fits(self, key: Key) -> int:
        """How many runs it takes."""
        return len(self.study.rates) + len(self.seeds(key.labels)) - 1

    def encoder_of(self, model: str) -> str | None:
        """Where a model's pretrained weights are, or will be."""
        pretrained = self.study.models[model].pretrained
        if pretrained is None:
            return None
        return pretrained.init_from or str(self.folder / "pretrain" / model / "encoder")

    def _config(self, key: Key, teacher: Arm | str | None) -> Config:
        study = self.study
        raw = dict(self.raw)
        model, start = study.models[key.model], study.starts[key.start]  # type: ignore[index]
        for changes in (study.labels[key.labels], model, start, study.augmentations[key.augmentation]):
            raw = changes.onto(raw)
        raw["data"] |= {"shots": shots_of(key.labels)}
        # A rate that diverges is a score here; it must not end the study.
        raw["run"] |= {"dir": str(self.folder), "rewind_after": None}
        raw["model"] |= {"init_from": self.encoder_of(key.model) if key.start == "pretrained" else None}
        if key.start in TAUGHT:
            source = teacher if isinstance(teacher, str) else "that of each seed"
            raw["method"] |= {"name": "distill", "distillation": key.start, "teacher": source}
        try:
            return resolve(raw, method_options("finetune"))
        except BadInput as error:
            raise BadInput(f"the cell {key} with {in_words(key.labels)}: {error}") from None


def make_plan(raw: dict[str, Any], study: Study) -> Plan:
    """Lay out a study, and find out what cannot be.

    Args:
        raw: the recipe that the cells share.
        study: what is varied.

    Raises:
        BadInput: the recipe is wrong, the data has no labels to train on or to test by, or nothing is left to do.
    """
    folder, seed = raw["run"].get("dir"), raw.get("seed", 0)
    if not isinstance(folder, str) or not isinstance(seed, int):
        raise BadInput(f"a study needs a run.dir and a whole number as seed, got {folder!r} and {seed!r}")
    plan = Plan(raw, study, Path(folder), seed)
    if "scratch" not in study.starts:
        raise BadInput("study.starts has no scratch, against which all others are held: give scratch: {}")
    shards = _open(plan._config(Key(next(iter(study.labels)), *_first(plan)), None))
    _count_labels(plan, shards)
    for model in study.models:
        _try_to_build(plan._config(Key(next(iter(study.labels)), model, *_first(plan)[1:]), None), shards.num_classes)
    weights: dict[str, Weights] = {}
    for model in study.models if "pretrained" in study.starts else ():
        weights[model] = _weights(plan, model, weights)
    for labels in plan.samples:
        cells = [
            Key(labels, model, start, augmentation)
            for model, start, augmentation in itertools.product(study.models, study.starts, study.augmentations)
        ]
        cells = [key for key in cells if not any(rule.covers(*key) for rule in study.leave_out)]
        for key in cells:
            if key.start == "pretrained" and (reason := _trouble_with_weights(plan, key, weights[key.model], shards)):
                plan.leave_out(f"{key.model}, pretrained", reason)
            elif key.start not in TAUGHT:
                plan.keys.append(key)
        if taught := [key for key in cells if key.start in TAUGHT]:
            if (reason := _trouble_with_teacher(plan, labels, shards)) is None:
                plan.keys += taught
            else:
                plan.leave_out(f"distilled with {in_words(labels)}", reason)
    if not plan.keys:
        raise BadInput("nothing is left to do: " + "; ".join(f"{what}: {why}" for what, why in plan.left_out))
    for key in plan.keys:
        plan.steps(key)
    return plan


def _open(config: Config) -> "ShardSet":
    from foreseen.commands.controls import check_test_labels
    from foreseen.commands.session import open_shards
    from foreseen.engine.launch import start

    check_test_labels(config)
    shards = open_shards(config, config.data.split, start(config.compute))
    if shards.labels is None or not (shards.labels >= 0).any():
        raise BadInput(f"split {shards.split!r} of data.path {shards.place} has no labels to learn from")
    return shards


def _count_labels(plan: Plan, shards: "ShardSet") -> None:
    from foreseen.data.subsets import labelled_subsets

    assert shards.labels is not None
    for labels in plan.study.labels:
        data = plan._config(Key(labels, *_first(plan)), None).data
        try:
            found = labelled_subsets(
                shards.labels, validation_fraction=data.validation_fraction, shots=data.shots, seed=plan.first_seed
            )
        except BadInput as error:
            plan.leave_out(in_words(labels), str(error))
        else:
            plan.samples[labels] = len(found.train)


def _try_to_build(config: Config, num_classes: int) -> None:
    """Refuse a model that timm has not, or not at this size, before the first fit."""
    import torch

    from foreseen.finetune.methods import METHODS

    with torch.device("meta"):
        METHODS["supervised"].build(config, num_classes)


def _first(plan: Plan) -> tuple[str, str, str]:
    return next(iter(plan.study.models)), "scratch", next(iter(plan.study.augmentations))


def _weights(plan: Plan, model: str, before: "Mapping[str, Weights]") -> "Weights":
    """What a model's pretrained weights are, or are made from, as far as it is from elsewhere; or why there are none.

    Args:
        plan: where a run that makes them is noted.
        model: of the study.
        before: those of models that stand before it.
    """
    from foreseen.handoff.encoder import load_encoder

    study, pretrained = plan.study, plan.study.models[model].pretrained
    if pretrained is None:
        return f"no pretrained weights are named for it in study.models.{model}.pretrained"
    if pretrained.recipe is not None:
        config = plan.pretraining[model] = _pretraining(plan, model, pretrained)
        sources = [config.model.init_from, getattr(config.method, "teacher", None)]
        taught_by: tuple[EncoderFolder, ...] = ()
        if pretrained.features_of is not None:
            other = before[pretrained.features_of]
            if isinstance(other, str):
                return f"{pretrained.features_of}, whose features it learns, has no weights: {other}"
            taught_by, sources = other, sources[:1]
        try:
            return (*taught_by, *(load_encoder(source) for source in sources if source is not None))
        except BadInput as error:
            return str(error)
    assert pretrained.init_from is not None
    try:
        found = load_encoder(pretrained.init_from)
    except BadInput as error:
        return str(error)
    name = plan._config(Key(next(iter(study.labels)), model, *_first(plan)[1:]), None).model.name
    if name is not None and found.architecture != name.partition(".")[0]:
        return f"{pretrained.init_from} is a {found.architecture}, and the model a {name}"
    return (found,)


def _trouble_with_weights(plan: Plan, key: Key, weights: "Weights", shards: "ShardSet") -> str | None:
    """Why a cell cannot begin from a model's pretrained weights; None if it can."""
    if isinstance(weights, str):
        return weights
    seeds, held_out = plan.seeds(key.labels), plan.held_out(key.labels)
    for each in weights:
        if reason := leak_of(each.lineage, shards, shots_of(key.labels), seeds, held_out):
            return f"{each.source}, with {in_words(key.labels)}: {reason}"
    return None


def _pretraining(plan: Plan, model: str, pretrained: Pretrained) -> Config:
    """The run that makes a model's weights, on the study's pictures at its size."""
    assert pretrained.recipe is not None
    fit = plan._config(Key(next(iter(plan.study.labels)), model, *_first(plan)[1:]), None)
    raw = read_recipe("pretrain", pretrained.recipe, [])
    own = {key: value for key, value in plan.raw["data"].items() if key not in _OF_LABELS}
    raw |= {
        "seed": plan.first_seed,
        "data": {**raw.get("data", {}), **own},
        "model": {"name": fit.model.name, "args": fit.model.args},
        "views": {**raw.get("views", {}), "size": list(fit.views.size), "mean": fit.views.mean, "std": fit.views.std},
        "compute": fit.compute.model_dump(mode="json"),
    }
    raw = pretrained.onto(raw)
    raw["run"] |= {"dir": str(plan.folder / "pretrain" / model)}
    if pretrained.features_of is not None:
        raw["method"] |= {"teacher": plan.encoder_of(pretrained.features_of)}
    try:
        return resolve(raw, method_options("pretrain"))
    except BadInput as error:
        raise BadInput(f"the pretraining of {model} by {pretrained.recipe}: {error}") from None


def _trouble_with_teacher(plan: Plan, labels: str, shards: "ShardSet") -> str | None:
    """Why a level has no teacher; None if it has, or if the study makes it."""
    named = plan.study.teacher
    if named == BEST:
        return None if plan.level(labels, taught=False) else "no cell is made that could be the teacher"
    if (key := teacher_key(plan, labels)) is not None:
        return None if key in plan.keys else f"the cell of study.teacher {named} is not made"
    return _trouble_with_folder(named, labels, shards, plan)


def teacher_key(plan: Plan, labels: str) -> Key | None:
    """The cell that `study.teacher` names, at so many labels; None if it names none.

    Raises:
        BadInput: it names a cell that cannot be a teacher.
    """
    parts = plan.study.teacher.split("/")
    if len(parts) != 3 or parts[0] not in plan.study.models:
        return None
    if parts[1] not in plan.study.starts or parts[1] in TAUGHT or parts[2] not in plan.study.augmentations:
        raise BadInput(
            f"study.teacher {plan.study.teacher} is no cell MODEL/START/AUGMENTATION of the study that begins from "
            "scratch or pretrained"
        )
    return Key(labels, *parts)


def _trouble_with_folder(folder: str, labels: str, shards: "ShardSet", plan: Plan) -> str | None:
    """Why a teacher from elsewhere is none; None if it is one."""
    from foreseen.finetune.distill import load_teacher
    from foreseen.handoff.encoder import load_encoder

    try:
        lineage = load_encoder(folder).lineage
        load_teacher(folder, shards.num_classes, shards.classes)
    except BadInput as error:
        raise BadInput(
            f"study.teacher {folder} is neither best, nor MODEL/START/AUGMENTATION of the study, nor an encoder "
            f"folder that tells the classes apart: {error}"
        ) from None
    reason = leak_of(lineage, shards, shots_of(labels), plan.seeds(labels), plan.held_out(labels))
    return None if reason is None else f"study.teacher {folder}: {reason}; study.teacher=best makes one for each seed"
