"""`foreseen study`: with my few labelled pictures, what should I train? One table, one plot, and sentences."""

import json
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from foreseen.commands.jobs import Jobs
    from foreseen.commands.study_cells import Cell, Key, Plan
    from foreseen.config import Config


def study(
    recipe: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name, or the path of a YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides, such as data.path=shards/mine study.seeds=5.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, in a process each.")] = 1,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run, and run nothing.")] = False,
) -> None:
    """Train every model from scratch, pretrained and distilled on few labels, and say what to train.

    Every cell is an ordinary fine-tuning run in a folder of its own: killed, the study goes on when the same command is
    given again, and finished runs are not made again. Validation chooses, test is read once a run. The folder then
    holds study.md, study.csv, study.json, study.png and study.html.
    """
    import os

    from foreseen.commands.jobs import Jobs, Preempted, say
    from foreseen.commands.study_options import load_study
    from foreseen.commands.study_plan import make_plan
    from foreseen.commands.verbs import leave
    from foreseen.errors import BadInput

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("a study starts its own processes; run it as plain `foreseen study`, with --jobs for several")
    planned = make_plan(*load_study(recipe, overrides or []))
    describe_plan(planned)
    if plan:
        return
    try:
        with Jobs(jobs) as queue:
            say(run_study(planned, queue))
    except Preempted as stopped:
        say(f"{stopped}; the same command goes on from there")
        return leave(preempted=True)


def describe_plan(plan: "Plan") -> None:
    """Print what there is to do and what is left out."""
    from foreseen.commands.jobs import say
    from foreseen.commands.study_options import in_words

    for labels, samples in plan.samples.items():
        keys = [key for key in plan.keys if key.labels == labels]
        fits, seeds = sum(map(plan.fits, keys)), len(plan.seeds(labels))
        say(f"{in_words(labels)} ({samples} in all): {len(keys)} cells × {seeds} seeds, {fits} fits")
    for model, config in plan.pretraining.items():
        say(f"{model} is pretrained here, by {config.method.name}, on the unlabelled pictures of {config.data.split!r}")
    for what, why in plan.left_out:
        say(f"left out: {what}: {why}")
    total = sum(map(plan.fits, plan.keys))
    say(f"{total} fits in all, of {len(plan.keys)} cells, in {plan.folder}")


def run_study(plan: "Plan", jobs: "Jobs") -> str:
    """Make every run that is not made yet, and write down what came out whenever the cells of a number of labels that
    have no teacher are made, and when those that have one are.

    An older report that tells of a cell that is not read yet stays until that one is, or all are.

    Returns:
        What came out, in sentences.
    """
    from foreseen.commands.study_page import write_page
    from foreseen.commands.study_report import reported, summary, write_report

    runner = Runner(plan, jobs)
    cells: list[Cell] = []
    said = ""
    teachers: dict[str, Cell | None] = {}
    levels = [(labels, taught) for labels in plan.samples for taught in (False, True)]
    levels = [level for level in levels if plan.level(level[0], taught=level[1])]
    for labels, taught in levels:
        made = [plan.cell(key, teachers.get(labels)) for key in plan.level(labels, taught=taught)]
        runner.make(made)
        cells += made
        if (labels, taught) == levels[-1] or reported(plan.folder) <= {cell.key for cell in cells}:
            record = write_report(plan, cells)
            said = f"\n{summary(record)}\n\nThe page of it: {write_page(plan.folder, record)}"
        if not taught:
            teachers[labels] = _teacher(plan, labels, made)
    return said


def _teacher(plan: "Plan", labels: str, cells: "Sequence[Cell]") -> "Cell | None":
    """The cell that the others of a level learn from; None where that is a folder."""
    from foreseen.commands.study_options import BEST
    from foreseen.commands.study_plan import teacher_key
    from foreseen.commands.study_report import validation

    if plan.study.teacher == BEST:
        return max(cells, key=validation)
    key = teacher_key(plan, labels)
    return next((cell for cell in cells if cell.key == key), None)


