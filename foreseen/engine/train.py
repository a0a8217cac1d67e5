"""THE loop: drives any objective from the first step, or the newest checkpoint, to the last.

One step: take this rank's micro-batches, `prepare`, forward and backward each, clip once, update unless a gradient is
not finite, `after_step`. The host reads nothing from the device but when it logs or saves.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foreseen.config import Config
from foreseen.data.batch import Batch, BatchLayout, Problem
from foreseen.data.feed import Feeder
from foreseen.data.loader import SweepDataset
from foreseen.data.views import finish
from foreseen.engine.batch_statistics import KeptStatistics, batch_statistics
from foreseen.engine.bundle import stream_shift
from foreseen.engine.checkpoint import Checkpoint, Checkpoints
from foreseen.engine.compiled import compile_advice, uncompiled
from foreseen.engine.evaluate import evaluate
from foreseen.engine.launch import autocast, image_dtype, place, wrap
from foreseen.engine.ledger import Ledger
from foreseen.engine.log import Meter, RunLog, duration
from foreseen.engine.loss_scale import LossScale
from foreseen.engine.memory import (
    advise_on_probes,
    advise_on_scores,
    advise_on_steps,
    advise_on_weights,
    memory_advice,
)
from foreseen.engine.objective import Objective, Progress
from foreseen.engine.online_probe import OnlineProbe
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.engine.preempt import Preemption
from foreseen.engine.recorder import FlightRecorder
from foreseen.engine.resume import check_same_run, describe_data, run_state
from foreseen.engine.run_folder import clear_preempted, mark_preempted
from foreseen.engine.unreadable import TRAINING, UnreadableList
from foreseen.engine.watch import look
from foreseen.engine.weight_average import WeightAverage
from foreseen.errors import BadInput

_SHOWN = 5  # unreadable samples a line of metrics; the list has them all
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that a run is made of.

    Attributes:
        config: with its length resolved.
        objective: on the CPU, drawn from the config's seed.
        builder: what the training batches are made from.
        subset: sample numbers trained on; None for all.
        validation: this rank's share of the samples to choose by, if any.
        choose_by: the validation number whose largest value marks the best checkpoint.
        probe: what judges the frozen encoder on the way, if anything does.
        parents: what the weights began from, each with its "source" and "weights_sha256"; see `parents_of`.
        verb: the command that makes such jobs, so that `foreseen replay` can make it again.
    """

    config: Config
    objective: Objective
    builder: Feeder
    subset: Any = None
    validation: SweepDataset | None = None
    choose_by: str | None = None
    probe: OnlineProbe | None = None
    parents: Sequence[Mapping[str, Any]] = ()
    verb: str = ""


@dataclass(frozen=True)
class Outcome:
    """Where a run ended.

    Attributes:
        step: updates made.
        preempted: it was told to stop, and is not at its end.
        best_step: by validation, if there is any.
        told_to_stop: so it was, perhaps at its very end.
        parents: what its weights began from, at its first start, wherever that lies now.
    """

    step: int
    preempted: bool
    best_step: int | None = None
    told_to_stop: bool = False
    parents: Sequence[Mapping[str, Any]] = ()


