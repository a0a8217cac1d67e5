"""THE loop: drives any objective from the first step, or the newest checkpoint, to the last.

The host reads nothing from the device but when it logs or saves. `trainer.py` has what happens in one step, `saving.py`
how a run goes on, `reports.py` what it tells, `watch.py` what becomes of bad steps.
"""

from functools import partial

from accelerate import Accelerator

from foreseen.engine.batch_statistics import batch_statistics
from foreseen.engine.compiled import compile_advice
from foreseen.engine.job import Job, Outcome
from foreseen.engine.log import RunLog
from foreseen.engine.memory import advise_on_weights, memory_advice
from foreseen.engine.preempt import Preemption
from foreseen.engine.reports import log_numbers, probe, show, validate
from foreseen.engine.run_folder import clear_preempted, mark_preempted
from foreseen.engine.saving import is_due, is_scheduled, restore, save
from foreseen.engine.trainer import Trainer
from foreseen.engine.watch import look
from foreseen.errors import BadInput
from foreseen.masked import masked


def train(job: Job, accelerator: Accelerator) -> Outcome:
    """Run a job to its end, or to the step after which it was told to stop.

    The caller holds the run folder's lock on rank 0. A run folder with a checkpoint of this very job is continued. When
    the run reached its end, the objective holds the weights to hand over: their average, where one is kept.
    """
    config, run = job.config, job.config.run
    if run.stop_after is not None and (job.validation is None or job.choose_by is None):
        raise BadInput(
            f"run.stop_after {run.stop_after} waits for better validation, and there is none: set it to null"
        )
    with memory_advice("placing the weights", partial(advise_on_weights, config)):
        trainer = Trainer(job, accelerator)
        step = restore(trainer)
    if accelerator.is_main_process:
        clear_preempted(run.dir)
    log = RunLog(run.dir, trainer.total_steps, step, speaks=accelerator.is_main_process)
    if step:
        log.say(f"going on from step {step} of {trainer.total_steps}")
    _say_what_to_know(trainer, log)
    if job.probe is not None:
        job.probe.recall(run.dir / "metrics.jsonl", accelerator)
    try:
        with (
            Preemption(accelerator.num_processes) as preemption,
            compile_advice(config.compute.backend),
            memory_advice(f"in training at batch.micro_size {trainer.layout.micro_size}", trainer.advise),
        ):
            job.objective.train()
            trainer.settle_buckets()
            with trainer.meter.paused():
                probe(trainer, step, log)
            batches = trainer.batches(step)
            stopped = False
            while step < trainer.total_steps and not stopped and not trainer.patience.is_over:
                first = None  # or its images would be held through the next step
                first = trainer.step(step, batches)
                step += 1
                stopped = preemption.agreed(step)
                ended = step == trainer.total_steps
                evaluates = job.validation is not None and (ended or is_due(run.eval_every or run.save_every, step))
                saves = stopped or ended or is_scheduled(trainer, step)
                if saves or is_due(run.log_every, step):
                    log_numbers(trainer, step, log)
                    with trainer.meter.paused():
                        good = look(trainer, log)
                    if good is not None:
                        step, batches = good, trainer.batches(good)
                        if job.probe is not None:
                            job.probe.recall(run.dir / "metrics.jsonl", accelerator)
                        continue
                with trainer.meter.paused():
                    if ended or is_due(run.pictures_every or run.save_every, step):
                        show(trainer, step, first, log)
                    score = validate(trainer, step, log) if evaluates else None
                    trainer.patience.judge(score)
                    if saves:
                        save(trainer, step, score)
                    if not stopped:
                        probe(trainer, step, log)
                log.advance(step)
            if trainer.patience.is_over and step < trainer.total_steps:
                log.say(f"{trainer.patience.describe()}: the run ends at step {step} of {trainer.total_steps}")
            if trainer.average is not None and (step == trainer.total_steps or trainer.patience.is_over):
                trainer.average.hand_over()
            if said := trainer.unreadable.summary(trainer.feed.num_samples):
                log.say(said)
    finally:
        log.close()
    best = trainer.checkpoints.best
    best_step = best[0] if best else None
    preempted = stopped and step < trainer.total_steps and not trainer.patience.is_over
    if preempted and accelerator.is_main_process:
        mark_preempted(run.dir, step)
    return Outcome(step, preempted, best_step, stopped, trainer.parents)


def _say_what_to_know(trainer: Trainer, log: RunLog) -> None:
    config, objective, micro_size = trainer.job.config, trainer.job.objective, trainer.layout.micro_size
    for note in (*trainer.feed.notes, *objective.notes):
        log.say(note)
    if trainer.job.verb == "pretrain" and config.model.init_from is not None and trainer.job.probe is None:
        log.say(
            f"the run begins from {masked(config.model.init_from)}, and nothing compares with that: set "
            "probe.every=500, and a labelled set in probe.data where there is one"
        )
    if trainer.optimizer.waits_for_device:
        log.say(
            f"optim.name {config.optim.name} learns on the host whether a step is finite, so every step waits for the "
            "device; adamw need not"
        )
    if micro_size < config.batch.global_size and batch_statistics(objective):
        log.say(
            f"{config.model.name} has BatchNorm, whose statistics are over each micro-batch of {micro_size}: unlike "
            "all else they depend on batch.micro_size and the number of ranks"
        )
