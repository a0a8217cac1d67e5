"""A step that goes wrong leaves a bundle that makes it again; many in a row send the run back, once."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from foreseen.config import Config
from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset
from foreseen.data.shards import ShardSet
from foreseen.engine import loss_scale
from foreseen.engine.bundle import MOST_BUNDLES, Bundle, read_bundle
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.job import Job
from foreseen.engine.objective import Progress
from foreseen.engine.recorder import HISTORY, FlightRecorder, Record
from foreseen.engine.replay import Group, Replay, config_for, outlying, replay
from foreseen.errors import BadInput
from tests.damage import with_a_shard_of_garbage
from tests.engine.test_checkpoint import sign
from tests.engine.test_train import MeanColour, _lines, _weights, configure, damage, run

SIZE = 16  # the global batch of `configure`
Say = Callable[[str], None]


class Spoiled(MeanColour):
    """Meets samples at some places of the stream with a loss that is not finite, or thousands of times too large."""

    nan_at: range | tuple[int, ...] = ()
    large_at: range | tuple[int, ...] = ()

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        steps = set((batch.position // SIZE).tolist())
        loss = super().forward(batch, prepared, progress)["loss"]
        if steps & set(self.nan_at):
            loss = self.spoil(loss)
        return {"loss": loss * 1e6 if steps & set(self.large_at) else loss}

    def spoil(self, loss: Tensor) -> Tensor:
        return loss * float("nan")


class SpoiledInside(Spoiled):
    """The same, in a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Identity()
        self.last.register_forward_hook(lambda module, given, output: output * float("inf"))

    def spoil(self, loss: Tensor) -> Tensor:
        return self.last(loss)


def _run(shards: Path, config: Config, **more: Any) -> Any:
    return run(shards, config, objective=more.pop("objective", Spoiled), **more)


def _again(
    shards: Path, folder: Path, *, keep: bool = False, objective: type[Spoiled] = Spoiled, **attributes: Any
) -> tuple[Bundle, Replay]:  # fmt: skip
    """Replay a bundle of Spoiled."""
    bundle = read_bundle(folder)
    config = config_for(bundle, configure(folder).model_validate(bundle.run["config"]))
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
    torch.manual_seed(0)
    made = objective()
    for name, value in attributes.items():
        setattr(made, name, value)
    builder = BatchBuilder(ShardSet.open(shards, "train"), made.request, config.seed)
    return bundle, replay(Job(config, made, builder), bundle, Accelerator(cpu=True), lambda text: None, keep=keep)


