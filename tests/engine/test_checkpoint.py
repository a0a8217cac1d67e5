"""A checkpoint is whole or absent, and what is kept is what was promised."""

import errno
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from foreseen.engine import checkpoint
from foreseen.engine.checkpoint import Checkpoints
from foreseen.errors import BadInput


def _save(checkpoints: Checkpoints, step: int) -> None:
    weights = {"weight": torch.full((4,), float(step))}
    checkpoints.save(step, weights, {"exp_avg/weight": torch.ones(4)}, {"numbers": [1, 2]})


def sign(folder: Path) -> None:
    """Make the manifest of a checkpoint fit the files that a test has changed."""
    digests = {path.name: checkpoint.sha256_of(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_text(json.dumps({"files": digests}), encoding="utf-8")


def _steps(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    _save(checkpoints, 7)
    assert checkpoints.newest_sound() == 7
    found = checkpoints.load(7)
    assert torch.equal(found.model["weight"], torch.full((4,), 7.0))
    assert torch.equal(found.optimizer["exp_avg/weight"], torch.ones(4))
    assert found.state == {"numbers": [1, 2], "step": 7}


def test_going_back_drops_the_later_ones_and_the_mark_of_the_best_among_them(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in range(1, 6):
        _save(checkpoints, step)
    checkpoints.mark_best(2, 0.9)
    checkpoints.drop_after(3)
    assert (checkpoints.newest_sound(), checkpoints.best) == (3, (2, 0.9))
    checkpoints.drop_after(1)
    assert (_steps(checkpoints), checkpoints.best) == (["step-1"], None)


def test_the_newest_that_is_good_stays_though_others_follow(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in range(1, 6):
        checkpoints.save(step, {}, {}, {}, stays=lambda saved: saved <= 2)
    assert _steps(checkpoints) == ["step-2", "step-5"]
    assert checkpoints.newest_sound(lambda saved: saved < 5) == 2


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        _save(checkpoints, step)
        if step == 2:
            checkpoints.mark_best(2, 0.9)
    assert _steps(checkpoints) == ["best.json", "step-2", "step-4", "step-5"]
    assert checkpoints.best == (2, 0.9)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "manifest"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    _save(checkpoints, 1)
    _save(checkpoints, 2)
    victim = tmp_path / "step-2" / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = victim.read_bytes()
    if damage == "flip":
        victim.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest_sound() == 1
    assert "step-2 is damaged" in caplog.text


@pytest.mark.parametrize("moment", ["writing", "publishing"])
def test_a_kill_while_saving_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    _save(checkpoints, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "sync", killed) if moment == "writing" else patched.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            _save(checkpoints, 2)
    assert ".tmp-2" in _steps(checkpoints)
    assert checkpoints.newest_sound() == 1
    checkpoints.clean_leftovers()
    assert _steps(checkpoints) == ["step-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["python", "safetensors"],
)
def test_a_full_disk_is_a_sentence_and_the_older_checkpoint_is_intact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    _save(checkpoints, 1)

    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(BadInput, match="step 2 cannot be written .* No space left .* intact"):
        _save(checkpoints, 2)
    assert _steps(checkpoints) == ["step-1"]
    assert checkpoints.newest_sound() == 1


def test_the_average_of_the_weights_is_kept_beside_them_and_verified(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    model = {"weight": torch.zeros(4), "buffer": torch.ones(2)}
    checkpoints.save(1, model, {}, {}, {"weight": torch.full((4,), 0.5)})
    found = checkpoints.load(1).handed_over
    assert torch.equal(found["weight"], torch.full((4,), 0.5))
    assert torch.equal(found["buffer"], model["buffer"])
    (tmp_path / "step-1/average.safetensors").unlink()
    assert "average.safetensors" in (checkpoints.find_damage(1) or "")


def test_tied_weights_are_stored_under_each_name(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    checkpoints.save(1, {"a": shared, "b": shared, "view": shared[1:]}, {}, {})
    model = checkpoints.load(1).model
    assert torch.equal(model["a"], model["b"])
    assert torch.equal(model["view"], shared[1:])
