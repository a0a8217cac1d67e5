"""Did pretraining, or a teacher, help? Against its control at its best, on the same labels, seeds and test pictures.

Scratch is the better, by validation, of the same recipe and its own: no layer decay, and three learning rates. Both
sides pass over the same number of images; a second line gives scratch three times as many. An encoder that began from
other weights is compared with those, too. A method that learns from a teacher is held against the same student on
labels alone instead of scratch, by the same rules. Each seed draws its own labels, the same for every side, and
differences are taken seed by seed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from foreseen.commands.jobs import Jobs, is_main_rank, say
from foreseen.errors import BadInput
from foreseen.files import read_json
from foreseen.masked import masked

if TYPE_CHECKING:
    from foreseen.config import Config, MethodOptions
    from foreseen.handoff.encoder import EncoderFolder

LR_FACTORS = (0.25, 0.7, 2.0)  # of the recipe's lr: about three apart, as scratch may want more or less
TRIPLE = 3
FILE_NAME = "controls.json"


@dataclass(frozen=True)
class Arm:
    """One side of the comparison: a config without its seed.

    Attributes:
        name: of its folder in the run folder.
        title: for people.
        config: its `run.dir` is the arm's folder.
    """

    name: str
    title: str
    config: "Config"

    def seeded(self, seed: int) -> "Config":
        """The run of one seed, which also draws the labels."""
        config = self.config
        return config.model_copy(
            update={
                "seed": seed,
                "run": config.run.model_copy(update={"dir": config.run.dir / f"seed-{seed}"}),
                "data": config.data.model_copy(update={"subset_seed": seed}),
            }
        )


@dataclass(frozen=True)
class Subject:
    """What is compared with its control, and the words for it.

    Attributes:
        source: folder of the weights that are begun from or learned from, or `timm:NAME`.
        treated, control: what the sides are called; their folders and keys begin so.
        deed: what may have helped.
        once: what there is one of, whatever the seeds.
        column: what tells the sides apart, as the head of a column, and the treated side's entry there.
        trained_before: whose training may have seen the test pictures.
        student: the control's method, where it is not scratch.
    """

    source: str | None
    treated: str = "pretrained"
    control: str = "scratch"
    deed: str = "Pretraining"
    once: str = "one pretraining run"
    column: tuple[str, str] = ("begins from", "pretrained")
    trained_before: str = "pretraining"
    student: "MethodOptions | None" = None

    @classmethod
    def of(cls, config: "Config") -> "Subject":
        """What a recipe adds to its control: a teacher, or else the weights that it begins from."""
        found = config.method.control()
        if found is None:
            return cls(config.model.init_from)
        student, source = found
        return cls(
            source,
            "distilled",
            "labels alone",
            "Distillation",
            "one teacher",
            ("learns from", "labels and the teacher"),
            "the teacher",
            student,
        )

    @property
    def kind(self) -> str:
        """What its source is."""
        return "encoder" if self.student is None else "teacher or encoder"

    @property
    def heading(self) -> str:
        """What is compared with what."""
        return f"{self.treated.capitalize()} against {self.control}"

    @property
    def folder(self) -> Path:
        """Where the weights lie; some other path for public ones."""
        return Path(self.source or "")


@dataclass(frozen=True)
class Plan:
    """The arms of a comparison.

    Attributes:
        subject: what is compared.
        pretrained: from the encoder, or the teacher.
        scratch: what scratch may be at its best, of which validation chooses one.
        start: from the weights that the encoder's pretraining began from, if there are any.
        seeds: each draws its own labels.
        tuning_seeds: how many of the seeds, the first ones, scratch is chosen by.
        triple_seeds: how many of them scratch gets three times the passes for.
    """

    subject: Subject
    pretrained: Arm
    scratch: tuple[Arm, ...]
    start: Arm | None
    seeds: tuple[int, ...]
    tuning_seeds: int
    triple_seeds: int

    def tuning(self) -> "list[Config]":
        """The runs that scratch is chosen by."""
        return [arm.seeded(seed) for seed in self.seeds[: self.tuning_seeds] for arm in self.scratch]

    def chosen(self) -> Arm:
        """Scratch at its best: the arm with the highest mean on validation over the tuning seeds."""
        seeds = self.seeds[: self.tuning_seeds]
        return max(self.scratch, key=lambda arm: mean(validation_of(arm.seeded(seed)) for seed in seeds))

    def remaining_scratch(self, chosen: Arm) -> "list[Config]":
        """The runs of scratch that are left once it is chosen."""
        rest = [chosen.seeded(seed) for seed in self.seeds[self.tuning_seeds :]]
        return rest + [tripled(chosen).seeded(seed) for seed in self.seeds[: self.triple_seeds]]

    def treated(self) -> "list[Config]":
        """The runs that begin from weights."""
        arms = [self.pretrained] if self.start is None else [self.pretrained, self.start]
        return [arm.seeded(seed) for seed in self.seeds for arm in arms]


def make_plan(
    config: "Config",
    *,
    seeds: int,
    tuning_seeds: int | None = None,
    triple_seeds: int | None = None,
    start_from: str | None = None,
) -> Plan:
    """Lay out a comparison.

    Args:
        config: of the verb "finetune", with `model.name`, `views.mean`, and `model.init_from` or a teacher.
        seeds: how many pairs, from the config's seed on.
        tuning_seeds, triple_seeds: see `Plan`; None for all.
        start_from: what the encoder's pretraining began from.
    """
    folder = config.run.dir

    def arm(name: str, title: str, base: "Config", **sections: dict[str, Any]) -> Arm:
        # A rate that diverges is a score here; it must not end the comparison.
        run = sections.pop("run", {}) | {"dir": folder / name, "rewind_after": None}
        update: dict[str, Any] = {"run": base.run.model_copy(update=run)}
        for section, values in sections.items():
            update[section] = getattr(base, section).model_copy(update=values)
        return Arm(name, title, base.model_copy(update=update))

    subject = Subject.of(config)
    if subject.student is None:
        without = config.model_copy(update={"model": config.model.model_copy(update={"init_from": None})})
    else:
        without = config.model_copy(update={"method": subject.student})
    name = subject.control.replace(" ", "-")
    candidates = [arm(f"{name}-same", f"{subject.control}, same recipe", without)]
    for factor in LR_FACTORS:
        lr = config.optim.base_lr * factor
        own = {"base_lr": lr, "layer_decay": None}
        title = f"{subject.control}, own recipe, lr {lr:.3g}"
        candidates.append(arm(f"{name}-lr-{lr:.3g}", title, without, optim=own))
    start = None
    if start_from is not None:
        start = arm("start", f"starting weights ({start_from})", config, model={"init_from": start_from})
    every = tuple(range(config.seed, config.seed + seeds))
    return Plan(
        subject=subject,
        pretrained=arm(subject.treated, subject.column[1], config),
        scratch=tuple(candidates),
        start=start,
        seeds=every,
        tuning_seeds=len(every) if tuning_seeds is None else min(tuning_seeds, len(every)),
        triple_seeds=len(every) if triple_seeds is None else min(triple_seeds, len(every)),
    )


def tripled(arm: Arm) -> Arm:
    """The arm with three times the passes over the images."""
    run = arm.config.run
    longer = {
        "dir": run.dir.with_name(f"{run.dir.name}-3x"),
        "steps": None if run.steps is None else TRIPLE * run.steps,
        "epochs": None if run.epochs is None else TRIPLE * run.epochs,
    }
    config = arm.config.model_copy(update={"run": run.model_copy(update=longer)})
    return Arm(f"{arm.name}-3x", f"{arm.title}, {TRIPLE}× the passes", config)


def run_controls(config: "Config", jobs: Jobs, *, seeds: int) -> str:
    """Make every run of a comparison that is not made yet, and write down how it came out.

    Args:
        config: of the verb "finetune", with `model.init_from` or a teacher.
        jobs: open.
        seeds: how many pairs.

    Returns:
        The report.

    Raises:
        BadInput: there is nothing to compare, or the run folder holds another comparison.
    """
    from foreseen.handoff.encoder import load_encoder

    _check(config, seeds)
    subject = Subject.of(config)
    assert subject.source is not None
    encoder = load_encoder(subject.source)
    if config.model.init_from is not None:
        config = as_the_encoder(config, load_encoder(config.model.init_from))
    start = _start_of(encoder) if subject.student is None else None
    plan = make_plan(config, seeds=seeds, start_from=start)
    claim_folder(config)
    make_runs(jobs, plan.tuning())
    chosen = plan.chosen()
    make_runs(jobs, [*plan.remaining_scratch(chosen), *plan.treated()])
    return conclude(plan, chosen, encoder.lineage)


def _check(config: "Config", seeds: int) -> None:
    """Refuse what could not be concluded, before the first run."""
    if Subject.of(config).source is None:
        raise BadInput("--controls compares an encoder with scratch, and model.init_from is null; give an encoder")
    if seeds < 1:
        raise BadInput(f"--seeds must be 1 or more, got {seeds}")
    check_test_labels(config)


def check_test_labels(config: "Config") -> None:
    """Refuse a set whose test split has no labels to compare by.

    Raises:
        BadInput: it has none, or there is no such split.
    """
    from foreseen.commands.session import open_shards
    from foreseen.engine.launch import start

    test = open_shards(config, config.data.test_split, start(config.compute))
    if test.labels is None or not (test.labels >= 0).any():
        raise BadInput(f"split {test.split!r} of data.path {test.place} has no labels to compare by")


def as_the_encoder(config: "Config", encoder: "EncoderFolder") -> "Config":
    """The config with the encoder's architecture and normalisation written out, so that scratch shares them."""
    from foreseen.handoff.encoder import own_args

    model, views = config.model, config.views
    if model.name is None:
        args = own_args(encoder) | model.args
        model = model.model_copy(update={"name": encoder.architecture, "args": args})
    seen = encoder.preprocessing
    views = views.model_copy(update={"mean": views.mean or seen.mean, "std": views.std or seen.std})
    return config.model_copy(update={"model": model, "views": views})


