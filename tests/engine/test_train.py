"""The loop, with an objective small enough to see through."""

import json
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from foreseen.config import Config, MethodOptions, resolve
from foreseen.data import loader
from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.loader import BatchBuilder, SweepDataset
from foreseen.data.shards import ShardSet
from foreseen.data.views import Request, View
from foreseen.device_keys import keyed_uniform
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.evaluate import evaluate
from foreseen.engine.job import Job, Outcome
from foreseen.engine.objective import Objective, Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.engine.train import train
from foreseen.errors import BadInput
from tests.engine.test_checkpoint import sign


class MeanColour(Objective):
    """Predicts the mean colour of a crop from its noisy pixels, and keeps an EMA of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3 * 8 * 8, 3)
        self.register_buffer("average", torch.zeros(3, 192))
        self.poison_at: int | None = None
        self.signal_at: int | None = None
        self.seen: list[Tensor] = []

    @property
    def request(self) -> Request:
        return Request(views=(View("image", (8, 8)),), labels=True)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Any]:
        self.seen.extend(batch.position for batch in micro_batches)
        if self.signal_at == progress.step:
            os.kill(os.getpid(), signal.SIGTERM)
        return [None] * len(micro_batches)

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        images = batch.images["image"]
        noise = keyed_uniform(batch.key, "noise", images[0].numel()).to(images.dtype)
        error = self.linear(images.flatten(1) + noise) - images.mean((2, 3))
        loss = error.square().mean()
        if self.poison_at == progress.step:
            loss = loss * float("nan")
        return {"loss": loss}

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        self.average.copy_(torch.where(finite, self.average.lerp(self.linear.weight, 0.1), self.average))

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        error = self.linear(batch.images["image"].flatten(1)) - batch.images["image"].mean((2, 3))
        return {"count": torch.tensor(len(batch)), "score": -error.square().mean(1).sum()}

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        return {"crops": (batch.images["image"] * 50 + 128).to(torch.uint8)}


def configure(folder: Path, **more: Any) -> Config:
    """A short run of MeanColour; `section__key` changes it."""
    raw: dict[str, Any] = {
        "run": {"dir": folder, "steps": 8, "save_every": 3, "log_every": 2},
        "model": {"name": "none"},
        "method": {"name": "mean_colour"},
        "optim": {"base_lr": 0.05, "lr_scaling": "none", "clip_grad": 1.0, "warmup_steps": 2},
        "batch": {"global_size": 16, "micro_size": 8},
        "compute": {"precision": "fp32"},
        "data": {"workers": 0},
    }
    for key, value in more.items():
        section, name = key.split("__")
        raw[section][name] = value
    return resolve(raw, {"mean_colour": MethodOptions})


def run(shards: Path, config: Config, *, validate: bool = False, seed: int = 0, **attributes: Any) -> Outcome:
    """Run an objective through the loop, with some of its attributes set."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    objective = attributes.pop("objective", MeanColour)()
    for name, value in attributes.items():
        setattr(objective, name, value)
    builder = BatchBuilder.configured(ShardSet.open(shards, "train"), objective.request, config)
    job = Job(config.with_length(len(builder.shards)), objective, builder)
    if validate:
        job = replace(job, validation=SweepDataset(builder, 10), choose_by="score")
    return train(job, Accelerator(cpu=True))


def damage(shards: Path, out: Path) -> Path:
    """A copy of a set, one of whose tars has zeros in the place of its first picture."""
    shutil.copytree(shards, out)
    shard = next(out.glob("train*.tar"))
    content = bytearray(shard.read_bytes())
    content[1024:2024] = bytes(1000)
    shard.write_bytes(content)
    return out


def _weights(folder: Path, step: int) -> bytes:
    return b"".join((folder / f"checkpoints/step-{step}/{n}.safetensors").read_bytes() for n in ("model", "optimizer"))


