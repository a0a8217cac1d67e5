"""The cells of a study: what they are, and the config of each run.

A cell is a number of labels, a model, where it starts from, and an augmentation. Its runs are ordinary fine-tuning runs
in folders of their own: `DIR/k5/vit-scratch-deit-lr-0.001/seed-0`. All cells of a seed have the same labels. A teacher
of the study's own is, for each seed, the run of that very seed at as many labels, so it knows no label that its student
does not have.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from foreseen.commands.controls import Arm, validation_of
from foreseen.commands.study_options import TAUGHT, Study, in_words, shots_of
from foreseen.commands.verbs import method_options
from foreseen.config import Config, resolve
from foreseen.errors import BadInput


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
        return self.from_scratch(labels=labels).data.validation_fraction

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
            config = self.config_of(key, source)
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
        config = self.config_of(key, "not known yet" if key.start in TAUGHT else None)
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

    def from_scratch(self, *, labels: str | None = None, model: str | None = None) -> Config:
        """The config of a cell that begins from scratch: the first one, or the first of a level or model."""
        study = self.study
        labels, model = labels or next(iter(study.labels)), model or next(iter(study.models))
        return self.config_of(Key(labels, model, "scratch", next(iter(study.augmentations))))

    def config_of(self, key: Key, teacher: Arm | str | None = None) -> Config:
        """That of a cell's runs, but for learning rate, seed and folder.

        Args:
            key: which.
            teacher: whom it learns from: the runs of another cell, or a folder.

        Raises:
            BadInput: it is wrong.
        """
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
