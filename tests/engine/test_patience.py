"""Early stopping: where it ends is a function of the run's own scores, however often it is interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreseen.data.batch import Batch
from foreseen.engine.patience import Patience
from foreseen.errors import BadInput
from tests.engine.test_train import MeanColour, configure, run


class Scripted(MeanColour):
    """Scores as told: the n-th evaluation, by the step that the weights are at."""

    scores: tuple[float, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def after_step(self, progress: Any, finite: Tensor) -> None:
        super().after_step(progress, finite)
        self.step.add_(1)

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        score = self.scores[int(self.step) // 2 - 1]
        return {"count": torch.tensor(len(batch)), "score": torch.tensor(score * len(batch))}


SCORES = (0.1, 0.5, 0.4, 0.5, 0.6, 0.2, 0.3, float("nan"), 0.9, 0.9)  # three in a row are no better at the eighth
RISING = tuple(number / 10 for number in range(10))


def _config(folder: Path, **more: Any) -> Any:
    return configure(folder, run__steps=20, run__save_every=2, run__stop_after=3, **more)


def test_a_run_ends_after_so_many_evaluations_without_a_better_one(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = run(small_shards, _config(tmp_path), objective=Scripted, scores=SCORES, validate=True)
    assert (outcome.step, outcome.best_step, outcome.preempted) == (16, 10, False)
    said = capsys.readouterr().out
    assert "validation has not improved on 0.6 for 3 evaluations (run.stop_after): the run ends at step 16" in said
    assert not (tmp_path / "PREEMPTED").exists()
    again = run(small_shards, _config(tmp_path), objective=Scripted, scores=SCORES, validate=True)
    assert (again.step, again.best_step, again.preempted) == (16, 10, False)


def test_a_run_that_improves_goes_to_its_end(small_shards: Path, tmp_path: Path) -> None:
    assert run(small_shards, _config(tmp_path), objective=Scripted, scores=RISING, validate=True).step == 20


@pytest.mark.parametrize("killed_at", [5, 6, 11, 14, 15])
def test_a_run_that_was_stopped_anywhere_ends_where_the_unbroken_one_does(
    killed_at: int, small_shards: Path, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(small_shards, _config(whole), objective=Scripted, scores=SCORES, validate=True)
    first = run(
        small_shards, _config(broken), objective=Scripted, scores=SCORES, validate=True, signal_at=killed_at - 1
    )
    assert first.preempted
    outcome = run(small_shards, _config(broken), objective=Scripted, scores=SCORES, validate=True)
    assert (outcome.step, outcome.best_step) == (16, 10)
    for name in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (folder / f"checkpoints/step-16/{name}" for folder in (broken, whole))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_lost_checkpoint_loses_no_patience(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, _config(tmp_path), objective=Scripted, scores=SCORES, validate=True)
    shutil.rmtree(tmp_path / "checkpoints/step-16")  # as if killed before it was published
    assert run(small_shards, _config(tmp_path), objective=Scripted, scores=SCORES, validate=True).step == 16


def test_the_average_is_handed_over_by_a_run_that_ends_early(small_shards: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kept: list[Scripted] = []

    def make() -> Scripted:
        kept.append(Scripted())
        return kept[-1]

    for _ in range(2):  # the second start finds it ended
        run(small_shards, _config(tmp_path, optim__ema_decay=0.5), objective=make, scores=SCORES, validate=True)
        average = load_file(tmp_path / "checkpoints/step-16/average.safetensors")
        assert torch.equal(kept[-1].linear.weight, average["linear.weight"])


def test_how_often_it_looks_is_then_part_of_the_run(small_shards: Path, tmp_path: Path) -> None:
    config = _config(tmp_path)
    run(small_shards, config, objective=Scripted, scores=SCORES, validate=True, signal_at=4)
    other = configure(tmp_path, run__steps=20, run__save_every=4, run__stop_after=3)
    with pytest.raises(BadInput, match="run.save_every was 2 and is 4"):
        run(small_shards, other, objective=Scripted, scores=SCORES, validate=True)


def test_without_validation_there_is_nothing_to_wait_for(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run.stop_after 3 waits for better validation, and there is none"):
        run(small_shards, _config(tmp_path))


def test_no_number_is_no_better_even_at_first() -> None:
    patience = Patience(2)
    for score in (float("nan"), None, 0.2, 0.2):
        patience.judge(score)
    assert (patience.best, patience.waited) == (0.2, 1)
    patience.judge(float("nan"))
    assert patience.is_over
    assert json.loads(json.dumps(patience.state())) == patience.state()