def _lines(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        for timed in ("time", "images_per_s", "data_wait", "validation/seconds", "peak_memory_gb"):
            line.pop(timed, None)
    return lines


def test_the_loss_falls_and_numbers_and_pictures_are_written(small_shards: Path, tmp_path: Path) -> None:
    outcome = run(small_shards, configure(tmp_path, run__steps=30, run__save_every=10))
    assert outcome == Outcome(30, preempted=False, best_step=None)
    lines = _lines(tmp_path)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    assert {"step", "epoch", "loss", "lr", "grad_norm", "skipped_steps", "unreadable_samples"} == lines[-1].keys()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert "loss" in events.Tags()["scalars"]
    (image, *_) = events.Images("crops")
    assert (image.width, image.height) == (32, 32)  # eight crops of 8 pixels on a sheet of three columns, with borders


def test_a_run_that_was_told_to_stop_goes_on_bit_for_bit(small_shards: Path, tmp_path: Path) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    run(small_shards, configure(unbroken))
    assert run(small_shards, configure(stopped), signal_at=3) == Outcome(4, preempted=True, told_to_stop=True)
    assert json.loads((stopped / "PREEMPTED").read_text(encoding="utf-8"))["step"] == 4
    seen: list[Tensor] = []
    # Another seed: nothing of a resumed run may come from the global generator.
    assert run(small_shards, configure(stopped), seed=12345, seen=seen).step == 8
    assert _weights(unbroken, 8) == _weights(stopped, 8)
    assert int(seen[0][0]) == 4 * 16
    assert not (stopped / "PREEMPTED").exists()  # it is at its end
    assert [line for line in _lines(stopped) if line["step"] in (6, 8)] == [
        line for line in _lines(unbroken) if line["step"] in (6, 8)
    ]


@pytest.mark.parametrize("lost", ["position", "schedule", "key", "nothing"])
def test_the_resume_test_would_notice_a_lost_place(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    run(small_shards, configure(unbroken))
    run(small_shards, configure(stopped), signal_at=3)
    positions, lr, keys = BatchLayout.positions, SteppedOptimizer.lr, loader.sample_keys
    if lost == "position":  # the data begins anew
        monkeypatch.setattr(BatchLayout, "positions", lambda self, step, *more: positions(self, step - 4, *more))
    elif lost == "schedule":
        monkeypatch.setattr(SteppedOptimizer, "lr", lambda self, step: lr(self, step - 4))
    elif lost == "key":  # the same samples, cropped and disturbed as if by another seed
        monkeypatch.setattr(loader, "sample_keys", lambda seed, position: keys(seed + 1, position))
    run(small_shards, configure(stopped))
    same = lost == "nothing"
    assert (_weights(unbroken, 8) == _weights(stopped, 8)) == same
    assert (_lines(unbroken)[-1] == _lines(stopped)[-1]) == same


LOST = {
    "optimizer": ("optimizer", "exp_avg"),
    "teacher": ("model", "average"),
    "average of the weights": ("average", ""),
}


@pytest.mark.parametrize("dropped", [*LOST, "nothing"])
def test_the_resume_test_would_notice_a_lost_state(small_shards: Path, tmp_path: Path, dropped: str) -> None:
    from safetensors.torch import load_file, save_file

    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    run(small_shards, configure(unbroken, optim__ema_decay=0.5))
    shutil.copytree(unbroken, stopped)
    shutil.rmtree(stopped / "checkpoints/step-8")
    folder = stopped / "checkpoints/step-6"
    if dropped in LOST:
        name, part = LOST[dropped]
        file = folder / f"{name}.safetensors"
        state = {key: torch.zeros_like(value) if part in key else value for key, value in load_file(file).items()}
        save_file(state, file)
        sign(folder)
    run(small_shards, configure(stopped, optim__ema_decay=0.5))
    ends = [
        [folder / f"checkpoints/step-8/{name}.safetensors" for name, _ in LOST.values()]
        for folder in (unbroken, stopped)
    ]
    one, two = ([file.read_bytes() for file in end] for end in ends)
    assert (one == two) == (dropped == "nothing")


def test_accumulation_does_not_change_the_run(small_shards: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    results = []
    for micro in (16, 8, 4):
        folder = tmp_path / str(micro)
        run(small_shards, configure(folder, batch__micro_size=micro, compute__precision="fp64"))
        results.append((load_file(folder / "checkpoints/step-8/model.safetensors"), _lines(folder)))
    for weights, lines in results[1:]:
        for name, value in results[0][0].items():
            torch.testing.assert_close(weights[name], value, rtol=1e-11, atol=1e-13)
        for line, expected in zip(lines, results[0][1], strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-12)
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-12)


def test_a_step_that_is_not_finite_is_skipped_counted_and_changes_nothing(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path, run__save_every=1, run__keep_last=8), poison_at=4)
    model = "model.safetensors"
    before, after = (tmp_path / f"checkpoints/step-{n}" / model for n in (4, 5))
    assert before.read_bytes() == after.read_bytes()
    lines = _lines(tmp_path)
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(line["loss"] == line["loss"] for line in lines if line["step"] != 5)


def test_the_best_checkpoint_is_kept_and_named(small_shards: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, run__steps=12, run__save_every=4, run__keep_last=1)
    outcome = run(small_shards, config, validate=True)
    scores = {line["step"]: line["validation/score"] for line in _lines(tmp_path) if "validation/score" in line}
    assert sorted(scores) == [4, 8, 12]
    assert outcome.best_step == max(scores, key=lambda step: scores[step])
    assert (tmp_path / f"checkpoints/step-{outcome.best_step}").is_dir()


def test_the_average_of_the_weights_is_what_is_scored_and_handed_over(small_shards: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, run__steps=12, run__save_every=4, run__keep_last=3, optim__ema_decay=0.5)
    outcome = run(small_shards, config, validate=True)
    scores = {line["step"]: line["validation/score"] for line in _lines(tmp_path) if "validation/score" in line}
    checkpoints = Checkpoints(tmp_path / "checkpoints", 3)
    objective = MeanColour()
    sweep = SweepDataset(BatchBuilder(ShardSet.open(small_shards, "train"), objective.request, config.seed), 10)

    def score(state: dict[str, Tensor]) -> float:
        objective.load_state_dict(state)
        return evaluate(objective, sweep, Accelerator(cpu=True), config.compute, workers=0)["score"]

    for step, found in scores.items():
        assert score(checkpoints.load(step).handed_over) == found
        assert score(checkpoints.load(step).model) != found
    assert outcome.best_step == max(scores, key=lambda step: scores[step])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optim__ema_decay": 0.9}, "another job .*optim.ema_decay was None and is 0.9"),
        ({"optim__base_lr": 0.1}, "another job .*optim.base_lr was 0.05 and is 0.1"),
        ({"run__steps": 9}, "run.steps was 8 and is 9"),
        ({"batch__global_size": 32}, "batch.global_size was 16 and is 32"),
    ],
)
def test_another_job_in_the_same_folder_is_refused(
    small_shards: Path, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    run(small_shards, configure(tmp_path))
    with pytest.raises(BadInput, match=sentence):
        run(small_shards, configure(tmp_path, **change))


def test_what_cannot_change_the_result_may_change(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path))
    moved = tmp_path / "moved shards"
    shutil.copytree(small_shards, moved)
    assert run(moved, configure(tmp_path, run__log_every=1, batch__micro_size=4)).step == 8


