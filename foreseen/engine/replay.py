"""One step of a run, made again from its bundle, and looked at closely.

The step is made as the loop makes it, then twice more: with eyes on every module and gradient, and in groups as small
as the method allows, which is one sample for most. Before each the state before the step is loaded.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foreseen.config import Config
from foreseen.data.batch import Batch, BatchLayout
from foreseen.engine.batch_statistics import batch_statistics
from foreseen.engine.bundle import Bundle, stream_shift
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.compiled import uncompiled
from foreseen.engine.job import Job
from foreseen.engine.launch import describe_devices
from foreseen.engine.recorder import Record
from foreseen.engine.resume import check_same_run
from foreseen.engine.run_folder import describe_start
from foreseen.engine.saving import load, newest_checkpoint, save
from foreseen.engine.trainer import Trainer
from foreseen.errors import BadInput

# How far numbers may lie apart where sums are rounded in another order; along the way from the checkpoint it grows.
TOLERANCES = {"fp64": 1e-9, "fp32": 1e-3, "bf16": 0.05, "fp16": 0.05}
_DEVIATIONS = 10  # an outlying number is so many of them above the median
_FEWEST = 8  # groups that a median says something of
_TELL_EVERY_S = 10.0


@dataclass(frozen=True)
class Number:
    """A number of the step: as recorded, and as it came out now."""

    name: str
    recorded: float
    found: float

    @property
    def is_equal(self) -> bool:
        """Bit for bit; one NaN is like another."""
        return self.recorded == self.found or (math.isnan(self.recorded) and math.isnan(self.found))

    @property
    def difference(self) -> float:
        """Relative to what was recorded; infinite where one of the two is finite and the other is not."""
        if self.is_equal or not (math.isfinite(self.recorded) or math.isfinite(self.found)):
            return 0.0
        difference = abs(self.found - self.recorded) / max(abs(self.recorded), 1e-300)
        return difference if math.isfinite(difference) else math.inf


@dataclass(frozen=True)
class Group:
    """Consecutive samples that the method relates to each other, by name; one, for most methods."""

    samples: tuple[str, ...]
    loss: float
    grad_norm: float


@dataclass
class Findings:
    """Where numbers ceased to be finite.

    Attributes:
        weights: that were not finite before the step.
        module: the first whose output is not finite, the loss itself as ""; None if all are.
        input_was_finite: of that module.
        gradients: parameters whose gradient is not finite, in the order of the backward pass.
        largest: norm of each parameter's gradient that is finite.
    """

    weights: list[str] = field(default_factory=list)
    module: str | None = None
    input_was_finite: bool = True
    gradients: list[str] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Replay:
    """What came of a replay.

    Attributes:
        step, begun_at: the step, and where the way to it began.
        numbers: of the step.
        way: steps before it that were made again and are in the ring, and how many of them came out bit for bit.
        differs: what is not as it was when the run recorded the step, such as the ranks.
        promised: whether bits have to agree: nothing differs, and the device is a CPU.
        tolerance: for numbers where they need not.
        findings: where numbers ceased to be finite.
        groups: all samples with their loss and the norm of their gradient; None where they cannot be told apart.
        outlying: those of them that stand out, the worst first.
        kept: whether the next replay begins at the step.
    """

    step: int
    begun_at: int
    numbers: tuple[Number, ...]
    way: tuple[int, int]
    differs: tuple[str, ...]
    promised: bool
    tolerance: float
    findings: Findings
    groups: tuple[Group, ...] | None
    outlying: tuple[Group, ...]
    kept: bool

    @property
    def is_equal(self) -> bool:
        """Whether all numbers came out bit for bit."""
        return all(number.is_equal for number in self.numbers)

    @property
    def is_reproduced(self) -> bool:
        """Bit for bit where that is promised, else within the tolerance."""
        return self.is_equal or (
            not self.promised and all(number.difference <= self.tolerance for number in self.numbers)
        )


def config_for(bundle: Bundle, config: Config) -> Config:
    """The config of a replay in one process: the micro-batches of all ranks one after another."""
    return config.model_copy(
        update={
            "batch": config.batch.model_copy(update={"micro_size": bundle.micro_size}),
            "run": config.run.model_copy(update={"recorder": 1, "keep_last": 2}),
        }
    )


def replay(job: Job, bundle: Bundle, accelerator: Accelerator, say: Callable[[str], None], *, keep: bool) -> Replay:
    """Make the step of a bundle again.

    Args:
        job: of `config_for`; its run folder holds the bundle's checkpoint.
        bundle: what was recorded.
        accelerator: of one process.
        say: tells a person how it goes.
        keep: keep the state before the step in the run folder in any case; else only if it is the run's to the bit.

    Raises:
        BadInput: the data, the starting weights or the program are not those of the run, or the checkpoint is damaged.
    """
    config, step = job.config, bundle.step
    trainer = Trainer(job, accelerator)
    frozen_inputs = job.objective.frozen_inputs()
    check_same_run(config, job.builder.shards, trainer.feed.order_name, job.parents, frozen_inputs, bundle.run)
    job.objective.train()
    begun_at = newest_checkpoint(trainer, lambda saved: saved <= step)
    if begun_at is not None:
        load(trainer, begun_at)
    elif bundle.checkpoint is not None:
        raise BadInput(
            f"{trainer.checkpoints.folder} has no sound checkpoint up to step {step}, which the way there begins from; "
            "bring that of the bundle back"
        )
    trainer.rewinds = list(bundle.rewinds)  # which the checkpoint may be older than
    made = _make(trainer, range(begun_at or 0, step), say)
    differs = _differences(bundle, accelerator)
    kept = keep or not differs
    with TemporaryDirectory(dir=config.run.dir) as temporary:
        if not kept:
            trainer.checkpoints = Checkpoints(Path(temporary), keep_last=1)
        if begun_at != step or not kept:
            save(trainer, step, None)
        found = _make(trainer, range(step, step + 1), say)[step]
        with uncompiled(config.compute.backend):
            load(trainer, step)
            findings = _look_inside(trainer, step)
            load(trainer, step)
            groups = _each_group(trainer, bundle)
    way = [record.values == made[record.step].values for record in bundle.ring if record.step in made]
    return Replay(
        step=step,
        begun_at=begun_at or 0,
        numbers=tuple(_compare(bundle.ring[-1], found)),
        way=(len(way), sum(way)),
        differs=differs,
        promised=not differs and accelerator.device.type == "cpu",
        tolerance=TOLERANCES[config.compute.precision],
        findings=findings,
        groups=groups,
        outlying=outlying(groups or ()),
        kept=kept,
    )


def _make(trainer: Trainer, steps: range, say: Callable[[str], None]) -> dict[int, Record]:
    """Make steps as the loop does, and read their numbers."""
    assert trainer.recorder is not None
    made = {}
    batches = trainer.batches(steps.start)
    told = time.monotonic()
    for step in steps:
        trainer.step(step, batches)
        (made[step],) = trainer.recorder.read(1, trainer.optimizer.lr)
        if time.monotonic() - told > _TELL_EVERY_S:
            told = time.monotonic()
            say(f"on the way: step {step} of {steps.start} to {steps.stop}")
    return made


def _compare(recorded: Record, found: Record) -> Iterator[Number]:
    for name, value in recorded.values.items():
        yield Number(name, value, found.values.get(name, math.nan))


def _differences(bundle: Bundle, accelerator: Accelerator) -> tuple[str, ...]:
    now = describe_start(describe_devices(accelerator))
    differences = []
    for part in ("packages", "machine"):
        before, after = bundle.environment.get(part, {}), now[part]
        names = [name for name in after if before.get(name) != after[name]]
        differences += [f"{name} was {before.get(name)} and is {after[name]}" for name in names]
    return tuple(differences)


def _look_inside(trainer: Trainer, step: int) -> Findings:
    """Make the step with eyes on every module's output and every parameter's gradient."""
    objective = trainer.job.objective
    scale = 1.0 if trainer.loss_scale is None else float(trainer.loss_scale.value)
    state = objective.state_dict().items()
    findings = Findings(weights=[name for name, value in state if not _all_finite(value)])

    def see_output(name: str, module: nn.Module, given: Any, named: Any, output: Any) -> None:
        if findings.module is None and not _all_finite(output):
            findings.module, findings.input_was_finite = name, _all_finite((given, named))

    def see_gradient(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if _all_finite(parameter.grad):
            findings.largest[name] = float(parameter.grad.norm()) / scale
        elif name not in findings.gradients:
            findings.gradients.append(name)

    with ExitStack() as hooks:
        for name, module in objective.named_modules():
            hook = module.register_forward_hook(partial(see_output, name), with_kwargs=True)
            hooks.callback(hook.remove)
        for name, parameter in trainer.optimizer.parameters.items():
            hook = parameter.register_post_accumulate_grad_hook(partial(see_gradient, name))  # type: ignore[no-untyped-call]
            hooks.callback(hook.remove)
        trainer.step(step, trainer.batches(step))
    return findings


def _all_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, Batch):
        return _all_finite((value.images, value.draws))
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    return all(map(_all_finite, value)) if isinstance(value, tuple | list) else True


def _each_group(trainer: Trainer, bundle: Bundle) -> tuple[Group, ...] | None:
    """Loss and gradient of the smallest micro-batches that the method allows; moves no weights."""
    job, objective = trainer.job, trainer.job.objective
    layout = BatchLayout(job.config.batch.global_size, objective.group)
    feed, place = job.builder.feed(layout, 0, job.subset), bundle.step + stream_shift(bundle.rewinds)
    progress = replace(trainer.progress(bundle.step), micro_batches=layout.accumulation)
    loaded = feed.batches(place, place + 1, workers=0, pin_memory=False)
    batches = [trainer.finished(batch) for batch in loaded]
    with torch.no_grad(), trainer.autocast():
        prepared = objective.prepare(batches, progress)
    scale = 1.0 if trainer.loss_scale is None else float(trainer.loss_scale.value)
    groups = []
    try:
        for number, (batch, its) in enumerate(zip(batches, prepared, strict=True)):
            trainer.optimizer.optimizer.zero_grad(set_to_none=True)
            with trainer.autocast():
                loss = objective(batch, its, progress)["loss"]
            (loss * scale).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in objective.parameters() if p.grad is not None])
            samples = bundle.samples[number * objective.group :][: objective.group]
            groups.append(Group(tuple(sample.name for sample in samples), float(loss.detach()), float(norm) / scale))
    except ValueError:
        if not batch_statistics(objective):
            raise
        return None  # BatchNorm has no statistics of a single value
    return tuple(groups)


def outlying(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups that stand out, the worst first.

    Those whose loss or gradient is not finite; and those in which one of them lies above the median by more than ten
    of the deviations that half of all groups keep within, scaled to be a normal distribution's standard deviation.
    """

    def is_sound(group: Group) -> bool:
        return math.isfinite(group.loss) and math.isfinite(group.grad_norm)

    sound = [group for group in groups if is_sound(group)]
    limits = [_limit([getattr(group, name) for group in sound]) for name in ("loss", "grad_norm")]
    high = [group for group in sound if group.loss > limits[0] or group.grad_norm > limits[1]]
    return (
        *(group for group in groups if not is_sound(group)),
        *sorted(high, key=lambda group: group.grad_norm, reverse=True),
    )


def _limit(values: Sequence[float]) -> float:
    if len(values) < _FEWEST:
        return math.inf
    median = statistics.median(values)
    deviation = 1.4826 * statistics.median(abs(value - median) for value in values)
    return median + _DEVIATIONS * deviation if deviation else math.inf