def train(job: Job, accelerator: Accelerator) -> Outcome:
    """Run a job to its end, or to the step after which it was told to stop.

    The caller holds the run folder's lock on rank 0. A run folder with a checkpoint of this very job is continued. When
    the run reached its end, the objective holds the weights to hand over: their average, where one is kept.
    """
    config, run = job.config, job.config.run
    with memory_advice("placing the weights", partial(advise_on_weights, config)):
        trainer = Trainer(job, accelerator)
        step = trainer.restore()
    if accelerator.is_main_process:
        clear_preempted(run.dir)
    log = RunLog(run.dir, trainer.total_steps, step, speaks=accelerator.is_main_process)
    if step:
        log.say(f"going on from step {step} of {trainer.total_steps}")
    for note in trainer.feed.notes:
        log.say(note)
    if trainer.optimizer.waits_for_device:
        log.say(
            f"optim.name {config.optim.name} learns on the host whether a step is finite, so every step waits for the "
            "device; adamw need not"
        )
    if trainer.layout.micro_size < config.batch.global_size and batch_statistics(job.objective):
        log.say(
            f"{config.model.name} has BatchNorm, whose statistics are over each micro-batch of "
            f"{trainer.layout.micro_size}: unlike all else they depend on batch.micro_size and the number of ranks"
        )
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
                trainer.probe(step, log)
            batches = trainer.batches(step)
            stopped = False
            while step < trainer.total_steps and not stopped:
                first = trainer.step(step, batches)
                step += 1
                stopped = preemption.agreed(step)
                ended = step == trainer.total_steps
                evaluates = job.validation is not None and (ended or _every(run.eval_every or run.save_every, step))
                saves = stopped or ended or trainer.is_scheduled(step)
                if saves or _every(run.log_every, step):
                    trainer.log(step, log)
                    with trainer.meter.paused():
                        good = look(trainer, log)
                    if good is not None:
                        step, batches = good, trainer.batches(good)
                        if job.probe is not None:
                            job.probe.recall(run.dir / "metrics.jsonl", accelerator)
                        continue
                with trainer.meter.paused():
                    if ended or _every(run.pictures_every or run.save_every, step):
                        trainer.show(step, first, log)
                    score = trainer.validate(step, log) if evaluates else None
                    if saves:
                        trainer.save(step, score)
                    if not stopped:
                        trainer.probe(step, log)
                log.advance(step)
            if trainer.average is not None and step == trainer.total_steps:
                trainer.average.hand_over()
            if said := trainer.unreadable.summary(trainer.feed.num_samples):
                log.say(said)
    finally:
        log.close()
    best = trainer.checkpoints.best
    best_step = best[0] if best else None
    preempted = stopped and step < trainer.total_steps
    if preempted and accelerator.is_main_process:
        mark_preempted(run.dir, step)
    return Outcome(step, preempted, best_step, stopped, trainer.parents)


def _every(interval: int, step: int) -> bool:
    return step % interval == 0


