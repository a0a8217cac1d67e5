"""Bad data under load: what cannot be read is replaced, listed once, and does not move anything else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from foreseen.data.batch import Problem
from foreseen.data.shards import ShardSet
from foreseen.engine.job import Outcome
from foreseen.engine.unreadable import FILE_NAME, TRAINING, UnreadableList
from foreseen.errors import BadInput
from tests.damage import samples_of, with_a_shard_of_garbage
from tests.engine.test_train import configure, run

GARBAGE = "train-000001.tar"
STEPS = {"run__steps": 8, "data__max_bad_fraction": 0.5}  # 128 samples of a set of 37


@pytest.fixture(scope="module")
def damaged(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_a_shard_of_garbage(small_shards, tmp_path_factory.mktemp("damaged") / "set", GARBAGE)


@pytest.fixture(scope="module")
def bad(small_shards: Path) -> list[int]:
    return samples_of(ShardSet.open(small_shards, "train"), GARBAGE)


@pytest.fixture(scope="module")
def unbroken(damaged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run(damaged, configure(folder, **STEPS))
    return folder


def _lines(folder: Path, name: str = FILE_NAME) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def _numbers(folder: Path) -> list[tuple[int, float, int]]:
    return [(line["step"], line["loss"], line["unreadable_samples"]) for line in _lines(folder, "metrics.jsonl")]


def test_every_bad_sample_is_listed_once_with_its_place_and_reason(
    unbroken: Path, damaged: Path, bad: list[int]
) -> None:
    listed = _lines(unbroken)
    assert sorted(line["sample"] for line in listed) == bad
    assert {(line["path"], line["split"], line["shard"], line["use"]) for line in listed} == {
        (str(damaged), "train", GARBAGE, "training")
    }
    shards = ShardSet.open(damaged, "train")
    assert all(line["key"] == shards.shard_and_key(line["sample"])[1] != "" for line in listed)
    assert all("crc32 differs" in line["reason"] for line in listed)
    steps = [line["step"] for line in listed]
    assert steps == sorted(steps)
    assert 1 <= steps[0] <= steps[-1] <= 3  # each was met in the first epoch, or as a substitute before


def test_the_counter_counts_samples_and_not_how_often_they_were_met(unbroken: Path, bad: list[int]) -> None:
    numbers = _numbers(unbroken)
    assert numbers[-1][2] == len(bad)  # in three epochs and more
    for step, _, count in numbers:
        assert count == sum(line["step"] <= step for line in _lines(unbroken))


@pytest.mark.parametrize(
    "workers",
    [1, pytest.param(3, marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore:This DataLoader will create 3")])],
)
def test_workers_change_neither_the_list_nor_the_run(
    damaged: Path, unbroken: Path, tmp_path: Path, workers: int
) -> None:
    run(damaged, configure(tmp_path, **STEPS, data__workers=workers))
    assert (tmp_path / FILE_NAME).read_bytes() == (unbroken / FILE_NAME).read_bytes()
    assert _numbers(tmp_path) == _numbers(unbroken)


@pytest.mark.parametrize("stop_at", [0, 3])
def test_a_resumed_run_has_the_list_of_the_unbroken_one(
    damaged: Path, unbroken: Path, tmp_path: Path, stop_at: int
) -> None:
    config = configure(tmp_path, **STEPS)
    assert run(damaged, config, signal_at=stop_at) == Outcome(stop_at + 1, preempted=True, told_to_stop=True)
    with open(tmp_path / FILE_NAME, "a", encoding="utf-8") as file:
        late = json.dumps({**_lines(unbroken)[0], "step": 8, "sample": 36})
        file.write(f"{late}\n{late[:20]}")  # as a process that was killed later leaves it
    run(damaged, config)
    assert (tmp_path / FILE_NAME).read_bytes() == (unbroken / FILE_NAME).read_bytes()
    assert _numbers(tmp_path)[-1] == _numbers(unbroken)[-1]


def test_a_run_begun_anew_forgets_the_list_of_one_that_left_no_checkpoint(damaged: Path, tmp_path: Path) -> None:
    run(damaged, configure(tmp_path / "one", **STEPS))
    before = (tmp_path / "one" / FILE_NAME).read_bytes()
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / FILE_NAME).write_bytes(before)
    run(damaged, configure(tmp_path / "two", **STEPS))
    assert (tmp_path / "two" / FILE_NAME).read_bytes() == before


def test_past_the_limit_the_run_stops_with_the_list_and_the_remedy(
    damaged: Path, bad: list[int], tmp_path: Path
) -> None:
    share = (len(bad) - 1) / 37
    with pytest.raises(BadInput, match=r"10 of the 37 samples .* data.max_bad_fraction") as refused:
        run(damaged, configure(tmp_path, run__steps=8, data__max_bad_fraction=share))
    assert len(_lines(tmp_path)) == len(bad)
    for part in (str(tmp_path / FILE_NAME), f"foreseen data check {damaged}", "foreseen data repair", GARBAGE):
        assert part in str(refused.value)
    # As many as are allowed do not stop it, however many epochs meet them again.
    assert run(damaged, configure(tmp_path / "just", run__steps=30, data__max_bad_fraction=len(bad) / 37)).step == 30


def test_a_summary_ends_the_run_and_validation_is_listed_apart(
    damaged: Path, bad: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(damaged, configure(tmp_path, **STEPS), validate=True)
    said = capsys.readouterr().out
    assert f"10 of the 37 samples trained on could not be read and were replaced: {tmp_path / FILE_NAME}" in said
    assert sorted(line["sample"] for line in _lines(tmp_path)) == bad  # once, though validation met them too


def test_what_only_validation_met_is_listed_but_not_counted(tmp_path: Path) -> None:
    unreadable = UnreadableList(tmp_path, Accelerator(cpu=True))
    problem = Problem(7, 7, "set", "train", "train-000000.tar", "000007", "it is empty")
    assert unreadable.add([problem], "validation", lambda _: 4) == [problem]
    unreadable.check(limit=0.0, total=10)
    assert unreadable.add([problem], TRAINING, lambda _: 5) == []
    with pytest.raises(BadInput, match="1 of the 10 samples"):
        unreadable.check(limit=0.0, total=10)
    assert [(line["step"], line["use"]) for line in _lines(tmp_path)] == [(4, "validation")]


def test_a_run_without_bad_samples_has_no_list(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path, run__steps=3))
    assert not (tmp_path / FILE_NAME).exists()


def test_names_in_the_list_and_the_log_steer_no_terminal(
    small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = with_a_shard_of_garbage(small_shards, tmp_path / "set", GARBAGE)
    shards = ShardSet.open(out, "train")
    content = bytearray((out / GARBAGE).read_bytes())
    for sample in samples_of(shards, GARBAGE):
        at = int(shards._index[sample]["offset_512"] - 1) * 512
        content[at : at + 9] = b"\x1b[2J\x1b]0;x"
    (out / GARBAGE).write_bytes(content)
    run(out, configure(tmp_path / "run", **STEPS))
    assert "\x1b" not in capsys.readouterr().out
    assert all(line["key"] == "\\x1b[2J\\x1b]0;x" for line in _lines(tmp_path / "run"))


def test_limits_of_the_config_make_samples_unreadable(small_shards: Path, tmp_path: Path) -> None:
    sizes = np.sort(ShardSet.open(small_shards, "train")._index["size"])
    config = configure(tmp_path, **STEPS, data__max_bytes=int(sizes[30]), data__max_pixels=52 * 52)
    run(small_shards, config)
    reasons = " ".join(line["reason"] for line in _lines(tmp_path))
    assert f"more than the {sizes[30]:,} allowed" in reasons
    assert "pixels, more than the 2,704 allowed" in reasons
