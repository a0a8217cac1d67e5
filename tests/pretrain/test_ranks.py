"""A step of 1 × 64 pictures is that of 2 ranks × 2 × 16: centres, Sinkhorn-Knopp, KoLeo, losses, gradients and health.

Threads stand for ranks, so that every method and balance is tried in a second; `test_topologies` has real processes.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.pretrain import feature_health, self_distillation, target_balance
from foreseen.pretrain.methods import METHODS
from foreseen.pretrain.self_distillation import SelfDistillation
from tests.small_methods import small_method

PICTURES, RANKS, MICRO = 64, 2, 16
FINITE = torch.tensor(True)


class Ranks:
    """Runs a function in one thread a rank, and adds up what they ask to be added up."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._given: list[Tensor] = [torch.empty(0)] * count
        self._barrier = threading.Barrier(count, timeout=60)
        self._mine = threading.local()

    def reduction(self, combine: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def all_reduce(value: Tensor) -> Tensor:
            self._given[self._mine.rank] = value.clone()
            self._barrier.wait()
            combined = combine(torch.stack(self._given))
            self._barrier.wait()
            return value.copy_(combined)

        return all_reduce

    def run(self, function: Callable[[int], Any]) -> list[Any]:
        def as_rank(rank: int) -> Any:
            self._mine.rank = rank
            try:
                return function(rank)
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(as_rank, range(self.count)))


@dataclass(frozen=True)
class Step:
    """What a rank holds after a step: its share of the loss and of the gradients, and what all ranks have in common."""

    loss: Tensor
    gradients: Mapping[str, Tensor]
    common: Mapping[str, Tensor]


def _build(method: str, centering: str) -> SelfDistillation:
    recipe = f"{method}_cpu_minutes"
    overrides = small_method(load_recipe("pretrain", recipe)) | {
        "views.size": "16", "method.crops": "{local_count: 1, local_size: 8}", "batch.global_size": str(PICTURES),
        "model.name": "vit_tiny_patch16_224",
        "model.args": "{patch_size: 4, embed_dim: 24, depth: 1, num_heads: 2}", "method.centering": centering,
        "method.out_dim": "32", "method.koleo_group": str(MICRO),
        "method.koleo_weight": "0.3" if centering == "sinkhorn" else "0",
    }  # fmt: skip
    config = load_recipe("pretrain", recipe, [f"{key}={value}" for key, value in overrides.items()])
    torch.manual_seed(0)
    objective = METHODS[method].build(config.with_length(640)).double().train()
    assert isinstance(objective, SelfDistillation)
    for centre in (objective.centre, getattr(objective, "patch_centre", None)):
        if centre is not None:
            centre.center.normal_(std=0.1)
    return objective


def _batches(objective: SelfDistillation) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = {
        view.name: torch.randn(view.count, PICTURES, 3, *view.size, generator=generator, dtype=torch.float64)
        for view in objective.request.views
    }
    draws = {
        draw.name: torch.from_numpy(
            np.stack([draw.function(np.random.default_rng(number), number) for number in range(PICTURES)])
        )
        for draw in objective.request.draws
    }
    return {"images": images, "draws": draws}


def _cut(drawn: dict[str, Any], start: int, size: int) -> Batch:
    key = torch.arange(start, start + size)
    images = {name: each[:, start : start + size].flatten(0, 1) for name, each in drawn["images"].items()}
    return Batch(key, key, key, images, {name: each[start : start + size] for name, each in drawn["draws"].items()})


def _step(objective: SelfDistillation, batches: Sequence[Batch], ranks: int) -> Step:
    progress = Progress(0, 20, 5.0, 0, ranks=ranks, micro_batches=len(batches))
    with torch.no_grad():
        prepared = objective.prepare(batches, progress)
    losses = [objective(*each, progress)["loss"] / progress.shares for each in zip(batches, prepared, strict=True)]
    loss = torch.stack(losses).sum()
    loss.backward()
    with torch.no_grad():
        objective.after_step(progress, FINITE)
        common = objective.health() | dict(objective.named_buffers())
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return Step(loss.detach(), gradients, common)


@pytest.mark.parametrize("centering", ["centre", "sinkhorn"])
@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2"])
def test_a_step_does_not_depend_on_ranks_and_micro_batches(
    method: str, centering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objectives = [_build(method, centering)]
    objectives += [copy.deepcopy(objectives[0]) for _ in range(RANKS)]
    drawn = _batches(objectives[0])
    whole = _step(objectives[0], [_cut(drawn, 0, PICTURES)], 1)
    ranks, share = Ranks(RANKS), PICTURES // RANKS
    reductions = {"all_reduce_sum": lambda all_: all_.sum(0), "all_reduce_max": lambda all_: all_.amax(0)}
    for module in (feature_health, self_distillation, target_balance):
        for name, combine in reductions.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, ranks.reduction(combine))
    parts = ranks.run(
        lambda rank: _step(
            objectives[1 + rank],
            [_cut(drawn, start, MICRO) for start in range(rank * share, (rank + 1) * share, MICRO)],
            RANKS,
        )
    )
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, **exact)
    assert parts[0].gradients.keys() == whole.gradients.keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(sum(part.gradients[name] for part in parts), gradient, **exact)
    assert {"prototypes_used", "feature_rank"} <= whole.common.keys()
    for part in parts:
        assert part.common.keys() == whole.common.keys()
        for name, number in whole.common.items():
            torch.testing.assert_close(part.common[name], number, rtol=1e-6, atol=1e-12)  # ranks magnify rounding
