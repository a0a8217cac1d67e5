"""Scoring a split: every sample once, whatever the number of ranks."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from foreseen.config import Compute
from foreseen.data.batch import Batch, Problem
from foreseen.data.loader import SweepDataset, load
from foreseen.data.views import finish
from foreseen.engine.launch import autocast, image_dtype
from foreseen.engine.objective import Objective, all_reduce_sum
from foreseen.errors import BadInput


def evaluate(
    objective: Objective, sweep: SweepDataset, accelerator: Accelerator, compute: Compute, *, workers: int,
    problems: list[Problem] | None = None, keep: Callable[[Batch, torch.Tensor], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Mean of each number that `objective.evaluate` sums, over all samples of all ranks, and their "count".

    "unreadable" says how many of them could not be read and were replaced.

    Args:
        objective: not wrapped; put into evaluation mode for the time.
        sweep: this rank's share of the samples.
        accelerator: gives the device.
        compute: the config's section, for the precision.
        workers: loader processes.
        problems: takes in what this rank could not read.
        keep: called with each of this rank's batches and its logits, where the objective gives them.
    """
    request = objective.evaluation_request()
    was_training = objective.training
    objective.eval()
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad(), autocast(accelerator, compute):
        for batch in load(sweep, range(len(sweep)), workers=workers, pin_memory=accelerator.device.type == "cuda"):
            if problems is not None:
                problems.extend(batch.problems)
            seen = finish(batch, request, accelerator.device, image_dtype(compute))
            numbers = dict(objective.evaluate(seen))
            logits = numbers.pop("logits", None)
            if keep is not None and logits is not None:
                keep(seen, logits)
            for name, value in {**numbers, "unreadable": torch.tensor(len(batch.problems))}.items():
                zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
                sums[name] = sums.get(name, zero) + value.to(accelerator.device)
    objective.train(was_training)
    return _means(sums, accelerator)


def _means(sums: dict[str, torch.Tensor], accelerator: Accelerator) -> dict[str, float]:
    # A rank may have had no batch at all, and then knows no names; rank 0 always has one.
    names: list[list[str]] = [sorted(sums)]
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(names, src=0)
    zero = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    total = dict(
        zip(names[0], all_reduce_sum(torch.stack([sums.get(n, zero) for n in names[0]])).tolist(), strict=True)
    )
    count, unreadable = total.pop("count"), total.pop("unreadable")
    if not count:
        raise BadInput("none of the samples to be scored has a label")
    return {name: value / count for name, value in total.items()} | {"count": count, "unreadable": unreadable}
