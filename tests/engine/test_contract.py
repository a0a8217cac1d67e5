"""The contract of `foreseen.engine.objective` holds what methods need, and notices the mistakes they tempt to."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foreseen.config import Config
from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset
from foreseen.data.views import finish
from foreseen.engine import recorder
from foreseen.engine.bundle import Bundle, read_bundle
from foreseen.engine.job import Job
from foreseen.engine.objective import Objective, Progress
from foreseen.engine.replay import Replay, config_for, replay
from tests.engine import two_ranks
from tests.engine.driver import (
    CLIP,
    GLOBAL_SIZE,
    SEED,
    STEPS,
    Pictures,
    drive,
    loss_distance,
    norm_distance,
    weight_distance,
)  # fmt: skip
from tests.engine.skeletons import (
    IBOT,
    PATCHES,
    SKELETONS,
    BEiT,
    CentredIBOT,
    Distillation,
    Supervised,
    koleo,
    sinkhorn,
)  # fmt: skip

ROOT = Path(__file__).parents[2]

whole_run = cache(lambda make: drive(make, GLOBAL_SIZE))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Work this small is ten times slower on threads that other processes want too.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", SKELETONS.values(), ids=SKELETONS)
def test_a_run_does_not_depend_on_accumulation(make: type[Objective]) -> None:
    whole = whole_run(make)
    assert whole.norms.min() > CLIP  # clipping is at work in every step
    assert len(whole.losses.unique()) == STEPS
    for micro_size in (8, 4):
        run = drive(make, micro_size)
        assert loss_distance(whole, run) < 1e-12
        assert norm_distance(whole, run) < 1e-12
        assert weight_distance(whole, run) < 1e-10


class MeanOverOwnMasked(BEiT):
    def mean_over_masked(self, losses: Tensor, masked: Tensor, count: Tensor, progress: Progress) -> Tensor:
        return (losses * masked).sum() / masked.sum()


class KoLeoOverMicroBatch(IBOT):
    def koleo(self, features: Tensor) -> Tensor:
        return koleo(features, len(features))


class SinkhornOverMicroBatch(IBOT):
    def shifts(self, cls: list[Tensor], patches: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        return super().shifts(cls[-1:], patches[-1:], masks[-1:])


class CentreOfMicroBatch(CentredIBOT):
    def mean_logits(self, bottlenecks: list[Tensor]) -> Tensor:
        return self.teacher_logits(bottlenecks[-1]).flatten(0, -2).mean(0)


class DropPathByIndex(Supervised):
    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        return super().forward(replace(batch, key=torch.arange(len(batch))), prepared, progress)


class TeacherInTraining(Distillation):
    train = nn.Module.train


MISTAKES = [
    MeanOverOwnMasked, KoLeoOverMicroBatch, SinkhornOverMicroBatch, CentreOfMicroBatch, DropPathByIndex,
    TeacherInTraining,
]  # fmt: skip


@pytest.mark.parametrize("make", MISTAKES)
def test_a_mistake_shows_in_the_losses(make: type[Objective]) -> None:
    assert loss_distance(drive(make, GLOBAL_SIZE, steps=2), drive(make, 4, steps=2)) > 1e-6


@pytest.fixture
def own() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def two_rank_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the real loop in `<skeleton>-<micro size>`, by two gloo processes, which assert that they are two."""
    out = tmp_path_factory.mktemp("two-ranks")
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launch, "-m", "tests.engine.two_ranks", str(out)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", SKELETONS)
def test_the_loop_on_two_ranks_gives_the_run_of_one_process(name: str, two_rank_runs: Path) -> None:
    whole = whole_run(SKELETONS[name])
    for micro_size in two_ranks.MICRO_SIZES:
        folder = two_rank_runs / f"{name}-{micro_size}"
        run, other_rank = two_ranks.history(folder), two_ranks.history(folder, rank=1)
        assert loss_distance(whole, run) < 1e-12
        assert norm_distance(whole, run) < 1e-12
        assert weight_distance(whole, run) < 1e-10
        assert all(torch.equal(value, other_rank.state[key]) for key, value in run.state.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", two_ranks.VARIANTS)
def test_ways_to_compute_change_nothing_on_two_ranks(
    name: str, two_rank_runs: Path, tmp_path: Path, own: Accelerator
) -> None:
    make, compute, optim = two_ranks.VARIANTS[name]
    run, other_rank = two_ranks.history(two_rank_runs / name), two_ranks.history(two_rank_runs / name, rank=1)
    plain = compute.model_copy(update={"compile": False, "checkpoint_activations": False})
    two_ranks.run(make, tmp_path, GLOBAL_SIZE, own, compute=plain, optim=optim)
    whole = two_ranks.history(tmp_path)
    assert loss_distance(whole, run) < 1e-12
    assert norm_distance(whole, run) < 1e-12
    assert weight_distance(whole, run) < 1e-10
    assert all(torch.equal(value, other_rank.state[key]) for key, value in run.state.items())


@pytest.mark.slow
def test_a_centre_that_one_rank_makes_alone_shows_in_the_losses(two_rank_runs: Path) -> None:
    run = two_ranks.history(two_rank_runs / "CentreOfOneRank-8")
    assert loss_distance(whole_run(CentredIBOT), run) > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "sentence"),
    [("save_file", r"cannot be written to .*: No space left"), ("sha256_of", "all 1 checkpoints in")],
)
def test_where_rank_zero_fails_every_rank_is_told_and_none_waits(two_rank_runs: Path, what: str, sentence: str) -> None:
    told = [(two_rank_runs / f"no-{what}/told-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert told[0] == told[1]
    assert re.search(sentence, told[0])


@pytest.mark.slow
def test_two_ranks_go_back_as_one_process_does_and_leave_a_bundle_for_one(
    two_rank_runs: Path, tmp_path: Path, own: Accelerator
) -> None:
    folder = two_rank_runs / "GoesWrong"
    run, other_rank = two_ranks.history(folder), two_ranks.history(folder, rank=1)
    two_ranks.run(two_ranks.GoesWrong, tmp_path, GLOBAL_SIZE, own, **two_ranks.GOING_WRONG)
    whole = two_ranks.history(tmp_path)
    assert len(whole.losses) == STEPS
    assert loss_distance(whole, run) < 1e-12
    assert weight_distance(whole, run) < 1e-10
    assert all(torch.equal(value, other_rank.state[key]) for key, value in run.state.items())
    bundle, result = replay_in_memory(folder / "bundles/step-3", two_ranks.GoesWrong, own)
    assert (bundle.ranks, result.differs, result.is_reproduced) == (2, ("ranks was 2 and is 1",), True)
    assert [group.samples for group in result.outlying] == [tuple(sample.name for sample in bundle.samples[:2])]
    assert read_bundle(tmp_path / "bundles/step-3").samples == bundle.samples


@pytest.mark.parametrize("make", SKELETONS.values(), ids=SKELETONS)
def test_a_step_of_any_method_is_made_again_from_its_bundle(
    make: type[Objective], tmp_path: Path, own: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "HISTORY", 2)

    class Loud(make):  # type: ignore[misc, valid-type]
        def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
            losses = super().forward(batch, prepared, progress)
            return losses | {"loss": losses["loss"] * 1e4} if progress.step == 4 else losses

    two_ranks.run(Loud, tmp_path, 4, own, save_every=2)
    bundle, result = replay_in_memory(tmp_path / "bundles/step-4", Loud, own)
    assert (bundle.reason, result.begun_at, result.is_equal) == ("exploding", 4, True)
    assert result.groups is not None
    # The mean over the smallest groups is the loss of the global batch, whatever the method counts and balances.
    assert sum(group.loss for group in result.groups) / len(result.groups) == pytest.approx(
        bundle.ring[-1].values["loss"], rel=1e-12
    )


def replay_in_memory(folder: Path, make: Callable[[], Objective], accelerator: Accelerator) -> tuple[Bundle, Replay]:
    """Replay a bundle of `two_ranks.run`."""
    bundle = read_bundle(folder)
    config = config_for(bundle, Config.model_validate(bundle.run["config"]))
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    torch.manual_seed(SEED)
    objective = make()
    job = Job(config, objective, BatchBuilder(Pictures(), objective.request, SEED))
    return bundle, replay(job, bundle, accelerator, print, keep=False)


@pytest.mark.parametrize("make", [IBOT, CentredIBOT])
def test_a_step_that_is_not_finite_moves_neither_weights_nor_teacher_nor_centres(make: type[Objective]) -> None:
    before, after = drive(make, 8, steps=2), drive(make, 8, steps=3, spoil_step=2)
    assert not after.norms[2].isfinite()
    for name, value in before.state.items():
        assert torch.equal(value, after.state[name]), name


def test_the_teacher_and_its_centres_move_once_a_step() -> None:
    start, one, two = (drive(CentredIBOT, 8, steps=steps).state for steps in (0, 1, 2))
    student, teacher = "student.vit.blocks.0.mlp.fc1.weight", "teacher.vit.blocks.0.mlp.fc1.weight"
    expected = 0.9 * start[teacher] + 0.1 * one[student]
    torch.testing.assert_close(one[teacher], expected, rtol=1e-12, atol=0)
    assert not torch.equal(one["centres"], start["centres"])
    assert not torch.equal(two["centres"], one["centres"])


def test_a_frozen_last_layer_waits_for_its_step_and_then_moves() -> None:
    start, waiting, moved = (drive(IBOT, 16, steps=steps).state for steps in (0, IBOT.frozen_steps, 3))
    name = "student.head.last_layer"
    assert torch.equal(start[name], waiting[name])
    assert not torch.equal(start[name], moved[name])


@pytest.mark.parametrize("make", SKELETONS.values(), ids=SKELETONS)
def test_every_trained_parameter_gets_a_gradient_from_every_micro_batch(make: type[Objective]) -> None:
    objective = make().train()
    batch = first_batch(objective, micro_size=4)
    progress = Progress(0, STEPS, 1.5, SEED, micro_batches=4)
    with torch.no_grad():
        prepared = objective.prepare([batch], progress)[0]
    objective(batch, prepared, progress)["loss"].backward()
    for name, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_networks_that_are_not_trained_stay_in_evaluation_mode() -> None:
    objective = Distillation().train()
    assert objective.vit.training
    assert not any(module.training for module in objective.teacher.modules())


def test_a_micro_batch_without_masked_patches_adds_nothing() -> None:
    objective = BEiT().train()
    batch = first_batch(objective, micro_size=4)
    none = replace(batch, draws={"mask": torch.zeros(4, PATCHES, dtype=torch.bool)})
    progress = Progress(0, STEPS, 1.5, SEED, micro_batches=4)
    loss = objective(none, objective.prepare([batch, none], progress)[1], progress)["loss"]
    loss.backward()
    assert loss == 0
    assert all(p.grad.count_nonzero() == 0 for p in objective.parameters() if p.requires_grad)


def test_masks_are_stratified_over_the_global_batch() -> None:
    counts = []
    objective = IBOT()
    for micro in range(4):
        batch = first_batch(objective, micro_size=4, number=micro)
        counts.append(objective.stratified_mask(batch, Progress(0, STEPS, 1.5, SEED, micro_batches=4)).sum(1))
    found = torch.cat(counts).sort().values
    lowest = (0.1 + 0.4 * torch.arange(GLOBAL_SIZE) / GLOBAL_SIZE) * PATCHES
    highest = (0.1 + 0.4 * torch.arange(1, GLOBAL_SIZE + 1) / GLOBAL_SIZE) * PATCHES
    assert (found[:GLOBAL_SIZE] == 0).all()  # half of the 2G crops
    assert (found[GLOBAL_SIZE:] >= lowest.floor()).all()
    assert (found[GLOBAL_SIZE:] <= highest).all()


def test_streamed_sinkhorn_equals_the_matrix_form() -> None:
    logits = torch.randn(40, 8, dtype=torch.float64) * 5
    weights = (torch.rand(40, dtype=torch.float64) < 0.7).double()
    shift = sinkhorn(_parts(logits), _parts(weights))
    rows = logits[weights.bool()]
    q = rows.exp().mT  # DINOv2's own form: K × B, rows to 1 / K, columns to 1 / B
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    torch.testing.assert_close((rows + shift).softmax(-1), (q * q.shape[1]).mT, rtol=1e-12, atol=1e-15)


def _parts(x: Tensor) -> Sequence[Tensor]:
    return x.split([3, 30, 7])


def first_batch(objective: Objective, micro_size: int, number: int = 0) -> Batch:
    builder = BatchBuilder(Pictures(), objective.request, SEED)
    stream = StreamDataset(builder, BatchLayout(GLOBAL_SIZE, micro_size), rank=0)
    return finish(stream[number], objective.request, torch.device("cpu"), torch.float32)