def _start_of(encoder: "EncoderFolder") -> str | None:
    """What the encoder's pretraining began from, if it is still there and the same."""
    from foreseen.handoff.encoder import PUBLIC, load_encoder

    parents = encoder.lineage.get("parents")
    if not parents:
        return None
    source, weights = str(parents[0]["source"]), parents[0]["weights_sha256"]
    if source.startswith(PUBLIC):
        return source
    try:
        same = load_encoder(source).weights == weights
    except BadInput:
        same = False
    if not same:
        say(f"{encoder.source} began from {source}, which is not there or changed since: it is not compared with that")
    return source if same else None


def claim_folder(config: "Config") -> None:
    """Note in the run folder which encoder, or teacher and encoder, is compared there, and refuse a folder of others.

    They are known by their weights: the same path may hold others by now.
    """
    from foreseen.files import write_atomically

    if not is_main_rank():
        return
    subject = Subject.of(config)
    sources = [subject.source] if subject.student is None else [subject.source, config.model.init_from]
    digest = " ".join(_weights_of(source) for source in sources if source is not None)
    note = config.run.dir / "encoder.sha256"
    config.run.dir.mkdir(parents=True, exist_ok=True)
    if note.is_file() and note.read_text(encoding="utf-8").strip() != digest:
        raise BadInput(
            f"run.dir {config.run.dir} holds the controls of another {subject.kind} than "
            f"{' and '.join(source for source in sources if source is not None)}; take another run.dir"
        )
    write_atomically(note, digest + "\n")


