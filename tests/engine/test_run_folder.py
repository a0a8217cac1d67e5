"""A run folder belongs to one job at a time and remembers how it was made."""

import errno
import json
import os
from pathlib import Path

import pytest

from foreseen.engine.log import RunLog, duration
from foreseen.engine.run_folder import RunLock, disk_trouble, record_start
from foreseen.errors import BadInput


def test_a_second_job_on_the_same_folder_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(BadInput, match=r"run.dir .* is in use by process \d+ on"), RunLock(tmp_path):
            pass
    with RunLock(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(BadInput, match="run.dir .* cannot be written"), RunLock(tmp_path / "file"):
        pass


def test_every_start_is_recorded(tmp_path: Path) -> None:
    record_start(tmp_path, {"command": ["first"]})
    record_start(tmp_path, {"command": ["second"]})
    starts = json.loads((tmp_path / "environment.json").read_text(encoding="utf-8"))["starts"]
    assert [start["command"] for start in starts] == [["first"], ["second"]]


def test_metrics_of_steps_past_the_checkpoint_are_dropped_on_going_on(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, 0, speaks=True)
    for step in (2, 4, 6):
        log.scalars(step, {"loss": 1.0 / step})
    log.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')  # a kill cut the line short
    log = RunLog(tmp_path, 10, 4, speaks=True)
    log.scalars(6, {"loss": 0.5})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(2, 0.5), (4, 0.25), (6, 0.5)]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 10, 0, speaks=False)
    log.scalars(1, {"loss": 1.0}, line="a line")
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (720, "12 min"), (12000, "3 h 20 min")])
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_disk_that_fails_is_named_by_what_is_on_it(tmp_path: Path) -> None:
    for file, sentence in (
        (None, "run.dir .* cannot be written"),
        (str(tmp_path / "run/metrics.jsonl"), "run.dir .* cannot be written"),
        ("/data/train.tar", "^/data/train.tar cannot be read or written: .* checkpoints in run.dir .* are intact"),
    ):
        with pytest.raises(BadInput, match=sentence), disk_trouble(tmp_path / "run"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), file)
    with pytest.raises(FileNotFoundError), disk_trouble(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "No such file")