class Runner:
    """Makes the runs of cells, each once, and tells how long it will take.

    Args:
        plan: all of the study, of which the time that is left is estimated.
        jobs: open.
    """

    def __init__(self, plan: "Plan", jobs: "Jobs") -> None:
        self._plan, self._jobs = plan, jobs
        self._steps = {key: plan.steps(key) for key in plan.keys}
        self._left = sum(self._steps[key] * plan.fits(key) for key in plan.keys)
        self._total = sum(map(plan.fits, plan.keys))
        self._done = 0
        self._clock = 0.0
        self._made_steps = 0

    def make(self, cells: "Sequence[Cell]") -> None:
        """Make the runs of cells that do not need one another: first all rates on the first seed, then the rest.

        Raises:
            BadInput: a run folder holds another job.
        """
        self._fit([(cell.key, config) for cell in cells for config in cell.tuning()])
        self._fit([(cell.key, config) for cell in cells for config in cell.others()])

    def _fit(self, runs: "Sequence[tuple[Key, Config]]") -> None:
        from foreseen.commands.controls import describe_run, is_finished
        from foreseen.commands.jobs import say

        submitted: dict[Future[None], tuple[Key, Config]] = {}
        pending = []
        for key, config in runs:
            if is_finished(config) and (config.run.dir / "encoder" / "model.safetensors").is_file():
                check_sources(config)
                self._count(key)
            else:
                pending.append((key, config))
        began = time.monotonic()
        for pretrained in (False, True):  # the others run beside pretraining
            mine = [(key, config) for key, config in pending if (key.start == "pretrained") is pretrained]
            for model in dict.fromkeys(key.model for key, _ in mine) if pretrained else ():
                self._pretrain(model)
            for key, config in mine:
                submitted[self._jobs.submit("finetune", config)] = (key, config)
        for future in self._jobs.wait(list(submitted)):
            key, config = submitted[future]
            self._count(key)
            self._made_steps += self._steps[key]
            elapsed = self._clock + time.monotonic() - began
            left = _minutes(elapsed / self._made_steps * self._left)
            say(f"[{self._done}/{self._total}] {key.labels}{describe_run(config)}   {left} left")
        self._clock += time.monotonic() - began

    def _count(self, key: "Key") -> None:
        self._done += 1
        self._left -= self._steps[key]

    def _pretrain(self, model: str) -> None:
        """Make a model's weights, and those that they are made with; a finished run is only handed on."""
        from foreseen.commands.jobs import say

        if (config := self._plan.pretraining.pop(model, None)) is None:
            return
        pretrained = self._plan.study.models[model].pretrained
        if pretrained is not None and pretrained.features_of is not None:
            self._pretrain(pretrained.features_of)
        say(f"pretraining {model} by {config.method.name}, without labels, in {config.run.dir}")
        list(self._jobs.wait([self._jobs.submit("pretrain", config)]))


def check_sources(config: "Config") -> None:
    """Refuse a finished run that began from, or learned from, other weights than its sources hold now.

    Raises:
        BadInput: it did.
    """
    from foreseen.errors import BadInput
    from foreseen.files import sha256_of
    from foreseen.handoff.encoder import PUBLIC

    lineage = json.loads((config.run.dir / "encoder" / "lineage.json").read_text(encoding="utf-8"))
    sources = ("parents", config.model.init_from), ("teachers", getattr(config.method, "teacher", None))
    for kind, source in sources:
        if source is None or str(source).startswith(PUBLIC) or not (Path(source) / "model.safetensors").is_file():
            continue
        now = sha256_of(Path(source) / "model.safetensors")
        if any(before["weights_sha256"] != now for before in lineage.get(kind) or []):
            raise BadInput(
                f"{config.run.dir} is finished, but with other weights than {source} holds now; take another run.dir, "
                "or delete that folder to make it anew"
            )


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