def test_a_step_that_is_not_finite_leaves_a_bundle_that_makes_it_again(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(small_shards, configure(tmp_path, run__steps=6, run__log_every=1), nan_at=(4,))
    folder = tmp_path / "bundles/step-4"
    assert (
        f"step 4 (counted from 0) is not finite (loss nan  grad_norm nan); to make it again: foreseen replay {folder}"
        in (capsys.readouterr().out)
    )
    bundle, result = _again(small_shards, folder, nan_at=(4,))
    assert (bundle.step, bundle.reason, bundle.checkpoint) == (4, "non-finite", 3)
    assert [record.step for record in bundle.ring] == [0, 1, 2, 3, 4]
    assert [record.values["loss"] for record in bundle.ring][:4] == [line["loss"] for line in _lines(tmp_path)[:4]]
    assert [sample.position for sample in bundle.samples] == list(range(4 * SIZE, 5 * SIZE))
    assert all("(key" in sample.name for sample in bundle.samples)
    assert (result.is_reproduced, result.is_equal, result.begun_at, result.way) == (True, True, 3, (1, 1))
    assert (result.findings.module, result.findings.input_was_finite) == ("", True)  # the loss itself
    assert set(result.findings.gradients) == {"linear.weight", "linear.bias"}
    assert len(result.outlying) == SIZE

    _, result = _again(small_shards, folder, nan_at=(4,))
    assert (result.is_equal, result.begun_at, result.way) == (True, 4, (0, 0))  # the step alone


def test_a_replay_names_the_first_module_that_goes_wrong(small_shards: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"objective": SpoiledInside, "nan_at": (4,)}
    _run(small_shards, configure(tmp_path, run__steps=5), **more)
    _, result = _again(small_shards, tmp_path / "bundles/step-4", **more)
    assert (result.findings.module, result.findings.input_was_finite) == ("last", True)


def test_a_step_that_comes_out_otherwise_is_not_reproduced(small_shards: Path, tmp_path: Path) -> None:
    _run(small_shards, configure(tmp_path, run__steps=5), nan_at=(4,))
    _, result = _again(small_shards, tmp_path / "bundles/step-4")
    assert not result.is_reproduced
    assert result.way == (1, 1)


def test_a_first_step_is_made_again_from_the_seed(small_shards: Path, tmp_path: Path) -> None:
    _run(small_shards, configure(tmp_path, run__steps=3), nan_at=(0,))
    for _ in range(2):
        bundle, result = _again(small_shards, tmp_path / "bundles/step-0", nan_at=(0,))
        assert bundle.checkpoint is None
        assert (result.is_equal, result.begun_at) == (True, 0)


def test_a_replay_elsewhere_leaves_no_state_that_is_not_the_runs(small_shards: Path, tmp_path: Path) -> None:
    _run(small_shards, configure(tmp_path, run__steps=6), nan_at=(4,))
    folder = tmp_path / "bundles/step-4"
    content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    content["environment"]["machine"]["ranks"] = 2
    (folder / "bundle.json").write_text(json.dumps(content), encoding="utf-8")
    _, result = _again(small_shards, folder, nan_at=(4,))
    assert (result.differs, result.promised, result.kept) == (("ranks was 2 and is 1",), False, False)
    assert result.is_reproduced
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-3"]


def test_a_step_that_explodes_leaves_a_bundle_and_its_loudest_samples_are_named(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = configure(tmp_path, run__steps=HISTORY + 4, run__save_every=50, run__log_every=7)
    _run(small_shards, config, large_at=(3, HISTORY + 1))  # the first one comes too early to judge
    assert "step 101 (counted from 0) explodes" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "bundles").iterdir()] == ["step-101"]
    bundle, result = _again(small_shards, tmp_path / "bundles/step-101", large_at=(HISTORY + 1,))
    assert (bundle.reason, result.is_equal, result.findings.module) == ("exploding", True, None)
    assert result.findings.largest.keys() == {"linear.weight", "linear.bias"}


