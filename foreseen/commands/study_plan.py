"""The plan of a study: which cells are made, and which cannot be, before the first run."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreseen.commands.study_cells import Key, Plan
from foreseen.commands.study_leaks import leak_of
from foreseen.commands.study_options import BEST, TAUGHT, Pretrained, Study, in_words, shots_of
from foreseen.commands.verbs import check_views, method_options
from foreseen.config import Config, read_recipe, resolve
from foreseen.errors import BadInput

if TYPE_CHECKING:
    from foreseen.data.shards import ShardSet
    from foreseen.handoff.encoder import EncoderFolder

    Weights = tuple[EncoderFolder, ...] | str  # networks from elsewhere that a model's weights are made of; or why none

_OF_LABELS = ("shots", "subset_seed", "balance", "repeats")  # keys of `data` that pretraining has no use for


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
    shards = _open(plan.from_scratch())
    _count_labels(plan, shards)
    for model in study.models:
        _try_to_build(plan.from_scratch(model=model), shards.num_classes)
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
        data = plan.from_scratch(labels=labels).data
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


def _weights(plan: Plan, model: str, before: "Mapping[str, Weights]") -> "Weights":
    """What a model's pretrained weights are, or are made from, as far as it is from elsewhere; or why there are none.

    Args:
        plan: where a run that makes them is noted.
        model: of the study.
        before: those of models that stand before it.
    """
    from foreseen.handoff.encoder import load_encoder

    pretrained = plan.study.models[model].pretrained
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
    name = plan.from_scratch(model=model).model.name
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
    fit = plan.from_scratch(model=model)
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
        config = resolve(raw, method_options("pretrain"))
        check_views(config)
        return config
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
