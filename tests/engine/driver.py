"""The step order that the contract documents, in one process, and the pictures and runs that contract tests share."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from foreseen.config import Optim
from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset
from foreseen.data.views import finish
from foreseen.engine.objective import Objective, Progress
from foreseen.engine.optimizer import SteppedOptimizer

GLOBAL_SIZE, STEPS, SEED, CLIP = 16, 6, 3, 0.05
# The rate falls from the first step on: a first step at zero would hide what it should show.
OPTIM = Optim(base_lr=1e-3, lr_scaling="none", warmup_steps=0, clip_grad=CLIP)


class Pictures:
    """24 small labelled pictures in memory, in the place of a packed set."""

    place, split, fingerprint, labels_fingerprint = "memory", "train", "24 pictures", "0123 0123"
    labels = np.arange(24, dtype=np.int32) % 4

    def __len__(self) -> int:
        return len(self.labels)

    def read_many(self, samples: Sequence[int], *, max_bytes: int) -> Iterator[bytes]:
        return map(_picture, samples)

    def describe(self, sample: int) -> str:
        return f"picture {sample}"

    def check_sizes(self) -> None:
        pass


@cache
def _picture(sample: int) -> bytes:
    generator = np.random.default_rng(sample)
    small = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    out = BytesIO()
    small.resize((40 + sample % 5, 40), Image.Resampling.BICUBIC).save(out, format="PNG")
    return out.getvalue()


@dataclass(frozen=True)
class History:
    """What two runs are compared by: loss and gradient norm before clipping of each step, and the state at the end."""

    losses: Tensor
    norms: Tensor
    state: dict[str, Tensor]


def drive(
    make: Callable[[], Objective], micro_size: int, *, steps: int = STEPS, spoil_step: int | None = None
) -> History:  # fmt: skip
    """Run an objective for a few float64 steps in one process.

    Args:
        make: builds it, with weights from the global generator.
        micro_size: samples per micro-batch.
        steps: stop after so many of the run's STEPS.
        spoil_step: the step whose loss is made infinite.
    """
    torch.manual_seed(SEED)
    objective = make().double().train()
    torch.seed()  # from here on nothing may draw from the global generator
    layout = BatchLayout(GLOBAL_SIZE, micro_size)
    stream = StreamDataset(BatchBuilder(Pictures(), objective.request, SEED), layout, rank=0)
    rules = objective.parameter_rules(None)
    optimizer = SteppedOptimizer(objective, rules, OPTIM, global_size=GLOBAL_SIZE, total_steps=STEPS)
    losses, norms = [], []
    for step in range(steps):
        progress = Progress(step, STEPS, 24 / GLOBAL_SIZE, SEED, micro_batches=layout.accumulation)
        numbers = range(step * layout.accumulation, (step + 1) * layout.accumulation)
        batches = [_finished(stream[number], objective) for number in numbers]
        with torch.no_grad():
            prepared = objective.prepare(batches, progress)
        total = torch.zeros((), dtype=torch.float64)
        for batch, its in zip(batches, prepared, strict=True):
            loss = objective(batch, its, progress)["loss"] / layout.accumulation
            (loss * torch.inf if step == spoil_step else loss).backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), CLIP)
        finite = torch.isfinite(norm)
        optimizer.step(step, finite)
        with torch.no_grad():
            objective.after_step(progress, finite)
        losses.append(float(total))
        norms.append(float(norm))
    return History(
        torch.tensor(losses, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64), objective.state_dict()
    )


def _finished(batch: Batch, objective: Objective) -> Batch:
    return finish(batch, objective.request, torch.device("cpu"), torch.float64)


def assert_the_same_however_cut(make: Callable[[], Objective]) -> None:
    """Whole, in halves and in quarters: losses, gradient norms and the state at the end are those of one run."""
    whole = drive(make, GLOBAL_SIZE)
    assert len(whole.losses.unique()) == STEPS
    for micro_size in (GLOBAL_SIZE // 2, GLOBAL_SIZE // 4):
        run = drive(make, micro_size)
        assert loss_distance(whole, run) < 1e-12
        assert norm_distance(whole, run) < 1e-12
        assert weight_distance(whole, run) < 1e-10


def loss_distance(run: History, other: History) -> float:
    return relative(run.losses, other.losses)


def norm_distance(run: History, other: History) -> float:
    return relative(run.norms, other.norms)


def weight_distance(run: History, other: History) -> float:
    """The largest difference in a tensor over its largest entry, worst over all weights and buffers.

    The key third of a qkv bias is left out: no gradient reaches it in exact arithmetic, and AdamW makes steps of the
    rounding.
    """
    distances = []
    for name, one in run.state.items():
        two = other.state[name]
        if name.endswith("qkv.bias"):
            keep = torch.arange(len(one)) // (len(one) // 3) != 1
            one, two = one[keep], two[keep]
        distances.append(float((one - two).abs().max() / one.abs().max().clamp(min=1e-300)))
    return max(distances)


def relative(one: Tensor, two: Tensor) -> float:
    return float(((one - two) / one).abs().max())
