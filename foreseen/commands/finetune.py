"""`foreseen finetune`: from an encoder folder, or from scratch, to a classifier and its score on the test split."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreseen.config import Config
    from foreseen.data.leak import Leak
    from foreseen.data.shards import ShardSet
    from foreseen.data.subsets import Subsets
    from foreseen.engine.job import Job, Outcome
    from foreseen.engine.predictions import PredictionKeeper


def finetune(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `foreseen recipes`) or the path of a YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Dotted overrides, such as model.init_from=runs/mae/encoder.")
    ] = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Compare with scratch, or a distilled student with labels alone, at its best, over seeds.",
        ),
    ] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="With --controls: pairs of runs, from the recipe's seed on. Default: 5.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="With --controls: runs side by side, in a process each. Default: 1.")
    ] = None,
) -> None:
    """Fine-tune on labels; choices are made on a validation split cut from train, test is read once at the end.

    With --controls the run folder holds one run for each side and seed, and controls.json, which also goes into the
    model card of the encoder, or of the teacher. Finished runs are not made again.
    """
    from foreseen.commands.verbs import leave, load_recipe
    from foreseen.errors import BadInput

    config = load_recipe("finetune", recipe, overrides or [])
    if controls:
        return leave(_compare(config, seeds or 5, jobs or 1))
    if seeds is not None or jobs is not None:
        raise BadInput("--seeds and --jobs belong to --controls, which is not given; a single run's seed is seed=N")
    leave(run(config).preempted)


def _compare(config: "Config", seeds: int, processes: int) -> bool:
    """Whether it was told to stop."""
    from foreseen.commands.controls import run_controls
    from foreseen.commands.jobs import Jobs, Preempted, say

    try:
        with Jobs(processes) as jobs:
            say(run_controls(config, jobs, seeds=seeds))
    except Preempted as stopped:
        say(f"{stopped}; the same command goes on from there")
        return True
    return False


def run(config: "Config") -> "Outcome":
    """Make a fine-tuning run, to its scores and its encoder folder if it reaches the end.

    Args:
        config: of the verb "finetune".
    """
    from dataclasses import replace

    from foreseen.commands.labelled_data import look_at_test, say_unlabelled
    from foreseen.commands.session import open_shards, record_config, session
    from foreseen.data.loader import BatchBuilder, SweepDataset
    from foreseen.engine.train import train

    with session(config) as (accelerator, say):
        shards = open_shards(config, config.data.split, accelerator)
        subsets = _subsets(config, shards)
        say_unlabelled(shards, say)
        leak = look_at_test(config, shards, accelerator)
        config = config.with_length(len(subsets.train))
        record_config(config, accelerator)
        job = make_job(config, shards)
        judge = BatchBuilder.configured(shards, job.objective.evaluation_request(), config)
        ranks, rank = accelerator.num_processes, accelerator.process_index
        size = config.batch.micro_size or max(1, config.batch.global_size // ranks)
        validation = SweepDataset(judge, size, rank=rank, ranks=ranks, subset=subsets.validation)
        say(
            f"{len(subsets.train)} training and {len(subsets.validation)} validation samples, "
            f"{shards.num_classes} classes"
        )
        job = replace(job, validation=validation, choose_by="top1")
        outcome = train(job, accelerator)
        if outcome.preempted:
            say(f"told to stop: saved at step {outcome.step}; the same command goes on from there")
        else:
            _finish(job, outcome, accelerator, size, shards, leak)
    return outcome


def make_job(config: "Config", shards: "ShardSet") -> "Job":
    """What a run is made of, but for the samples that it chooses by; `replay` makes it, too.

    Args:
        config: of the verb "finetune", its length resolved.
        shards: to train on, with labels.
    """
    from foreseen.data.loader import BatchBuilder
    from foreseen.engine.job import Job
    from foreseen.finetune.methods import METHODS
    from foreseen.handoff.encoder import parents_of

    objective = METHODS[config.method.name].build(config, shards.num_classes, shards.classes)
    builder = BatchBuilder.configured(shards, objective.request, config)
    parents = parents_of(objective.encoder())
    return Job(config, objective, builder, subset=_subsets(config, shards).train, parents=parents, verb="finetune")


def _subsets(config: "Config", shards: "ShardSet") -> "Subsets":
    from foreseen.data.subsets import labelled_subsets
    from foreseen.errors import BadInput

    if shards.labels is None:
        raise BadInput(
            f"split {shards.split!r} of data.path {shards.place} has no labels; they come from class folders "
            "(ROOT/class/*.jpg, and no picture outside one), from a column of a CSV (data.columns.label), or from "
            "foreseen data pack SRC OUT --labels folder"
        )
    _ = shards.num_classes  # names a sample whose label is out of range
    data = config.data
    subsets = labelled_subsets(
        shards.labels, validation_fraction=data.validation_fraction, shots=data.shots, seed=data.subset_seed
    )
    if not len(subsets.validation):
        raise BadInput(f"no class of data.path {shards.place} has two labels, so none can be set aside for validation")
    return subsets


def _finish(
    job: "Job", outcome: "Outcome", accelerator: "Accelerator", size: int, shards: "ShardSet", leak: "Leak | None"
) -> None:  # fmt: skip
    """Take the checkpoint that validation chose, read the test split with it, hand it over and report its mistakes."""
    from functools import partial

    from foreseen.commands.score_report import write_report
    from foreseen.data.batch import BatchLayout
    from foreseen.engine.job import load_best
    from foreseen.engine.memory import advise_on_scores, memory_advice
    from foreseen.handoff.encoder import Preprocessing, save_encoder
    from foreseen.handoff.lineage import describe_lineage

    config, objective = job.config, job.objective
    objective.load_state_dict(load_best(job, outcome).handed_over)
    layout = BatchLayout(config.batch.global_size, size, accelerator.num_processes)
    advice = partial(advise_on_scores, layout, objective.group)
    with memory_advice(f"in the test split at batch.micro_size {size}", advice):
        result, judged, keep = _score(job, outcome, accelerator, size, shards, leak)
        found = keep.gather(accelerator)
    if not accelerator.is_main_process:
        return
    seen = Preprocessing.of_view(objective.evaluation_request().views[0])
    step = outcome.best_step or outcome.step
    lineage = describe_lineage(
        config, job.builder.shards, step, outcome.parents, objective.frozen_inputs(), objective.teachers()
    ) | {"result": result}
    folder = config.run.dir / "encoder"
    save_encoder(objective.encoder(), folder, preprocessing=seen, lineage=lineage, class_names=shards.classes)
    accelerator.print(f"classifier: {folder}   timm.create_model('local-dir:{folder}', pretrained=True)")
    if found is not None:
        what = f"Split {judged.split!r} of {judged.place}, with the weights of step {step}. {result['notes']}"
        page = write_report(config.run.dir, judged, found, what=what, num_classes=shards.num_classes)
        accelerator.print(f"what it gets wrong: {page}")


def _score(
    job: "Job", outcome: "Outcome", accelerator: "Accelerator", size: int, train: "ShardSet", leak: "Leak | None"
) -> "tuple[dict[str, Any], ShardSet, PredictionKeeper]":  # fmt: skip
    """Write result.json; the result, and the split that was scored: test, or validation where that cannot be."""
    import json

    from foreseen.commands.labelled_data import describe_leak
    from foreseen.commands.session import open_shards
    from foreseen.data.batch import Problem
    from foreseen.data.loader import BatchBuilder, SweepDataset
    from foreseen.engine.checkpoint import Checkpoints
    from foreseen.engine.evaluate import evaluate
    from foreseen.engine.predictions import PredictionKeeper
    from foreseen.engine.resume import describe_data
    from foreseen.engine.unreadable import UnreadableList
    from foreseen.errors import BadInput
    from foreseen.files import write_atomically
    from foreseen.printable import printable

    config = job.config
    assert job.validation is not None
    assert job.validation.subset is not None
    validation = len(job.validation.subset)
    best = Checkpoints(config.run.dir / "checkpoints", config.run.keep_last).best
    result: dict[str, Any] = {
        "step": outcome.best_step or outcome.step,
        "training_samples": len(job.subset),
        "training_data": describe_data(job.builder.shards, labels=True),
        "validation": {"top1": best[1] if best else None, "count": validation},
    }
    notes: list[str] = []

    keep = PredictionKeeper()

    def score(sweep: "SweepDataset", use: str) -> dict[str, float]:
        problems: list[Problem] = []
        numbers = evaluate(
            job.objective, sweep, accelerator, config.compute, workers=config.data.workers, problems=problems, keep=keep
        )
        listed = UnreadableList(config.run.dir, accelerator)
        listed.recall()
        for problem in listed.add(problems, use, lambda _: result["step"])[:5]:
            accelerator.print(f"unreadable, in {use}: {problem}")
        if numbers["unreadable"]:
            notes.append(f"{int(numbers['unreadable'])} pictures could not be read; others stand in their places.")
        return numbers

    try:
        judged = open_shards(config, config.data.test_split, accelerator)
        judge = BatchBuilder.configured(judged, job.objective.evaluation_request(), config)
        ranks, rank = accelerator.num_processes, accelerator.process_index
        result["test_data"] = {"path": judged.address, "split": judged.split}
        if leak is not None:
            notes.append(describe_leak(leak, train, judged))
            result["leak"] = {"identical": leak.identical, "said": notes[-1]}
        result["test"] = score(SweepDataset(judge, size, rank=rank, ranks=ranks), "test")
    except BadInput as error:
        accelerator.print(f"no test score: {error}")
        judged, keep = train, PredictionKeeper()  # the other may have seen some test pictures
        notes = [
            "These are the validation pictures, by which the weights were chosen, as there is no test score: "
            f"{printable(str(error))}."
        ]
        score(job.validation, "validation")
    else:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in result["test"].items())
        accelerator.print(f"test split, read once, with the step that validation chose ({result['step']}): {numbers}")
    result["notes"] = " ".join(notes)
    if accelerator.is_main_process:
        write_atomically(config.run.dir / "result.json", json.dumps(result, indent=2) + "\n")
    return result, judged, keep
