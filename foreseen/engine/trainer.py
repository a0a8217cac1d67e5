"""The state of a run while it is being made, and what happens in one step.

One step: take this rank's micro-batches, `prepare`, forward and backward each, clip once, update unless a gradient is
not finite, `after_step`. The host reads nothing from the device.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foreseen.data.batch import Batch, BatchLayout, Problem
from foreseen.data.views import finish
from foreseen.engine.batch_statistics import KeptStatistics
from foreseen.engine.bundle import stream_shift
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.clip import clip
from foreseen.engine.job import Job
from foreseen.engine.launch import autocast, image_dtype, place, wrap
from foreseen.engine.ledger import Ledger
from foreseen.engine.log import Meter
from foreseen.engine.loss_scale import LossScale
from foreseen.engine.memory import advise_on_steps
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.engine.patience import Patience
from foreseen.engine.recorder import FlightRecorder
from foreseen.engine.resume import describe_data
from foreseen.engine.unreadable import UnreadableList
from foreseen.engine.weight_average import WeightAverage
from foreseen.errors import BadInput


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
        _check_groups(job, self.layout)
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
        self.patience = Patience(run.stop_after)

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

        self.optimizer.drop_frozen()
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

    def _clip(self) -> tuple[Tensor, Tensor]:
        """Gradient norm before clipping, and whether it is finite: both the same on every rank after DDP."""
        gradients = [p.grad for p in self.optimizer.parameters.values() if p.grad is not None]
        if self.loss_scale is not None:
            self.loss_scale.unscale(gradients)
        norm = torch.nn.utils.get_total_norm(gradients)
        optim = self.job.config.optim
        if optim.clip_grad is not None:
            clip(self.optimizer.clip_groups(), optim.clip_grad, optim.clip_per, norm)
        return norm, torch.isfinite(norm)

    def finished(self, batch: Batch) -> Batch:
        """A batch of the loader as the objective sees it."""
        self.problems.extend(batch.problems)
        return finish(batch, self.job.objective.request, self.accelerator.device, image_dtype(self.job.config.compute))

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self.accelerator, self.job.config.compute)

    def judged(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the objective holds the weights that would be handed over."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def advise(self) -> str:
        """What to set where the memory of training runs out."""
        return advise_on_steps(self.job.config, self.layout, self.job.objective)


def _check_groups(job: Job, layout: BatchLayout) -> None:
    group, micro_size = job.objective.group, layout.micro_size
    if micro_size % group == 0:
        return
    fitting = [str(size) for size in layout.micro_sizes if size % group == 0]
    advice = job.objective.group_advice(micro_size)
    raise BadInput(
        f"batch.micro_size {micro_size} is no multiple of {group}, the size of the groups in which "
        f"{job.config.method.name} relates images to each other; "
        + (
            f"micro sizes that fit batch.global_size {layout.global_size} are {', '.join(fitting[-6:])}"
            if fitting
            else f"set batch.global_size to a multiple of {group * layout.ranks}, and batch.micro_size to null"
        )
        + (f"; or set {advice}" if advice else "")
    )