def _weights_of(source: str) -> str:
    """The checksum of a folder's weights; public ones go by their name."""
    from foreseen.files import sha256_of

    weights = Path(source) / "model.safetensors"
    if not weights.is_file():
        return source
    return sha256_of(weights)


def make_runs(
    jobs: Jobs,
    configs: "Sequence[Config]",
    *,
    beside: Sequence[Future[None]] = (),
    look: Callable[[], None] = lambda: None,
) -> None:
    """Make the runs that are not finished yet, and say how each came out; see `Jobs.wait` for the rest.

    Raises:
        BadInput: a run folder holds another job.
    """
    finish(jobs, submit(jobs, configs), beside=beside, look=look)


def submit(jobs: Jobs, configs: "Sequence[Config]") -> "dict[Future[None], Config]":
    """Put the runs that are not finished yet in the queue."""
    return {jobs.submit("finetune", config): config for config in configs if not is_finished(config)}


def finish(
    jobs: Jobs,
    submitted: "Mapping[Future[None], Config]",
    *,
    beside: Sequence[Future[None]] = (),
    look: Callable[[], None] = lambda: None,
) -> None:
    """Wait for submitted runs, and say how each came out."""
    for future in jobs.wait(list(submitted), beside=beside, look=look):
        say(describe_run(submitted[future]))