class Trainer:
    """The state of a run while it is being made, and what happens in one step.

    Attributes:
        rewinds: times that the run went back, from so many updates to so many; `watch` does it.
    """

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        config = job.config
        self.job = job
        self.accelerator = accelerator
        self.total_steps = config.run.steps or 0
        ranks = accelerator.num_processes
        micro_size = config.batch.micro_size or max(1, config.batch.global_size // ranks)
        self.layout = BatchLayout(config.batch.global_size, micro_size, ranks)
        if micro_size % job.objective.group:
            raise BadInput(
                f"batch.micro_size {micro_size} is no multiple of {job.objective.group}, the size of the groups in "
                f"which {config.method.name} relates images to each other"
            )
        self.feed = job.builder.feed(self.layout, accelerator.process_index, job.subset)
        place(job.objective, accelerator, config.compute)
        self.optimizer = SteppedOptimizer(
            job.objective,
            job.objective.parameter_rules(config.optim.layer_decay),
            config.optim,
            global_size=config.batch.global_size,
            total_steps=self.total_steps,
        )
        self.model: nn.Module = wrap(job.objective, accelerator)
        self.loss_scale = LossScale(accelerator.device) if config.compute.precision == "fp16" else None
        decay = config.optim.ema_decay
        self.average = None if decay is None else WeightAverage(job.objective, decay)
        self.data = describe_data(job.builder.shards, labels=job.objective.request.labels)
        self.data["order"] = self.feed.order_name
        self.statistics = KeptStatistics(job.objective)
        self.checkpoints = Checkpoints(config.run.dir / "checkpoints", config.run.keep_last)
        self.meter = Meter()
        kept = config.run.ledger
        self.ledger = (
            Ledger(config.run.dir, self.layout, self.total_steps, accelerator, pixels=kept == "pixels")
            if kept
            else None
        )
        self.skipped = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        self.problems: list[Problem] = []
        self.unreadable = UnreadableList(config.run.dir, accelerator)
        self.parents = job.parents
        run = config.run
        self.recorder = FlightRecorder(run.recorder, run.explode_factor) if run.recorder else None
        self.rewinds: list[tuple[int, int]] = []

    def progress(self, step: int) -> Progress:
        config = self.job.config
        return Progress(
            step=step,
            total_steps=self.total_steps,
            steps_per_epoch=self.total_steps / (config.run.epochs or 1.0),
            seed=config.seed,
            ranks=self.layout.ranks,
            micro_batches=self.layout.accumulation,
        )

    def batches(self, step: int) -> Iterator[Batch]:
        shift = stream_shift(self.rewinds)
        cuda = self.accelerator.device.type == "cuda"
        return self.feed.batches(
            step + shift, self.total_steps + shift, workers=self.job.config.data.workers, pin_memory=cuda
        )

    def settle_buckets(self) -> None:
        """Let DDP lay out its gradient buckets before the first step.

        It lays them out anew after its first backward, and the order of sums over three and more ranks depends on
        the layout; so a resumed run would add in another order than an unbroken one. Two passes of weight zero,
        at every start, put both in the same state.
        """
        if self.layout.ranks == 1:
            return
        batch = self.finished(self.feed.example())
        progress = self.progress(0)
        self.statistics.keep()
        for _ in range(2):
            with torch.no_grad(), self.autocast():
                prepared = self.job.objective.prepare([batch], progress)[0]
            with self.autocast():
                loss = self.model(batch, prepared, progress)["loss"]
            self.accelerator.backward(loss * 0.0)
            self.optimizer.optimizer.zero_grad(set_to_none=True)
        self.statistics.put_back(torch.zeros((), dtype=torch.bool, device=self.accelerator.device))
        self.problems.clear()  # of a batch that is no part of the run here

    def step(self, step: int, batches: Iterator[Batch]) -> Batch:
        """Make one update; returns the first micro-batch, for pictures."""
        objective, accumulation = self.job.objective, self.layout.accumulation
        progress = self.progress(step)
        waiting = time.perf_counter()
        loaded = [next(batches) for _ in range(accumulation)]
        waited_s = time.perf_counter() - waiting
        if self.ledger is not None:
            self.ledger.add(loaded)
        if self.recorder is not None:
            self.recorder.note(step, loaded)
        micro_batches = [self.finished(batch) for batch in loaded]

        self.statistics.keep()
        with torch.no_grad(), self.autocast():
            prepared = objective.prepare(micro_batches, progress)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            last = number == accumulation - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.autocast():
                    losses = self.model(batch, prepared[number], progress)
                loss = losses["loss"] / accumulation
                self.accelerator.backward(loss if self.loss_scale is None else loss * self.loss_scale.value)
            for name, value in losses.items():
                share = value.detach() / accumulation
                sums[name] = sums[name] + share if name in sums else share

        norm, finite = self._clip()
        if self.recorder is not None:
            scale = {} if self.loss_scale is None else {"loss_scale": self.loss_scale.value}
            self.recorder.add(step, {**sums, "grad_norm": norm, **scale}, finite)
        self.optimizer.step(step, finite)
        with torch.no_grad():
            self.statistics.put_back(finite)
            objective.after_step(progress, finite)
            if self.loss_scale is not None:
                self.loss_scale.update(finite)
            if self.average is not None:
                self.average.update(step, finite)
            self.skipped += ~finite
            # One bad step would hide the interval's mean behind a NaN.
            shown = {name: torch.where(finite, value, torch.zeros_like(value)) for name, value in sums.items()}
            shown |= {"grad_norm": torch.where(finite, norm, 0.0), "finite": finite.to(torch.float32)}
        self.meter.add(shown, samples=self.layout.global_size, waited_s=waited_s)
        return micro_batches[0]

    def finished(self, batch: Batch) -> Batch:
        """A batch of the loader as the objective sees it."""
        self.problems.extend(batch.problems)
        return finish(batch, self.job.objective.request, self.accelerator.device, image_dtype(self.job.config.compute))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.accelerator, self.job.config.compute)

    def advise(self) -> str:
        """What to set where the memory of training runs out."""
        return advise_on_steps(self.job.config, self.layout, self.job.objective)

    def judged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the objective holds the weights that would be handed over."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def _clip(self) -> tuple[Tensor, Tensor]:
        """Gradient norm before clipping, and whether it is finite: both the same on every rank after DDP."""
        gradients = [p.grad for p in self.optimizer.parameters.values() if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        limit = self.job.config.optim.clip_grad
        if limit is not None:
            torch.nn.utils.clip_grads_with_norm_(self.optimizer.parameters.values(), limit, norm)
        return norm, torch.isfinite(norm)

    def log(self, step: int, log: RunLog) -> None:
        """Write the numbers of the steps since the last line."""
        if self.ledger is not None:
            self.ledger.write(step)
        means = self.meter.means(self.layout.ranks)  # waits for the device, so it comes before the clock is read
        elapsed_s, waited_s, samples = self.meter.elapsed_s, self.meter.waited_s, self.meter.samples
        finite = means.pop("finite")
        means = {name: value / finite if finite else float("nan") for name, value in means.items()}
        health = {f"health/{name}": float(value) for name, value in self.job.objective.health().items()}
        unreadable, skipped = self._count_problems(log), int(self.skipped)
        values = {
            "epoch": step * self.layout.global_size / self.feed.num_samples,
            **means,
            "lr": self.optimizer.lr(step - 1),
            **({} if self.loss_scale is None else {"loss_scale": float(self.loss_scale.value)}),
            **health,
            "skipped_steps": skipped,
            "unreadable_samples": unreadable,
            "images_per_s": samples / elapsed_s,
            "data_wait": waited_s / elapsed_s,
        }
        left_s = (self.total_steps - step) * elapsed_s * self.layout.global_size / samples
        line = (
            f"step {step}/{self.total_steps}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  "
            f"lr {values['lr']:.3g}  {values['images_per_s']:.0f} img/s  data wait {values['data_wait']:.0%}  "
            f"ETA {duration(left_s)}"
        )
        if skipped:
            line += f"  skipped {skipped} non-finite steps"
        log.scalars(step, values, line=line)
        self.meter.reset()

    def _count_problems(self, log: RunLog) -> int:
        """List what could not be read since the last line; the samples trained on that could not be read so far."""
        self._list(self.problems, TRAINING, log, lambda problem: problem.position // self.layout.global_size + 1)
        self.problems.clear()
        self.unreadable.check(self.job.config.data.max_bad_fraction, self.feed.num_samples)
        return len(self.unreadable.trained)

    def _list(self, problems: Sequence[Problem], use: str, log: RunLog, step_of: Callable[[Problem], int]) -> None:
        new = self.unreadable.add(problems, use, step_of)
        for problem in new[:_SHOWN]:
            log.say(f"unreadable, {'replaced' if use == TRAINING else 'in ' + use}: {problem}")
        if len(new) > _SHOWN:
            log.say(f"unreadable, {len(new) - _SHOWN:,} more: {self.unreadable.file} lists them")

    def show(self, step: int, batch: Batch, log: RunLog) -> None:
        """Send the objective's pictures of a batch to TensorBoard."""
        if not self.accelerator.is_main_process:
            return
        objective = self.job.objective
        objective.eval()
        with torch.no_grad(), self.autocast(), uncompiled(self.job.config.compute.backend):
            log.pictures(step, objective.pictures(batch, self.progress(step - 1)))
        objective.train()

    def validate(self, step: int, log: RunLog) -> float | None:
        """Score the validation samples; returns the number to choose by."""
        job = self.job
        if job.validation is None:
            return None
        started = time.perf_counter()
        advice = partial(advise_on_scores, self.layout, job.objective.group)
        with self.judged(), memory_advice(f"in validation at batch.micro_size {self.layout.micro_size}", advice):
            problems: list[Problem] = []
            numbers = evaluate(
                job.objective, job.validation, self.accelerator, job.config.compute, workers=job.config.data.workers,
                problems=problems,
            )  # fmt: skip
        self._list(problems, "validation", log, lambda _: step)
        values = {f"validation/{name}": value for name, value in numbers.items()}
        line = f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        log.scalars(step, values | {"validation/seconds": time.perf_counter() - started}, line=line)
        return numbers[job.choose_by] if job.choose_by else None

    def probe(self, step: int, log: RunLog) -> None:
        """Judge the frozen encoder, if that is due."""
        probe = self.job.probe
        if probe is None or not probe.is_due(step, self.total_steps):
            return
        with self.judged(), memory_advice("in a probe", advise_on_probes):
            values, line, problems = probe.run(
                step, self.job.objective.encoder(), self.accelerator, self.job.config.compute,
                batch_size=self.layout.micro_size, workers=self.job.config.data.workers,
            )  # fmt: skip
        self._list(problems, "probe", log, lambda _: step)
        log.scalars(step, values, line=line)

    def is_scheduled(self, step: int) -> bool:
        """Whether a checkpoint is due after so many updates, whatever happens."""
        run = self.job.config.run
        evaluates = self.job.validation is not None and _every(run.eval_every or run.save_every, step)
        return evaluates or _every(run.save_every, step)

    def save(self, step: int, score: float | None) -> None:
        """Publish a checkpoint; rank 0 writes, since no state differs between ranks."""
        if self.accelerator.is_main_process:
            tensors, numbers = self.optimizer.state()
            state = run_state(self.job.config, self.data, self.parents, step) | {
                "optimizer": numbers,
                "skipped_steps": int(self.skipped),
                "unreadable_samples": sorted(self.unreadable.trained),
                "loss_scale": None if self.loss_scale is None else self.loss_scale.state(),
                "score": score,
                "rewinds": self.rewinds,
                "recorder": None if self.recorder is None else self.recorder.state(),
            }
            average = None if self.average is None else self.average.state()
            # What the run would go back to stays, though others follow while it goes wrong or is told to stop.
            streak = None if self.recorder is None else self.recorder.streak
            last = step if streak is None else streak.first.step
            good = lambda saved: saved <= last and self.is_scheduled(saved)  # noqa: E731
            self.checkpoints.save(step, self.job.objective.state_dict(), tensors, state, average, good)
            self._mark_if_best(step, score)
        self.accelerator.wait_for_everyone()

    def _mark_if_best(self, step: int, score: float | None) -> None:
        best = self.checkpoints.best
        if score is not None and (best is None or score > best[1]):
            self.checkpoints.mark_best(step, score)

    def restore(self) -> int:
        """Go on from the newest sound checkpoint of this run; returns the updates already made."""
        if self.accelerator.is_main_process:
            self.checkpoints.clean_leftovers()
        newest = self.newest_checkpoint(lambda step: True)
        if newest is None:
            self.unreadable.recall(0)
            return 0
        if self.accelerator.is_main_process:
            self.checkpoints.set_aside_newer(newest)
        self.load(newest)
        return newest

    def newest_checkpoint(self, eligible: Callable[[int], bool]) -> int | None:
        """The step of the newest sound one among some; rank 0 looks for all."""
        newest = [self.checkpoints.newest_sound(eligible) if self.accelerator.is_main_process else None]
        if self.layout.ranks > 1:
            torch.distributed.broadcast_object_list(newest, src=0)
        return newest[0]

    def load(self, step: int) -> None:
        """Take the state of a checkpoint of this run."""
        found = self.checkpoints.load(step)
        try:
            self._take_up(found)
        except (BadInput, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            where = self.checkpoints.folder / f"step-{found.step}"
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise BadInput(f"the checkpoint {where} is not what this run saved ({reason}); delete it") from error

    def _take_up(self, found: Checkpoint) -> None:
        check_same_run(self.job.config, self.job.builder.shards, self.feed.order_name, self.job.parents, found.state)
        self.job.objective.load_state_dict(found.model)
        self.optimizer.load_state(found.optimizer, found.state["optimizer"])
        if self.loss_scale is not None:
            self.loss_scale.load_state(found.state["loss_scale"])
        if self.average is not None:
            assert found.average is not None, "a run that keeps an average saves it"
            self.average.load_state(found.average)
        self.skipped.fill_(found.state["skipped_steps"])
        self.unreadable.recall(found.step, found.state["unreadable_samples"])
        self.parents = found.state["parents"]
        self.rewinds = [(begin, end) for begin, end in found.state.get("rewinds", [])]  # not in those of older versions
        if self.recorder is not None:
            self.recorder.load_state(found.state.get("recorder"), found.step)
        if self.accelerator.is_main_process:
            self._mark_if_best(found.step, found.state["score"])  # a kill may have come between the two


def load_best(job: Job, outcome: Outcome) -> Checkpoint:
    """The checkpoint that a finished run is judged by: the best on validation, else or if damaged the last."""
    checkpoints = Checkpoints(job.config.run.dir / "checkpoints", job.config.run.keep_last)
    best = outcome.best_step
    if best is not None and (problem := checkpoints.find_damage(best)) is not None:
        _logger.warning("the best checkpoint, step-%d, is damaged (%s); taking the last one", best, problem)
        best = None
    return checkpoints.load(best or outcome.step)
