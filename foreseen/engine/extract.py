"""Features of the pictures of a split, from a frozen encoder: every picture once, whatever the number of ranks.

Letters: N pictures asked for, M of them readable, D features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor, nn

from foreseen.config import Compute
from foreseen.data.batch import Problem
from foreseen.data.loader import BatchBuilder, SweepDataset, load
from foreseen.data.order import Order
from foreseen.data.views import finish
from foreseen.engine.labelled import Labelled
from foreseen.engine.launch import autocast, image_dtype
from foreseen.engine.objective import all_reduce_sum
from foreseen.engine.unreadable import gather_problems
from foreseen.models.features import Features, pooled_features

Samples = NDArray[np.int64]


@dataclass(frozen=True)
class Extracted:
    """The same on every rank.

    Attributes:
        features: [M, D] in float32 at least, on the device.
        samples: the number of each in its set, rising, [M].
        unreadable: N - M.
        problems: what could not be read, and why.
    """

    features: Tensor
    samples: Samples
    unreadable: int
    problems: tuple[Problem, ...] = ()

    def labelled(self, chosen: Samples, labels: NDArray[np.integer]) -> Labelled:
        """The features of those of some samples that could be read, with their labels.

        Args:
            chosen: sample numbers.
            labels: of the whole set, by sample number.
        """
        rows = np.flatnonzero(np.isin(self.samples, chosen))
        known = torch.from_numpy(labels[self.samples[rows]].astype(np.int64)).to(self.features.device)
        return Labelled(self.features[torch.from_numpy(rows).to(self.features.device)], known)


def choose(total: int, count: int, seed: int) -> Samples:
    """A fixed choice of at most `count` numbers in [0, total), rising; a larger count adds to it."""
    return np.sort(Order(seed, total).samples(np.arange(min(count, total))))


def extract(
    model: nn.Module,
    features: Features,
    builder: BatchBuilder,
    samples: Samples,
    accelerator: Accelerator,
    compute: Compute,
    *,
    batch_size: int,
    workers: int,
) -> Extracted:
    """Run a model over samples in evaluation mode, under the loop's autocast; the model is left as it was.

    Args:
        model: a timm model on the accelerator's device, not wrapped.
        features: how it is pooled.
        builder: of a request with one view.
        samples: numbers in the set, rising, without a repetition, [N].
        accelerator: gives device and ranks; each rank takes its share.
        compute: the config's section, for the precision.
        batch_size: pictures a rank and forward.
        workers: loader processes.
    """
    device, dtype, (view,) = accelerator.device, image_dtype(compute), builder.request.views
    ranks, rank = accelerator.num_processes, accelerator.process_index
    sweep = SweepDataset(builder, batch_size, rank=rank, ranks=ranks, subset=samples)

    def pooled(images: Tensor) -> Tensor:
        with autocast(accelerator, compute):
            return pooled_features(model, images, features)

    with evaluating(model), torch.no_grad():
        # A blank picture tells the width, also to a rank without a share.
        width = pooled(torch.zeros(1, 3, *view.size, dtype=dtype, device=device)).shape[1]
        # The last column says who is there. Rows of other ranks and of unreadable samples stay 0, so a sum gathers all.
        table = torch.zeros(len(samples), width + 1, dtype=dtype, device=device)
        problems: list[Problem] = []
        for batch in load(sweep, range(len(sweep)), workers=workers, pin_memory=device.type == "cuda"):
            # A sweep's positions are sample numbers: another number was but a substitute.
            problems.extend(problem for problem in batch.problems if problem.sample == problem.position)
            readable = (batch.sample == batch.position).numpy()  # a substitute stands for another picture
            rows = np.searchsorted(samples, batch.position.numpy()[readable])
            found = pooled(finish(batch, builder.request, device, dtype).images[view.name])[torch.from_numpy(readable)]
            table[torch.from_numpy(rows).to(device), :-1] = found.to(dtype)
            table[torch.from_numpy(rows).to(device), -1] = 1.0
    table = all_reduce_sum(table)
    read = (table[:, -1] > 0).cpu()
    kept = samples[read.numpy()]
    missing = tuple(gather_problems(problems, accelerator))
    return Extracted(table[read.to(device), :-1], kept, len(samples) - len(kept), missing)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, without compiling anything for it, and afterwards each in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in modes:
            module.training = training
