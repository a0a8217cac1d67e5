"""From a run to its checkpoints and back: what is saved of it, when, and how it goes on from there.

Rank 0 writes, since no state differs between ranks; every rank reads.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from foreseen.engine.checkpoint import Checkpoint
from foreseen.engine.rank_zero import on_rank_zero
from foreseen.engine.resume import check_same_run, run_state
from foreseen.errors import BadInput

if TYPE_CHECKING:
    from foreseen.engine.trainer import Trainer


def is_due(interval: int, step: int) -> bool:
    """Whether what comes every so many updates comes after this one."""
    return step % interval == 0


def is_scheduled(trainer: "Trainer", step: int) -> bool:
    """Whether a checkpoint is due after so many updates, whatever happens."""
    run = trainer.job.config.run
    evaluates = trainer.job.validation is not None and is_due(run.eval_every or run.save_every, step)
    return evaluates or is_due(run.save_every, step)


def save(trainer: "Trainer", step: int, score: float | None) -> None:
    """Publish a checkpoint.

    Raises:
        BadInput: it cannot be written; on every rank.
    """
    on_rank_zero(trainer.accelerator, partial(_write, trainer, step, score))


def _write(trainer: "Trainer", step: int, score: float | None) -> None:
    tensors, numbers = trainer.optimizer.state()
    frozen_inputs = trainer.job.objective.frozen_inputs()
    state = run_state(trainer.job.config, trainer.data, trainer.parents, frozen_inputs, step) | {
        "optimizer": numbers,
        "skipped_steps": int(trainer.skipped),
        "unreadable_samples": sorted(trainer.unreadable.trained),
        "loss_scale": None if trainer.loss_scale is None else trainer.loss_scale.state(),
        "score": score,
        "rewinds": trainer.rewinds,
        "patience": trainer.patience.state(),
        "alarm": trainer.job.objective.alarm_state(),
        "recorder": None if trainer.recorder is None else trainer.recorder.state(),
    }
    average = None if trainer.average is None else trainer.average.state()
    # What the run would go back to stays, though others follow while it goes wrong or is told to stop.
    streak = None if trainer.recorder is None else trainer.recorder.streak
    last = step if streak is None else streak.first.step

    def stays(saved: int) -> bool:
        return saved <= last and is_scheduled(trainer, saved)

    trainer.checkpoints.save(step, trainer.job.objective.state_dict(), tensors, state, average, stays)
    _mark_if_best(trainer, step, score)


def _mark_if_best(trainer: "Trainer", step: int, score: float | None) -> None:
    best = trainer.checkpoints.best
    if score is not None and (best is None or score > best[1]):
        trainer.checkpoints.mark_best(step, score)


def restore(trainer: "Trainer") -> int:
    """Go on from the newest sound checkpoint of this run; returns the updates already made."""
    newest = on_rank_zero(trainer.accelerator, partial(_tidy, trainer))
    if newest is None:
        trainer.unreadable.recall(0)
        return 0
    load(trainer, newest)
    return newest


def _tidy(trainer: "Trainer") -> int | None:
    trainer.checkpoints.clean_leftovers()
    newest = trainer.checkpoints.newest_sound()
    if newest is not None:
        trainer.checkpoints.set_aside_newer(newest)
    return newest


def newest_checkpoint(trainer: "Trainer", eligible: Callable[[int], bool]) -> int | None:
    """The step of the newest sound one among some; rank 0 looks for all."""
    return on_rank_zero(trainer.accelerator, partial(trainer.checkpoints.newest_sound, eligible))


def load(trainer: "Trainer", step: int) -> None:
    """Take the state of a checkpoint of this run."""
    found = trainer.checkpoints.load(step)
    try:
        _take_up(trainer, found)
    except (BadInput, torch.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = trainer.checkpoints.folder / f"step-{found.step}"
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"the checkpoint {where} is not what this run saved ({reason}); delete it") from error


def _take_up(trainer: "Trainer", found: Checkpoint) -> None:
    job = trainer.job
    frozen_inputs = job.objective.frozen_inputs()
    check_same_run(job.config, job.builder.shards, trainer.feed.order_name, job.parents, frozen_inputs, found.state)
    job.objective.load_state_dict(found.model)
    trainer.optimizer.load_state(found.optimizer, found.state["optimizer"])
    if trainer.loss_scale is not None:
        trainer.loss_scale.load_state(found.state["loss_scale"])
    if trainer.average is not None:
        assert found.average is not None, "a run that keeps an average saves it"
        trainer.average.load_state(found.average)
    trainer.skipped.fill_(found.state["skipped_steps"])
    trainer.unreadable.recall(found.step, found.state["unreadable_samples"])
    trainer.parents = found.state["parents"]
    trainer.rewinds = [(begin, end) for begin, end in found.state.get("rewinds", [])]  # not in those of older versions
    trainer.patience.load_state(found.state.get("patience"))
    job.objective.load_alarm_state(found.state.get("alarm"))
    if trainer.recorder is not None:
        trainer.recorder.load_state(found.state.get("recorder"), found.step)
    if trainer.accelerator.is_main_process:
        _mark_if_best(trainer, found.step, found.state["score"])  # a kill may have come between the two
