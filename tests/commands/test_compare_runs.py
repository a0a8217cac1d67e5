"""Runs that are the same pass, those that are not are named, and those in which nothing happens prove nothing."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from foreseen.commands.compare_runs import (
    check_epochs,
    check_moves,
    compare_other_topology,
    compare_same_topology,
)
from tests.damage import with_a_shard_of_garbage
from tests.engine.test_checkpoint import sign
from tests.engine.test_train import configure, run

STEPS = 8


def _make(shards: Path, folder: Path, **more: Any) -> Path:
    config = configure(folder, run__ledger="pixels", run__log_every=1, run__steps=STEPS, **more)
    run(shards, config)
    (folder / "config.yaml").write_text(config.with_length(37).to_yaml(), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _make(small_shards, tmp_path_factory.mktemp("one"))


def _scaled(one: Path, two: Path, factor: float) -> Path:
    """The run again with other losses."""
    shutil.copytree(one, two)
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    text = "".join(json.dumps(line | {"loss": line["loss"] * factor}) + "\n" for line in lines)
    (two / "metrics.jsonl").write_text(text, encoding="utf-8")
    return two


def test_equal_runs_pass_and_so_do_other_micro_batches(one: Path, small_shards: Path, tmp_path: Path) -> None:
    again, cut = _make(small_shards, tmp_path / "again"), _make(small_shards, tmp_path / "cut", batch__micro_size=4)
    assert all(good for good, _ in compare_same_topology(one, again, on_cpu=True))
    assert all(good for good, _ in compare_other_topology(one, cut, precision="fp32", on_cpu=True))
    assert check_moves(one) == (True, "8 different losses in 8 steps")
    assert check_epochs(one)[0]


def test_another_loss_is_named_and_how_much_of_it_is_rounding_depends_on_the_precision(
    one: Path, tmp_path: Path
) -> None:
    for factor, passes in ((1 + 1e-4, {("fp32", False), ("bf16", True), ("fp16", True)}), (2.0, {("fp16", True)})):
        two = _scaled(one, tmp_path / str(factor), factor)
        for precision, on_cpu in (("fp64", True), ("fp32", True), ("fp32", False), ("bf16", True), ("fp16", True)):
            found = compare_other_topology(one, two, precision=precision, on_cpu=on_cpu)
            assert all(good for good, _ in found) == ((precision, on_cpu) in passes), (factor, precision, found)
        assert not all(good for good, _ in compare_same_topology(one, two, on_cpu=True))


def test_what_a_run_counts_must_be_equal_too(one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    shutil.copytree(one, two)
    folder = two / f"checkpoints/step-{STEPS}"
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    (folder / "state.json").write_text(json.dumps(state | {"skipped_steps": 3}), encoding="utf-8")
    assert (False, "final weights and optimizer state are equal, but not what is counted: skipped_steps") in (
        compare_same_topology(one, two, on_cpu=True)
    )


def test_weights_on_a_gpu_may_round_otherwise_and_no_more(one: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for factor, passes in ((1 + 1e-4, True), (1.1, False), (math.nan, False)):
        two = tmp_path / str(factor)
        shutil.copytree(one, two)
        folder = two / f"checkpoints/step-{STEPS}"
        weights = load_file(folder / "model.safetensors")
        save_file({name: value * factor for name, value in weights.items()}, folder / "model.safetensors")
        sign(folder)
        assert all(good for good, _ in compare_same_topology(one, two, on_cpu=False)) == passes, factor
        assert not all(good for good, _ in compare_same_topology(one, two, on_cpu=True))


def test_a_run_in_which_nothing_happens_proves_nothing(one: Path, tmp_path: Path) -> None:
    assert check_moves(_scaled(one, tmp_path / "nan", math.nan)) == (False, "0 different losses in 8 steps")
    assert check_moves(_scaled(one, tmp_path / "zero", 0.0)) == (False, "1 different losses in 8 steps")


def test_stand_ins_for_unreadable_samples_come_twice_in_every_epoch(small_shards: Path, tmp_path: Path) -> None:
    damaged = with_a_shard_of_garbage(small_shards, tmp_path / "set", "train-000001.tar")
    folder = _make(damaged, tmp_path / "run", data__max_bad_fraction=0.5)
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 8, "validation/top1": 0.5}\n')  # what fine-tuning ends with
    good, text = check_epochs(folder)
    assert good, text
    assert "(10 stand in for unreadable ones)" in text
