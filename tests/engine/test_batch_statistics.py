"""A step that is skipped leaves BatchNorm's statistics as they were."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foreseen.data.batch import Batch
from foreseen.engine.batch_statistics import KeptStatistics
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.objective import Progress
from foreseen.models.frozen import Frozen
from tests.engine.test_train import MeanColour, configure, run


class Normed(MeanColour):
    """Normalises its pixels by the batch, which a poisoned step makes infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Any]:
        if progress.step == self.poison_at:
            micro_batches[-1].images["image"][0] = torch.inf
        return super().prepare(micro_batches, progress)

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        images = {"image": self.norm(batch.images["image"])}
        return super().forward(batch.with_images(images), prepared, progress)


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_skipped_step_changes_neither_statistics_nor_their_average(
    small_shards: Path, tmp_path: Path, ema_decay: float | None
) -> None:
    config = configure(tmp_path, run__save_every=1, run__keep_last=8, optim__ema_decay=ema_decay)
    run(small_shards, config, objective=Normed, poison_at=4)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 8)
    before, after, later = (checkpoints.load(step) for step in (4, 5, 6))
    assert int(before.model["norm.num_batches_tracked"]) == 8
    for name, value in before.model.items():
        assert torch.equal(value, after.model[name]), name
    assert not torch.equal(later.model["norm.running_mean"], after.model["norm.running_mean"])
    for name, value in (before.average or {}).items():
        assert after.average is not None
        assert torch.equal(value, after.average[name]), name
    assert all(torch.isfinite(value).all() for value in (later.model | (later.average or {})).values())


def test_no_step_waits_for_the_device() -> None:
    # A tensor on the meta device has no value to wait for: reading one raises.
    kept = KeptStatistics(nn.BatchNorm2d(3, device="meta"))
    kept.keep()
    kept.put_back(torch.ones((), dtype=torch.bool, device="meta"))


def test_a_run_whose_batch_is_cut_says_that_its_statistics_are_not_of_the_whole(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "has BatchNorm, whose statistics are over each micro-batch of 8"
    run(small_shards, configure(tmp_path / "cut"), objective=Normed)
    assert said in capsys.readouterr().out
    run(small_shards, configure(tmp_path / "whole", batch__micro_size=16), objective=Normed)
    run(small_shards, configure(tmp_path / "without"))
    assert "BatchNorm" not in capsys.readouterr().out


class Taught(MeanColour):
    """Has a teacher with BatchNorm, which no forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Frozen(nn.BatchNorm2d(3))


def test_the_statistics_of_a_frozen_network_are_none_of_the_runs(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small_shards, configure(tmp_path, optim__ema_decay=0.5), objective=Taught)
    assert "BatchNorm" not in capsys.readouterr().out
    checkpoints = Checkpoints(tmp_path / "checkpoints", 8)
    saved = checkpoints.load(checkpoints.newest_sound() or 0)
    assert saved.average
    assert not any("teacher" in name for name in saved.average)
