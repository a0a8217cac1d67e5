"""The ledger says what each step really consumed, place by place, however it was cut and often it was killed."""

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from foreseen.data.order import Order
from foreseen.data.shards import ShardSet
from foreseen.engine.ledger import read_ledger
from foreseen.errors import BadInput
from tests.engine.test_train import configure, run

STEPS, GLOBAL_SIZE, SAMPLES = 8, 16, 37


def test_each_step_names_the_samples_of_the_order(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path, run__ledger=True))
    found = read_ledger(tmp_path)
    expected = Order(0, SAMPLES).samples(np.arange(STEPS * GLOBAL_SIZE)).reshape(STEPS, GLOBAL_SIZE)
    assert np.array_equal(found, expected)
    epoch = found.ravel()[:SAMPLES]
    assert sorted(epoch.tolist()) == list(range(SAMPLES))
    assert not (tmp_path / "ledger/pixels.npy").exists()


def test_micro_batches_do_not_show_and_a_changed_picture_does(small_shards: Path, tmp_path: Path) -> None:
    for micro_size in (16, 4):
        run(small_shards, configure(tmp_path / str(micro_size), run__ledger="pixels", batch__micro_size=micro_size))
    whole, cut = (read_ledger(tmp_path / name, "pixels") for name in ("16", "4"))
    assert np.array_equal(whole, cut)
    assert len(np.unique(whole)) == whole.size  # a sample that comes again is cropped anew
    other = configure(tmp_path / "other seed", run__ledger="pixels")
    run(small_shards, other.model_copy(update={"seed": 1}))
    assert (read_ledger(tmp_path / "other seed", "pixels") != whole).all()


def test_a_run_that_goes_on_completes_its_ledger(small_shards: Path, tmp_path: Path) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    run(small_shards, configure(unbroken, run__ledger=True))
    run(small_shards, configure(stopped, run__ledger=True), signal_at=3)
    half = read_ledger(stopped)
    assert (half[:4] >= 0).all()
    assert (half[4:] == -1).all()
    run(small_shards, configure(stopped, run__ledger=True))
    assert np.array_equal(read_ledger(stopped), read_ledger(unbroken))


def test_what_stands_in_for_an_unreadable_sample_is_what_the_ledger_names(small_shards: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(small_shards, damaged)
    shards = ShardSet.open(damaged, "train")
    with open(damaged / "train-000000.tar", "r+b") as tar:
        tar.seek(int(shards._index[3]["offset_512"]) * 512)
        tar.write(bytes(64))
    run(small_shards, configure(tmp_path / "sound", run__ledger=True))
    run(damaged, configure(tmp_path / "run", run__ledger=True, data__max_bad_fraction=0.5))
    sound, found = read_ledger(tmp_path / "sound"), read_ledger(tmp_path / "run")
    assert (found != 3).all()
    assert np.array_equal(sound != 3, sound == found)  # no other sample has moved


def test_a_run_without_a_ledger_says_how_to_keep_one(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path))
    with pytest.raises(BadInput, match=r"there is no .*samples.npy: a run keeps it with run.ledger=true"):
        read_ledger(tmp_path)


def test_a_ledger_may_be_taken_up_in_the_middle_of_a_run(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path), signal_at=3)
    config = configure(tmp_path)
    run(small_shards, config.model_copy(update={"run": config.run.model_copy(update={"ledger": True})}))
    found = read_ledger(tmp_path)
    assert (found[:4] == -1).all()
    assert (found[4:] >= 0).all()


def test_a_disk_that_takes_half_a_row_gets_the_rest_or_says_that_it_is_full(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    room = [10**6]

    def a_little(file: int, data: bytes, place: int) -> int:
        data = bytes(data)[: min(13, room[0])]
        if not data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= len(data)
        return pwrite(file, data, place)

    monkeypatch.setattr(os, "pwrite", a_little)
    run(small_shards, configure(tmp_path / "run", run__ledger=True))
    expected = Order(0, SAMPLES).samples(np.arange(STEPS * GLOBAL_SIZE)).reshape(STEPS, GLOBAL_SIZE)
    assert np.array_equal(read_ledger(tmp_path / "run"), expected)
    room[0] = 100
    with pytest.raises(OSError, match="No space left"):
        run(small_shards, configure(tmp_path / "full", run__ledger=True))
