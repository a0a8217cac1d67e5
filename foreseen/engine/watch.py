"""What becomes of bad steps: a bundle of the first in a row, then going back, then the end.

Going back means the last checkpoint before the row, and other data: the stream is shifted so that what was read since
that checkpoint, up to the last bad step, is passed over, while the clock and the schedules go on from the checkpoint.
Everything here is decided by all ranks alike, at a log, as a function of the config and the data; so a run that is
killed on the way, before or after it went back, comes to the same.
"""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from foreseen.engine.bundle import MOST_BUNDLES, Bundle, folder_of, is_full, samples_of, stream_shift, write_bundle
from foreseen.engine.launch import describe_devices
from foreseen.engine.log import RunLog
from foreseen.engine.rank_zero import on_rank_zero
from foreseen.engine.recorder import FlightRecorder, Record, Streak
from foreseen.engine.resume import run_state
from foreseen.engine.run_folder import describe_start
from foreseen.engine.saving import is_scheduled, load, newest_checkpoint
from foreseen.errors import BadInput

if TYPE_CHECKING:
    from foreseen.engine.trainer import Trainer


def look(trainer: "Trainer", log: RunLog) -> int | None:
    """Judge the steps since the last look; waits for the device, and every rank must call it.

    Returns:
        The step to go on from, where the run went back; its state is that of the checkpoint, then.

    Raises:
        BadInput: too many bad steps in a row, and going back does not help or cannot be.
    """
    recorder = trainer.recorder
    if recorder is None:
        return None
    for record in recorder.read(trainer.layout.ranks, trainer.optimizer.lr):
        streak = recorder.judge(record)
        if streak is None:
            continue
        limit = trainer.job.config.run.rewind_after
        enough = limit is not None and streak.length >= limit
        if enough or streak.length == 1:
            bundle = _leave_bundle(trainer, recorder, streak.first, log, at_any_rate=enough)
        if enough:
            return _go_back(trainer, recorder, streak, bundle, log)
    return None


def _leave_bundle(
    trainer: "Trainer", recorder: FlightRecorder, record: Record, log: RunLog, *, at_any_rate: bool
) -> Path:  # fmt: skip
    """Write the bundle of a bad step, if it is not there and there is room; a failure is said and no more."""
    run = trainer.job.config.run.dir
    folder = folder_of(run, record.step, len(trainer.rewinds))
    replaced = dict(gather_object(list(recorder.replaced(record.step).items())))
    if not trainer.accelerator.is_main_process or folder.exists():
        return folder
    if is_full(run) and not at_any_rate:
        log.say(f"{recorder.describe(record)}; no bundle, since {folder.parent} holds {MOST_BUNDLES} already")
        return folder
    try:
        write_bundle(folder, _bundle(trainer, recorder, record, replaced), trainer.checkpoints.folder)
    except (OSError, BadInput) as error:  # such as a checkpoint that is damaged
        reason = getattr(error, "strerror", None) or error
        log.say(f"{recorder.describe(record)}; its bundle cannot be written to {folder} ({reason}); training goes on")
    else:
        log.say(f"{recorder.describe(record)}; to make it again: foreseen replay {folder}")
    return folder


def _bundle(trainer: "Trainer", recorder: FlightRecorder, record: Record, replaced: dict[int, int]) -> Bundle:
    job, layout, step = trainer.job, trainer.layout, record.step
    return Bundle(
        verb=job.verb,
        reason=record.bad or "non-finite",
        sentence=recorder.describe(record),
        step=step,
        rewinds=tuple(trainer.rewinds),
        checkpoint=trainer.checkpoints.newest_sound(lambda saved: saved <= step),
        ranks=layout.ranks,
        micro_size=layout.micro_size,
        accumulation=layout.accumulation,
        ring=(*(earlier for earlier in recorder.ring if earlier.step < step), record),
        samples=samples_of(trainer.feed, step + stream_shift(trainer.rewinds), replaced),
        environment=describe_start(describe_devices(trainer.accelerator)),
        run=run_state(job.config, trainer.data, trainer.parents, job.objective.frozen_inputs(), step),
    )


def _go_back(trainer: "Trainer", recorder: FlightRecorder, streak: Streak, bundle: Path, log: RunLog) -> int:
    first, after = streak.first.step, streak.last + 1
    found = f"{streak.length} steps in a row are bad, the first: {recorder.describe(streak.first)}"
    good = newest_checkpoint(trainer, lambda step: step <= first and is_scheduled(trainer, step))
    if trainer.rewinds or good is None:
        why = "no checkpoint was saved before them"
        if trainer.rewinds:
            why = "the run has gone back once already, from step {} to {}".format(*trainer.rewinds[0])
        hint = f"foreseen replay {bundle} tells which samples and which module. " if bundle.is_dir() else ""
        raise BadInput(
            f"{found}; and {why}: it stops. {hint}Lower optim.base_lr, lengthen the warm-up, set optim.clip_grad or "
            "compute.precision=fp32, in another run.dir. run.rewind_after=null goes on in this one regardless"
        )
    on_rank_zero(trainer.accelerator, partial(trainer.checkpoints.drop_after, good))
    load(trainer, good)
    trainer.rewinds.append((after, good))
    log.go_back(good)
    if trainer.ledger is not None:
        trainer.ledger.forget(good, after)
    log.say(
        f"{found}. Going back to the checkpoint of step {good}. What was logged since then is dropped, and the data of "
        f"{after - good} steps is passed over. The next time the run stops"
    )
    return good