def test_shards_that_changed_since_the_checkpoint_are_refused(small_shards: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(small_shards, changed)
    run(changed, configure(tmp_path / "run"))
    manifest = json.loads((changed / "manifest.json").read_text(encoding="utf-8"))
    manifest["splits"]["train"]["index_digest"] = "0" * 64
    (changed / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadInput, match="the pictures of split .* changed since the run"):
        run(changed, configure(tmp_path / "run"))


def test_another_frozen_network_is_refused_when_going_on(small_shards: Path, tmp_path: Path) -> None:
    def networks(**sha256: str) -> Any:
        return lambda: sha256

    run(small_shards, configure(tmp_path, run__steps=3), frozen_inputs=networks(teacher="a" * 64))
    state = json.loads((tmp_path / "checkpoints/step-3/state.json").read_text(encoding="utf-8"))
    assert state["frozen_inputs"] == {"teacher": "a" * 64}
    longer = configure(tmp_path, run__steps=3)
    run(small_shards, longer, frozen_inputs=networks(teacher="a" * 64))
    with pytest.raises(
        BadInput, match="the teacher changed since the run in run.dir .* was aaaaaaaa… and is bbbbbbbb…"
    ):
        run(small_shards, longer, frozen_inputs=networks(teacher="b" * 64))
    with pytest.raises(BadInput, match="the teacher changed .* and is none"):
        run(small_shards, longer)


def test_a_batch_that_cannot_be_cut_is_refused_with_sizes_that_fit(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"global_size 16 is not a multiple of 1 ranks × batch.micro_size 7 .* 8, 16"):
        run(small_shards, configure(tmp_path, batch__micro_size=7))


@pytest.mark.parametrize("keep_last", [1, 3])
def test_a_kill_between_saving_and_marking_forgets_no_score(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep_last: int
) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    length = {"run__steps": 12, "run__save_every": 4, "run__keep_last": keep_last}
    best_step = run(small_shards, configure(unbroken, **length), validate=True).best_step
    mark_best = Checkpoints.mark_best

    def kill(self: Checkpoints, step: int, score: float) -> None:
        if step == best_step:
            raise KeyboardInterrupt
        mark_best(self, step, score)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "mark_best", kill)
        with pytest.raises(KeyboardInterrupt):
            run(small_shards, configure(killed, **length), validate=True)
    assert run(small_shards, configure(killed, **length), validate=True).best_step == best_step
    best = [Checkpoints(run / "checkpoints", keep_last).best for run in (unbroken, killed)]
    assert best[0] == best[1]


def test_unreadable_samples_are_replaced_and_too_many_stop_the_run(small_shards: Path, tmp_path: Path) -> None:
    damaged = damage(small_shards, tmp_path / "damaged")
    generous = configure(tmp_path / "one", data__max_bad_fraction=0.5)
    assert run(damaged, generous).step == 8
    assert _lines(tmp_path / "one")[-1]["unreadable_samples"] > 0
    with pytest.raises(BadInput, match="data.max_bad_fraction"):
        run(damaged, configure(tmp_path / "two", data__max_bad_fraction=0.0))
