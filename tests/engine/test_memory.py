"""Memory that runs out ends a run with a sentence: when it was, and what to set."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor, nn

from foreseen.commands import finetune, pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch, BatchLayout
from foreseen.engine import online_probe
from foreseen.engine.memory import advise_on_steps, memory_advice
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from tests.engine.test_train import MeanColour, configure, run

Recipe = Callable[..., list[str]]


class Greedy(MeanColour):
    """Takes too much memory in one of its methods."""

    def __init__(self, where: str = "forward") -> None:
        super().__init__()
        self.where = where

    def _take(self, where: str) -> None:
        if self.where == where:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        self._take("forward")
        return super().forward(batch, prepared, progress)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        self._take("evaluate")
        return super().evaluate(batch)

    def to(self, *args: Any, **options: Any) -> Self:
        self._take("to")
        return super().to(*args, **options)

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        self._take("load_state_dict")
        return super().load_state_dict(*args, **options)


@pytest.mark.parametrize(
    ("global_size", "micro_size", "group", "advice"),
    [
        (16, 8, 1, r"set batch.micro_size=4: the global batch stays 16 through accumulation, and so do the results"),
        (18, 9, 1, r"set batch.micro_size=3: "),  # 4 does not divide 18
        (24, 12, 4, r"set batch.micro_size=4: "),  # 6 cuts a group of four
        (8, 4, 4, r"no smaller one fits, so set compute.checkpoint_activations=true"),
    ],
)
def test_in_training_it_says_which_micro_size_or_what_else_to_set(
    small_shards: Path, tmp_path: Path, global_size: int, micro_size: int, group: int, advice: str
) -> None:
    config = configure(tmp_path, batch__global_size=global_size, batch__micro_size=micro_size)
    with pytest.raises(BadInput, match=f"memory ran out in training at batch.micro_size {micro_size}; .*{advice}"):
        run(small_shards, config, objective=Greedy, group=group)


@pytest.mark.parametrize(
    ("where", "advice"),
    [
        ("to", "placing the weights; no batch.micro_size helps against that: choose a smaller model.name"),
        ("evaluate", "in validation at batch.micro_size 8; set batch.micro_size=4: the same command goes on"),
    ],
)
def test_outside_of_a_step_it_says_where(small_shards: Path, tmp_path: Path, where: str, advice: str) -> None:
    with pytest.raises(BadInput, match=f"memory ran out {advice}"):
        run(small_shards, configure(tmp_path), objective=Greedy, where=where, validate=True)


def test_in_a_resume_it_says_what_else_takes_room(small_shards: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, optim__ema_decay=0.9)
    run(small_shards, config)
    with pytest.raises(BadInput, match="ran out placing the weights; .* optim.ema_decay=null, or choose a smaller"):
        run(small_shards, config, objective=Greedy, where="load_state_dict")


def _full(*_: object, **__: object) -> None:
    raise MemoryError


def test_in_a_probe_it_says_to_look_at_fewer_pictures(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = recipe(run__steps=2, optim__warmup_steps=0, batch__global_size=8, probe__every=2)
    monkeypatch.setattr(online_probe, "probe", _full)
    with pytest.raises(BadInput, match="memory ran out in a probe; lower probe.samples"):
        pretrain.run(load_recipe("pretrain", "mae_cpu_minutes", overrides))


def test_in_the_test_split_it_says_what_to_set_and_the_same_command_scores_it(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    overrides = recipe(run__steps=2, optim__warmup_steps=0, batch__global_size=8, data__shots=4)
    config = load_recipe("finetune", "cpu_minutes_scratch", overrides)
    with monkeypatch.context() as patched:
        patched.setattr("foreseen.engine.evaluate.evaluate", _full)
        with pytest.raises(BadInput, match="ran out in the test split at batch.micro_size 8; set batch.micro_size=4"):
            finetune.run(config)
    assert not (tmp_path / "run/encoder").exists()
    smaller = config.model_copy(update={"batch": config.batch.model_copy(update={"micro_size": 4})})
    finetune.run(smaller)
    assert (tmp_path / "run/encoder").is_dir()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("NCCL error: unhandled cuda error. Last error: Cuda failure 2 'out of memory'"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
)
def test_it_is_known_by_every_name(error: Exception) -> None:
    with pytest.raises(BadInput, match="memory ran out here; do this"), memory_advice("here", lambda: "do this"):
        raise error


@pytest.mark.parametrize("error", [RuntimeError("something else"), OSError(errno.EIO, os.strerror(errno.EIO))])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)), memory_advice("here", lambda: "do this"):
        raise error


def test_advice_ends_with_a_smaller_model() -> None:
    config = configure(Path("run"), compute__checkpoint_activations=True)
    advice = advise_on_steps(config, BatchLayout(4, 1, ranks=4), MeanColour())
    assert advice.startswith("no smaller one fits and activations are not kept")
    assert advice.endswith("lower views.size or choose a smaller model.name")


def test_it_says_how_a_smaller_micro_batch_may_cut_groups() -> None:
    class Grouped(MeanColour):
        def group_advice(self, micro_size: int) -> str:
            return f"some.group to {micro_size}"

    objective = Grouped()
    objective.group = 4
    config = configure(Path("run"), compute__checkpoint_activations=True)
    advice = advise_on_steps(config, BatchLayout(8, 4), objective)
    assert "so set batch.micro_size=2 and some.group to 2 (other results), or lower views.size" in advice
    assert "some.group" not in advise_on_steps(config, BatchLayout(1, 1), objective)


def test_with_batch_norm_a_smaller_micro_batch_is_not_said_to_change_nothing() -> None:
    objective = MeanColour()
    objective.norm = nn.BatchNorm2d(3)
    advice = advise_on_steps(configure(Path("run")), BatchLayout(16, 8), objective)
    assert advice.endswith("through accumulation, though BatchNorm's statistics are of fewer images then")


def test_the_peak_of_memory_rises_with_what_is_held() -> None:
    import torch

    from foreseen.engine.memory import peak_memory_gb

    before = peak_memory_gb(torch.device("cpu"))
    held = torch.ones(75_000_000)  # 0.3 GB
    after = peak_memory_gb(torch.device("cpu"))
    assert held.sum() > 0
    assert 0.05 < before < after
    assert after < before + 1.0