def test_bad_steps_in_a_row_send_the_run_back_past_their_data_once(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Tensor] = []
    going = {"run__steps": 12, "run__rewind_after": 2}
    _run(small_shards, configure(tmp_path / "run", **going), nan_at=(7, 8), seen=seen)
    out = capsys.readouterr().out
    assert "2 steps in a row are bad, the first: step 7 (counted from 0) is not finite" in out
    assert "Going back to the checkpoint of step 6" in out
    assert [int(positions[0]) // SIZE for positions in seen[::2]] == [*range(9), *range(9, 15)]
    assert [line["step"] for line in _lines(tmp_path / "run")] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert _lines(tmp_path / "run")[-1]["skipped_steps"] == 0
    state = json.loads((tmp_path / "run/checkpoints/step-9/state.json").read_text(encoding="utf-8"))
    assert state["rewinds"] == [[9, 6]]

    # The same as a run that never met them: from the checkpoint of step 6, on the data from step 9 on.
    other = configure(tmp_path / "other", **going)
    _run(small_shards, other)
    checkpoints = Checkpoints(tmp_path / "other/checkpoints", 3)
    checkpoints.drop_after(6)
    file = tmp_path / "other/checkpoints/step-6/state.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"rewinds": []', '"rewinds": [[9, 6]]'), encoding="utf-8")
    sign(file.parent)
    _run(small_shards, other)
    assert _weights(tmp_path / "run", 12) == _weights(tmp_path / "other", 12)
    assert _lines(tmp_path / "run") == _lines(tmp_path / "other")


def test_the_second_time_the_run_stops_and_says_why(small_shards: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, run__steps=20, run__rewind_after=2)
    for _ in range(2):  # the same command stops where it stopped
        with pytest.raises(BadInput, match=r"gone back once already, from step 9 to 6: it stops. foreseen replay .*"):
            _run(small_shards, config, nan_at=(7, 8, 15, 16))
    bundles = tmp_path / "bundles"
    assert sorted(path.name for path in bundles.iterdir()) == ["step-12-again", "step-7"]
    bundle, result = _again(small_shards, bundles / "step-12-again", nan_at=(15, 16))
    assert bundle.rewinds == ((9, 6),)
    assert bundle.samples[0].position == 15 * SIZE
    assert result.is_equal
    assert _run(small_shards, configure(tmp_path, run__steps=20, run__rewind_after=None), nan_at=(15, 16)).step == 20


def test_without_a_checkpoint_before_them_bad_steps_in_a_row_stop_the_run(small_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no checkpoint was saved before them"):
        _run(small_shards, configure(tmp_path, run__rewind_after=2), nan_at=(1, 2))


@pytest.mark.parametrize("log_every", [1, 5])
@pytest.mark.parametrize("signal_at", [4, 7, 8])
def test_a_run_that_goes_back_and_is_stopped_on_the_way_comes_to_the_same(
    small_shards: Path, tmp_path: Path, signal_at: int, log_every: int
) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    going: dict[str, Any] = {"run__steps": 12, "run__rewind_after": 2, "run__keep_last": 1}
    _run(small_shards, configure(unbroken, **going), nan_at=(7, 8))
    going["run__log_every"] = log_every
    assert _run(small_shards, configure(stopped, **going), nan_at=(7, 8), signal_at=signal_at).preempted
    _run(small_shards, configure(stopped, **going), nan_at=(7, 8), seed=9)
    assert _weights(unbroken, 12) == _weights(stopped, 12)
    assert _bundles(unbroken) == _bundles(stopped) == ["step-7"]


def _bundles(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "bundles").iterdir())


@pytest.mark.parametrize("moment", ["halfway", "before loading", "before the next checkpoint"])
def test_a_run_that_is_killed_while_it_goes_back_comes_to_the_same(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    # Checkpoints within the row are dropped; the one to go back to has stayed, though they followed.
    going = {"run__steps": 20, "run__save_every": 2, "run__rewind_after": 5, "run__keep_last": 2}
    _run(small_shards, configure(unbroken, **going), nan_at=range(7, 12))
    drop = Checkpoints.drop_after

    def kill(self: Checkpoints, *_: Any) -> None:
        raise KeyboardInterrupt

    def going_back(self: Checkpoints, step: int) -> None:
        if moment == "halfway":
            assert self._steps() == [6, 8, 10]
            drop(self, 8)
        else:
            drop(self, step)
        if moment != "before the next checkpoint":
            raise KeyboardInterrupt
        patched.setattr(Checkpoints, "save", kill)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "drop_after", going_back)
        with pytest.raises(KeyboardInterrupt):
            _run(small_shards, configure(killed, **going), nan_at=range(7, 12))
    _run(small_shards, configure(killed, **going), nan_at=range(7, 12))
    assert _weights(unbroken, 20) == _weights(killed, 20)
    assert _lines(unbroken)[-5:] == _lines(killed)[-5:]


def test_what_could_not_be_read_is_listed_by_steps_of_the_run_that_went_back(
    small_shards: Path, tmp_path: Path
) -> None:
    damaged = with_a_shard_of_garbage(small_shards, tmp_path / "set", "train-000001.tar")
    going = {
        "run__steps": 18, "run__save_every": 6, "run__rewind_after": 8, "run__log_every": 1, "batch__global_size": 2,
        "batch__micro_size": 2, "data__max_bad_fraction": 0.5,
    }  # fmt: skip

    def listed(name: str) -> list[tuple[int, int]]:
        lines = (tmp_path / name / "unreadable.jsonl").read_text(encoding="utf-8").splitlines()
        return [(line["step"], line["sample"]) for line in map(json.loads, lines)]

    _run(damaged, configure(tmp_path / "run", **going), nan_at=(1,))  # steps 8 to 15 of two samples
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("checkpoints/step-18", "unreadable.jsonl"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.write_text("", encoding="utf-8")
    _run(damaged, configure(tmp_path / "again", **going), nan_at=(1,))  # from step 12, after it went back
    after = [(step, sample) for step, sample in listed("run") if step > 12]
    assert after == [entry for entry in listed("again") if entry in after]
    steps = [step for step, _ in listed("run")]
    assert steps == sorted(steps)
    assert 6 < steps[-1] <= 18
    state = json.loads((tmp_path / "run/checkpoints/step-18/state.json").read_text(encoding="utf-8"))
    assert state["rewinds"] == [[16, 6]]
    assert {sample for _, sample in listed("run")} == set(state["unreadable_samples"])


def test_a_bundle_without_a_sound_checkpoint_is_one_line_and_no_end(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find_damage = Checkpoints.find_damage
    monkeypatch.setattr(Checkpoints, "find_damage", lambda self, step: "a flipped bit" if step == 3 else None)
    assert _run(small_shards, configure(tmp_path), nan_at=(4,)).step == 8
    assert "its bundle cannot be written" in (said := capsys.readouterr().out)
    assert "(all 1 checkpoints in" in said
    assert "a flipped bit" in said
    assert find_damage(Checkpoints(tmp_path / "checkpoints", 3), 8) is None


def test_the_best_of_the_steps_that_are_abandoned_is_forgotten(small_shards: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, run__steps=20, run__save_every=2, run__rewind_after=5, run__keep_last=1)
    outcome = _run(small_shards, config, nan_at=range(7, 12), validate=True)
    scores = {line["step"]: line["validation/score"] for line in _lines(tmp_path) if "validation/score" in line}
    assert list(scores) == list(range(2, 21, 2))
    assert (tmp_path / f"checkpoints/step-{outcome.best_step}").is_dir()


def test_the_recorder_changes_no_bit_of_a_run(small_shards: Path, tmp_path: Path) -> None:
    for name, steps in (("with", 3), ("without", 0)):
        _run(small_shards, configure(tmp_path / name, run__recorder=steps), nan_at=(4,))
    assert _weights(tmp_path / "with", 8) == _weights(tmp_path / "without", 8)
    assert _lines(tmp_path / "with") == _lines(tmp_path / "without")
    assert not (tmp_path / "without/bundles").exists()
    assert len(read_bundle(tmp_path / "with/bundles/step-4").ring) == 3


def test_single_bad_steps_leave_a_few_bundles_and_no_more(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    going = {"run__steps": 20, "run__rewind_after": 3}
    _run(small_shards, configure(tmp_path, **going), nan_at=(4, 6, 8, 10, 12, 14, 15, 16))
    # A row that sends the run back has one in any case.
    assert _bundles(tmp_path) == sorted([*(f"step-{step}" for step in (4, 6, 8)), "step-14"])
    assert (
        f"step 10 (counted from 0) is not finite (loss nan  grad_norm nan); no bundle, since {tmp_path}/bundles holds"
        in (capsys.readouterr().out)
    )
    assert MOST_BUNDLES == 3


def test_a_bundle_that_cannot_be_written_is_one_line_and_no_end(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfile", full)
    assert _run(small_shards, configure(tmp_path / "full"), nan_at=(4,)).step == 8
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed/bundles").write_text("in the way", encoding="utf-8")
    assert _run(small_shards, configure(tmp_path / "closed"), nan_at=(4,)).step == 8
    said = [line for line in capsys.readouterr().out.splitlines() if "step 4 (counted from 0) is not finite" in line]
    assert ["(No space left on device); training goes on" in line for line in said] == [True, False]
    assert len(said) == 2
    assert not list((tmp_path / "full/bundles").iterdir())


def test_where_links_fail_a_bundle_has_copies_and_outlives_the_checkpoint(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    for name in ("linked", "copied"):
        _run(small_shards, configure(tmp_path / name, run__keep_last=1, run__steps=12), nan_at=(4,))
        assert not (tmp_path / name / "checkpoints/step-3").exists()
        assert Checkpoints(tmp_path / name / "bundles/step-4/checkpoints", 1).newest_sound() == 3
        monkeypatch.setattr(os, "link", refuse)


def test_samples_that_stood_in_for_unreadable_ones_are_in_the_bundle(small_shards: Path, tmp_path: Path) -> None:
    damaged = damage(small_shards, tmp_path / "damaged")
    config = configure(tmp_path / "run", data__max_bad_fraction=0.5, run__log_every=1)
    seen: list[Tensor] = []
    _run(damaged, config, nan_at=range(8), seen=seen)
    bundle = read_bundle(tmp_path / "run/bundles/step-0")  # 16 of 37 samples; more steps hold them all
    replaced = [sample for sample in bundle.samples if sample.stands_in_for]
    builder = BatchBuilder(ShardSet.open(damaged, "train"), MeanColour().request, config.seed)
    batch = StreamDataset(builder, BatchLayout(SIZE, SIZE), 0)[0]
    assert [sample.sample for sample in bundle.samples] == batch.sample.tolist()
    assert len(replaced) == len(batch.problems)


def test_a_file_that_is_no_bundle_is_refused_with_a_sentence(small_shards: Path, tmp_path: Path) -> None:
    _run(small_shards, configure(tmp_path, run__steps=5), nan_at=(4,))
    folder = tmp_path / "bundles/step-4"
    whole = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    for change, sentence in (
        ({"step": "x"}, "step: Input should be"),
        ({"step": 3}, "its ring does not end with step 3"),
        ({"run": {}}, "run lacks config"),
        ({"colour": 1}, "colour: Extra inputs"),
    ):
        (folder / "bundle.json").write_text(json.dumps(whole | change), encoding="utf-8")
        with pytest.raises(BadInput, match=sentence):
            read_bundle(folder)
    with pytest.raises(BadInput, match="is no bundle"):
        read_bundle(tmp_path)


def _record(step: int, norm: float, **more: float) -> Record:
    return Record(step=step, values={"loss": 1.0, "grad_norm": norm, **more}, finite=math.isfinite(norm), lr=0.1)


def _verdicts(norms: list[float], factor: float | None = 50.0, **more: float) -> list[int]:
    recorder = FlightRecorder(5, factor)
    return [step for step, norm in enumerate(norms) if recorder.judge(_record(step, norm, **more)) is not None]


def test_norms_that_fall_rise_or_spike_as_healthy_ones_do_are_no_explosion() -> None:
    falling = [1000 / (1 + step) for step in range(300)]
    rising = [1e-3 * 1.02**step for step in range(600)]
    spikes = [1.0 + 30.0 * (step % 97 == 96) for step in range(400)]
    vanished = [10.0 * 0.95**step for step in range(400)] + [5.0]  # a hard sample where the loss has all but gone
    early = [1.0] * 50 + [1e6] + [1.0] * 100
    for norms in (falling, rising, spikes, vanished, early, [0.0] * 200):
        assert _verdicts(norms) == []


def test_norms_that_jump_or_double_again_and_again_explode() -> None:
    assert _verdicts([1.0] * 100 + [51.0, 1.0, 52.0]) == [100, 102]
    assert _verdicts([1.0] * 100 + [51.0], factor=None) == []
    doubling = _verdicts([1.0] * 100 + [2.0 ** (step / 5) for step in range(60)])
    assert doubling
    assert doubling[-1] == 159
    assert _verdicts([1.0, math.nan, 1.0, math.inf]) == [1, 3]
    assert _verdicts([1.0] * 50 + [1e6] + [1.0] * 60 + [1e5]) == [111]  # the one before, too early, hides nothing
    assert _verdicts([1.0], loss=math.inf) == [0]


def test_taking_a_step_down_reads_nothing_from_the_device() -> None:
    recorder = FlightRecorder(5, 20.0)
    values = {"loss": torch.ones((), device="meta"), "grad_norm": torch.ones((), device="meta")}
    recorder.add(0, values, torch.ones((), dtype=torch.bool, device="meta"))  # any read of a meta tensor raises
    with pytest.raises(NotImplementedError):
        recorder.read(1, lambda step: 0.1)


def test_a_search_for_the_loss_scale_is_not_bad_and_a_loss_that_is_not_finite_is() -> None:
    assert _verdicts([1.0, math.inf, math.inf, 1.0], loss_scale=2.0**16) == []
    assert _verdicts([1.0, math.inf, math.inf, 1.0], loss_scale=1.0) == [1, 2]
    assert _verdicts([math.inf, math.inf], loss_scale=2.0**16, loss=math.nan) == [0, 1]


def test_a_run_that_searches_its_loss_scale_for_long_goes_on(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**60)
    config = configure(tmp_path, run__steps=40, run__rewind_after=2, compute__precision="fp16")
    assert _run(small_shards, config).step == 40
    assert _lines(tmp_path)[-1]["skipped_steps"] > 2
    assert not (tmp_path / "bundles").exists()


def test_groups_that_stand_out_are_named_the_worst_first() -> None:
    usual = [Group((f"{number}",), 1.0 + 0.01 * number, 2.0 + 0.01 * number) for number in range(20)]
    loud, broken = Group(("loud",), 1.0, 9.0), Group(("broken",), math.nan, 1.0)
    assert outlying([*usual, loud, broken]) == (broken, loud)
    assert outlying(usual) == ()
    assert outlying([replace(loud, loss=math.inf)]) == (replace(loud, loss=math.inf),)