def describe_run(config: "Config") -> str:
    """A line on a finished run."""
    result = _result(config)
    name = f"{config.run.dir.parent.name}/{config.run.dir.name}"
    return f"  {name:34} validation {result['validation']['top1']:6.1%}   test {result['test']['top1']:6.1%}"


def is_finished(config: "Config") -> bool:
    """Whether this very run is in its folder already, with its score.

    Raises:
        BadInput: the folder holds another job's run, or one on other pictures or labels.
    """
    from foreseen.commands.session import open_shards
    from foreseen.config import read_yaml
    from foreseen.engine.launch import start
    from foreseen.engine.resume import check_same_config, check_same_data

    result = _read(config, "result.json", read_json)
    resolved = _read(config, "config.yaml", read_yaml)
    if result is None or resolved is None or "test" not in result:
        return False
    check_same_config(config.with_length(result["training_samples"]), resolved)
    check_same_data(open_shards(config, config.data.split, start(config.compute)), result["training_data"])
    return True


def _read(config: "Config", name: str, parse: Callable[[Path], Any]) -> Any:
    """What rank 0 finds in a file of a run folder, on every rank: other machines may see it later. None if missing."""
    import torch.distributed as dist

    file = config.run.dir / name
    found = [parse(file) if is_main_rank() and file.is_file() else None]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(found, src=0)
    return found[0]


def _result(config: "Config") -> dict[str, Any]:
    result = _read(config, "result.json", read_json)
    if result is None or "test" not in result:
        raise BadInput(f"{config.run.dir} has no test score, so nothing can be compared; see what was said of it above")
    found: dict[str, Any] = result
    return found


def validation_of(config: "Config") -> float:
    """The top-1 on validation, in [0, 1], of a finished run."""
    return float(_result(config)["validation"]["top1"])


def scores(arm: Arm, seeds: Sequence[int]) -> dict[str, Any]:
    """What the runs of an arm came out at; accuracies in percent."""
    results = [_result(arm.seeded(seed)) for seed in seeds]
    test = [100 * result["test"]["top1"] for result in results]
    optim = arm.config.optim
    return {
        "title": arm.title,
        "base_lr": optim.base_lr,
        "layer_decay": optim.layer_decay,
        "steps": [result["step"] for result in results],
        "seeds": list(seeds),
        "validation": [100 * result["validation"]["top1"] for result in results],
        "test": test,
        "mean": mean(test),
        "sd": stdev(test) if len(test) > 1 else None,
    }


def conclude(plan: Plan, chosen: Arm, lineage: dict[str, Any]) -> str:
    """Write `controls.json` and the encoder's model card from finished runs.

    Args:
        plan: all of whose runs are finished.
        chosen: scratch at its best.
        lineage: of the encoder.

    Returns:
        The report: a Markdown table and a verdict.
    """
    from foreseen.data.open_set import recall_set
    from foreseen.engine.run_folder import describe_start
    from foreseen.files import write_atomically
    from foreseen.handoff.seen import count_seen, describe_seen
    from foreseen.paired import paired_difference

    pretrained = scores(plan.pretrained, plan.seeds)
    subject = plan.subject
    control = subject.control.replace(" ", "_")
    sides = {control: (scores(chosen, plan.seeds), chosen.title)}
    if plan.triple_seeds:
        longer = tripled(chosen)
        sides[f"{control}_3x"] = (scores(longer, plan.seeds[: plan.triple_seeds]), longer.title)
    if plan.start is not None:
        sides["start"] = (scores(plan.start, plan.seeds), plan.start.title)
    differences = {
        name: paired_difference(pretrained["test"][: len(side["test"])], side["test"])
        for name, (side, _) in sides.items()
    }
    tried = plan.seeds[: plan.tuning_seeds]
    config = plan.pretrained.config
    first = _result(plan.pretrained.seeded(plan.seeds[0]))
    test = recall_set(first["test_data"]["path"], first["test_data"]["split"])
    seen = count_seen(lineage, test)
    sentences = [_sentence(subject, sides[name][1], difference) for name, difference in differences.items()]
    notes = (
        _edge_of_grid(plan, chosen),
        describe_seen(seen, test, subject.trained_before),
        _labels_of_the_teacher(plan, lineage),
    )
    verdict = " ".join([*sentences, *(note for note in notes if note)])
    record = {
        "compared": subject.heading,
        "column": subject.column[0],
        ("encoder" if subject.student is None else "teacher"): subject.source,
        "method": lineage.get("method"),
        "labels": {
            "data": masked(str(config.data.path)),
            "training": first["training_samples"],
            "validation": first["validation"]["count"],
            "seeds": list(plan.seeds),
        },
        "test_pictures_seen": seen,
        "arms": {subject.treated: pretrained} | {name: side for name, (side, _) in sides.items()},
        "control_candidates": {arm.name: scores(arm, tried) for arm in plan.scratch},
        "chosen_control": chosen.name,
        "differences": {name: asdict(difference) for name, difference in differences.items()},
        "verdict": verdict,
        "made_by": describe_start({}),
    }
    report = f"{subject.heading}:\n\n{report_table(record)}\n\n{verdict}"
    if is_main_rank():
        write_atomically(config.run.dir.parent / FILE_NAME, json.dumps(record, indent=2) + "\n")
        _add_to_card(subject, config, record, report)
    return report


