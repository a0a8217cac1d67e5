"""What the loop asks of a method.

A method is an Objective: a module that says what it wants to see, turns batches into losses, and moves whatever it
keeps besides weights. The loop knows no more of it, and asks for no more. One step is

    prepared = objective.prepare(micro_batches, progress)          # no gradient, all micro-batches of this rank
    for each micro-batch: loss = objective(batch, prepared[i], progress)["loss"]; backward
    clip, optimizer step
    objective.after_step(progress, finite)                         # teachers, centres, codebooks move

Rules that make a run independent of ranks and accumulation:

* Random numbers come from `batch.key` (per sample) or `progress.key` (per step), through `device_keys`.
* `forward` returns a mean over its own images. Where images count unevenly (masked tokens), it returns
  `local_sum * progress.shares / global_count`, with the global count made in `prepare`.
* What relates images to each other does so in groups of consecutive positions; `group` names their size.
* Every trained parameter takes part in every forward, and `requires_grad` never changes after construction.
* "In float32" is `x.to(torch.promote_types(x.dtype, torch.float32))`, so that float64 stays what it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from foreseen.data.batch import Batch
from foreseen.data.views import Request
from foreseen.keys import stream_constant
from foreseen.models.frozen import is_untrained


@dataclass(frozen=True)
class Progress:
    """Where the run stands. `step` is the number of the update being made, from 0."""

    step: int
    total_steps: int
    steps_per_epoch: float
    seed: int
    ranks: int = 1
    micro_batches: int = 1

    @property
    def shares(self) -> int:
        """Micro-batches in the whole global batch; undoes the division by accumulation and ranks."""
        return self.ranks * self.micro_batches

    @property
    def fraction(self) -> float:
        """How much of the run is done, in [0, 1)."""
        return self.step / self.total_steps

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.step / self.steps_per_epoch

    def key(self, device: torch.device) -> Tensor:
        """One integer for draws over the whole global batch, the same on every rank, [1] int64."""
        value = stream_constant(f"step/{self.seed}/{self.step}")
        return torch.full((1,), value - (1 << 64) if value >> 63 else value, dtype=torch.int64, device=device)


@dataclass(frozen=True)
class ParameterRule:
    """How the optimizer treats one parameter.

    Attributes:
        decay: whether weight decay applies.
        lr_scale: factor on the lr; layer decay makes it less than 1 towards the input, and 0 freezes for good.
        frozen_steps: for so many first steps the lr is zero; `requires_grad` must not be used for that.
        ramp_steps: over so many steps more it rises to what it is else.
        drops_gradient: while it is frozen the optimizer does not see its gradient either, so that moments begin after.
        clip_group: parameters of one name are clipped together where `optim.clip_per` is "module".
    """

    decay: bool = True
    lr_scale: float = 1.0
    frozen_steps: int = 0
    ramp_steps: int = 0
    drops_gradient: bool = False
    clip_group: str = ""


class Objective(nn.Module):
    """Base of every method; see the module's docstring for the contract.

    Attributes:
        group: micro-batches must hold a multiple of so many consecutive positions.
        notes: what the user should know of how it was put together, said once when a run starts.
    """

    group: int = 1
    notes: Sequence[str] = ()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the networks that are trained; teachers and tokenizers, which are not, stay as in evaluation.

        So no batch statistics or dropout of a frozen network depend on how a batch is cut.
        """
        super().train(mode)
        for network in self.children():
            if is_untrained(network):
                network.eval()
        return self

    @property
    def request(self) -> Request:
        """What the objective wants of each sample."""
        raise TypeError(f"{type(self).__name__} does not say what it wants to see")

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Any]:
        """Make what needs the whole global batch: teacher targets, codes, counts, centres.

        Runs once per optimizer step, under the loop's autocast and without gradient, before the first forward.

        Returns:
            One entry per micro-batch, handed to `forward` with it.
        """
        return [None] * len(micro_batches)

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The loss of one micro-batch, as "loss", and scalar parts to log, each a mean over its own images."""
        raise TypeError(f"{type(self).__name__} has no forward")

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """Move what is no optimizer's: teachers, centres, codebooks.

        Args:
            progress: of the step just made.
            finite: boolean scalar on the device; where False nothing may change: `torch.where(finite, new, old)`.
        """

    def encoder(self) -> nn.Module:
        """The timm model that is kept and handed on."""
        raise TypeError(f"{type(self).__name__} keeps no encoder")

    def parameter_rules(self, layer_decay: float | None) -> Mapping[str, ParameterRule]:
        """A rule for each trained parameter, by its name in this module.

        The default decays matrices and leaves vectors alone, as every paper here does. Layer decay needs to know the
        layers, so an objective that supports it overrides this.
        """
        if layer_decay is not None and layer_decay != 1.0:
            raise TypeError(f"{type(self).__name__} has no layer decay")
        return {
            name: ParameterRule(decay=parameter.ndim > 1)
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }

    def frozen_inputs(self) -> Mapping[str, str]:
        """Checksums of the frozen networks that its targets come from, by what they are ("tokenizer", "teacher").

        They are no part of a checkpoint; going on with others would be another run, and is refused.
        """
        return {}

    def group_advice(self, micro_size: int) -> str:
        """What else of the config to set where groups do not fit a micro-batch, such as "method.koleo_weight=0"."""
        return ""

    def teachers(self) -> Sequence[Mapping[str, Any]]:
        """Those of them whose judgement it learns, as `handoff.encoder.describe_parent` tells; for its lineage."""
        return ()

    def evaluation_request(self) -> Request:
        """What `evaluate` wants of each sample."""
        return self.request

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the samples of a batch of the validation or test split, "count" among them.

        A classifier adds its "logits", [B, K], which are not summed: reports are made of them.
        """
        return {}

    def health(self) -> dict[str, Tensor]:
        """Scalars that tell whether the method is working, read when the loop logs."""
        return {}

    def alarm(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """A sentence about numbers that show that training has gone wrong; None where they do not, or it was said.

        Args:
            step: updates made.
            numbers: as logged, means since the last line and `health`; the same on every rank.

        Raises:
            BadInput: the run was to stop then.
        """
        return None

    def alarm_state(self) -> dict[str, Any]:
        """What `alarm` remembers, in plain values; it is saved with the run."""
        return {}

    def load_alarm_state(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `alarm_state` gave, or forget all for None: the run goes on, or goes back."""

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Pictures for TensorBoard: name -> [N, 3, H, W] uint8."""
        return {}


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in place where there are several; for use in `prepare`."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """The largest of each entry over all ranks, in place where there are several; for use in `prepare`."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value
