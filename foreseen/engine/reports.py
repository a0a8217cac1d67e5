"""What a run tells on its way: its numbers and pictures, how validation and probes score it, what could not be read."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from foreseen.data.batch import Batch, Problem
from foreseen.engine.bundle import stream_shift
from foreseen.engine.compiled import uncompiled
from foreseen.engine.evaluate import evaluate
from foreseen.engine.log import RunLog, duration
from foreseen.engine.memory import advise_on_probes, advise_on_scores, memory_advice, peak_memory_gb
from foreseen.engine.unreadable import TRAINING

if TYPE_CHECKING:
    from foreseen.engine.trainer import Trainer

_SHOWN = 5  # unreadable samples a line of metrics; the list has them all


def log_numbers(trainer: "Trainer", step: int, log: RunLog) -> None:
    """Write the numbers of the steps since the last line."""
    if trainer.ledger is not None:
        trainer.ledger.write(step)
    means = trainer.meter.means(trainer.layout.ranks)  # waits for the device, so it comes before the clock is read
    elapsed_s, waited_s, samples = trainer.meter.elapsed_s, trainer.meter.waited_s, trainer.meter.samples
    finite = means.pop("finite")
    means = {name: value / finite if finite else float("nan") for name, value in means.items()}
    health = {f"health/{name}": float(value) for name, value in trainer.job.objective.health().items()}
    unreadable, skipped = _count_problems(trainer, log), int(trainer.skipped)
    values = {
        "epoch": step * trainer.layout.global_size / trainer.feed.num_samples,
        **means,
        "lr": trainer.optimizer.lr(step - 1),
        **({} if trainer.loss_scale is None else {"loss_scale": float(trainer.loss_scale.value)}),
        **health,
        "skipped_steps": skipped,
        "unreadable_samples": unreadable,
        "images_per_s": samples / elapsed_s,
        "data_wait": waited_s / elapsed_s,
        "peak_memory_gb": peak_memory_gb(trainer.accelerator.device),
    }
    left_s = (trainer.total_steps - step) * elapsed_s * trainer.layout.global_size / samples
    line = (
        f"step {step}/{trainer.total_steps}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  "
        f"lr {values['lr']:.3g}  {values['images_per_s']:.0f} img/s  data wait {values['data_wait']:.0%}  "
        f"ETA {duration(left_s)}"
    )
    if skipped:
        line += f"  skipped {skipped} non-finite steps"
    log.scalars(step, values, line=line)
    trainer.meter.reset()
    if alarm := trainer.job.objective.alarm(step, means | health):
        log.say(alarm)


def _count_problems(trainer: "Trainer", log: RunLog) -> int:
    """List what could not be read since the last line; the samples trained on that could not be read so far."""
    shift = stream_shift(trainer.rewinds)

    def step_of(problem: Problem) -> int:
        return problem.position // trainer.layout.global_size - shift + 1

    _list(trainer, trainer.problems, TRAINING, log, step_of)
    trainer.problems.clear()
    trainer.unreadable.check(trainer.job.config.data.max_bad_fraction, trainer.feed.num_samples)
    return len(trainer.unreadable.trained)


def _list(
    trainer: "Trainer", problems: Sequence[Problem], use: str, log: RunLog, step_of: Callable[[Problem], int]
) -> None:  # fmt: skip
    new = trainer.unreadable.add(problems, use, step_of)
    for problem in new[:_SHOWN]:
        log.say(f"unreadable, {'replaced' if use == TRAINING else 'in ' + use}: {problem}")
    if len(new) > _SHOWN:
        log.say(f"unreadable, {len(new) - _SHOWN:,} more: {trainer.unreadable.file} lists them")


def show(trainer: "Trainer", step: int, batch: Batch, log: RunLog) -> None:
    """Send the objective's pictures of a batch to TensorBoard."""
    if not trainer.accelerator.is_main_process:
        return
    objective = trainer.job.objective
    objective.eval()
    with torch.no_grad(), trainer.autocast(), uncompiled(trainer.job.config.compute.backend):
        log.pictures(step, objective.pictures(batch, trainer.progress(step - 1)))
    objective.train()


def validate(trainer: "Trainer", step: int, log: RunLog) -> float | None:
    """Score the validation samples; returns the number to choose by."""
    job = trainer.job
    if job.validation is None:
        return None
    started = time.perf_counter()
    advice = partial(advise_on_scores, trainer.layout, job.objective.group)
    with trainer.judged(), memory_advice(f"in validation at batch.micro_size {trainer.layout.micro_size}", advice):
        problems: list[Problem] = []
        numbers = evaluate(
            job.objective, job.validation, trainer.accelerator, job.config.compute, workers=job.config.data.workers,
            problems=problems,
        )  # fmt: skip
    _list(trainer, problems, "validation", log, lambda _: step)
    values = {f"validation/{name}": value for name, value in numbers.items()}
    line = f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    log.scalars(step, values | {"validation/seconds": time.perf_counter() - started}, line=line)
    return numbers[job.choose_by] if job.choose_by else None


def probe(trainer: "Trainer", step: int, log: RunLog) -> None:
    """Judge the frozen encoder, if that is due."""
    probe = trainer.job.probe
    if probe is None or not probe.is_due(step, trainer.total_steps):
        return
    with trainer.judged(), memory_advice("in a probe", advise_on_probes):
        values, line, problems = probe.run(
            step, trainer.job.objective.encoder(), trainer.accelerator, trainer.job.config.compute,
            batch_size=trainer.layout.micro_size, workers=trainer.job.config.data.workers,
        )  # fmt: skip
    _list(trainer, problems, "probe", log, lambda _: step)
    log.scalars(step, values, line=line)