def _edge_of_grid(plan: Plan, chosen: Arm) -> str | None:
    rates = sorted(arm.config.optim.base_lr for arm in plan.scratch if arm.config.optim.layer_decay is None)
    rate = chosen.config.optim.base_lr
    if chosen.config.optim.layer_decay is not None or rate not in (rates[0], rates[-1]):
        return None
    grid = ", ".join(f"{rate:.3g}" for rate in rates)
    name = plan.subject.control.capitalize()
    return f"{name}'s lr lies at the end of its grid ({grid}): it may do better beyond."


def _labels_of_the_teacher(plan: Plan, lineage: Mapping[str, Any]) -> str | None:
    """What a teacher knew; None where there is none."""
    if plan.subject.student is None:
        return None
    count = lineage.get("result", {}).get("training_samples")
    return None if count is None else f"The teacher itself has learned from {count} labels."


def _sentence(subject: Subject, against: str, difference: Any) -> str:
    """The treated side against another, in words."""
    points = abs(difference.mean)
    if difference.low is None:
        return f"Against {against} the gain is {difference.mean:+.1f} points, on one seed, so without an interval."
    count = f"{len(difference.each)} seeds of labels and fine-tuning, {subject.once}"
    interval = f"95 % interval {difference.low:+.1f} to {difference.high:+.1f} over {count}"
    if difference.low > 0:
        return f"{subject.deed} helped by {points:.1f} points against {against} ({interval})."
    if difference.high < 0:
        return f"{subject.deed} did not help: it lost {points:.1f} points against {against} ({interval})."
    return f"{subject.deed} did not help measurably against {against}: {difference.mean:+.1f} points ({interval})."


def report_table(record: dict[str, Any]) -> str:
    """A Markdown table of `controls.json`."""
    lines = [
        f"| {record['column']} | lr, layer decay | seeds | validation top-1 | test top-1, mean ± sd | each |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    chosen = record["control_candidates"][record["chosen_control"]]["title"]
    for arm in record["arms"].values():
        note = " (chosen on validation)" if arm["title"] == chosen else ""
        lines.append(_row(arm, f"{arm['title']}{note}"))
    for arm in record["control_candidates"].values():
        if arm["title"] != chosen:
            lines.append(_row(arm, f"{arm['title']} (not chosen)"))
    return "\n".join(lines)


def _row(arm: dict[str, Any], title: str) -> str:
    spread = f" ± {arm['sd']:.1f}" if arm["sd"] is not None else ""
    cells = [
        title,
        f"{arm['base_lr']:.3g}, {arm['layer_decay'] or 1.0:g}",
        ", ".join(map(str, arm["seeds"])),
        f"{mean(arm['validation']):.1f}",
        f"{arm['mean']:.1f}{spread}",
        ", ".join(f"{score:.1f}" for score in arm["test"]),
    ]
    return "| " + " | ".join(cells) + " |"


def describe_labels(labels: dict[str, Any]) -> str:
    """How many labels each run had, from `controls.json`."""
    return f"{labels['training']} labels to train on and {labels['validation']:.0f} to choose by"


def _add_to_card(subject: Subject, config: "Config", record: dict[str, Any], report: str) -> None:
    from foreseen.handoff.card import add_section

    folder = subject.folder
    if not (folder / "README.md").is_file():
        return
    data = masked(config.data.path or "procedural pets")
    try:
        add_section(folder, f"Did {subject.deed.lower()} help? {data}, {describe_labels(record['labels'])}", report)
    except OSError as error:
        say(f"the model card of {folder} could not be changed: {error.strerror}")
