"""Checkpoints that are whole or absent.

A checkpoint is a folder `step-<n>` of safetensors and JSON with a manifest of checksums. It is written beside its
place, synced, and published by one rename, so a kill at any moment leaves the older ones untouched; one that fails its
checksums is passed over, with a word, for the one before. It holds no generator state, no worker's position and no
number of ranks: only (weights, optimizer, step, what the run is a function of).
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseen.errors import BadInput
from foreseen.files import read_json, sha256_of, sync, write_atomically

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d+)")
_FILES = {"model.safetensors", "optimizer.safetensors", "state.json"}


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds after it was read and verified."""

    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    average: dict[str, Tensor] | None = None

    @property
    def handed_over(self) -> dict[str, Tensor]:
        """The model's state with the average in the place of the weights, where the run keeps one."""
        return {**self.model, **(self.average or {})}


class Checkpoints:
    """The checkpoints of one run. Only the process that holds the run's lock may call what writes.

    Args:
        folder: `<run>/checkpoints`.
        keep_last: how many stay besides the best.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def clean_leftovers(self) -> None:
        """Remove what a killed process was writing or deleting."""
        if self.folder.is_dir():
            for leftover in [*self.folder.glob(".tmp-*"), *self.folder.glob(".del-*")]:
                shutil.rmtree(leftover)

    def save(
        self, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any],
        average: Mapping[str, Tensor] | None = None, stays: Callable[[int], bool] = lambda step: True,
    ) -> None:  # fmt: skip
        """Publish the checkpoint of a step, then drop those that retention no longer keeps.

        Args:
            step: updates made.
            model, optimizer: tensors by name.
            state: plain values.
            average: of the weights, for runs that keep one.
            stays: the newest checkpoint of whose step this is true is kept besides the last and the best.

        Raises:
            BadInput: the disk is full or read-only; older checkpoints are intact.
        """
        temporary, final = self.folder / f".tmp-{step}", self.folder / f"step-{step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if temporary.exists():
                shutil.rmtree(temporary)
            temporary.mkdir()
            save_file(_separate(model), temporary / "model.safetensors")
            save_file(_separate(optimizer), temporary / "optimizer.safetensors")
            if average is not None:
                save_file(_separate(average), temporary / "average.safetensors")
            (temporary / "state.json").write_text(json.dumps({**state, "step": step}, indent=2), encoding="utf-8")
            manifest = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps({"files": manifest}, indent=2), encoding="utf-8")
            for path in [*temporary.iterdir(), temporary]:
                sync(path)
            if final.exists():
                self._remove(final)
            os.rename(temporary, final)
            sync(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            reason = getattr(error, "strerror", None) or error
            raise BadInput(
                f"the checkpoint of step {step} cannot be written to {self.folder}: {reason}; "
                "older checkpoints are intact, the run goes on from them once there is room"
            ) from error
        self._retain(stays)

    def newest_sound(self, eligible: Callable[[int], bool] = lambda step: True) -> int | None:
        """The step of the newest checkpoint that is eligible and verifies, or None where none is eligible.

        Raises:
            BadInput: there are some, and each is damaged.
        """
        steps = [step for step in self._steps(newest_first=True) if eligible(step)]
        for step in steps:
            problem = self.find_damage(step)
            if problem is None:
                return step
            _logger.warning("checkpoint step-%d is damaged (%s); looking for the one before", step, problem)
        if steps:
            raise BadInput(
                f"all {len(steps)} checkpoints in {self.folder} are damaged, such as step-{steps[0]} "
                f"({self.find_damage(steps[0])}); bring one back from a copy, or take another run.dir to begin anew"
            )
        return None

    def set_aside_newer(self, step: int) -> None:
        """Rename checkpoints newer than the one that a run goes on from: `damaged-step-<n>` counts in no retention."""
        for newer in self._steps():
            if newer > step:
                aside = self.folder / f"damaged-step-{newer}"
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(self.folder / f"step-{newer}", aside)

    def drop_after(self, step: int) -> None:
        """Remove the checkpoints past a step, and the mark of the best if it is one of them.

        The newest goes first: a run that is killed halfway goes on from one of the others, and comes to the same.
        """
        best = self.best
        if best is not None and best[0] > step:
            (self.folder / "best.json").unlink()
        for later in self._steps(newest_first=True):
            if later > step:
                self._remove(self.folder / f"step-{later}")

    def find_damage(self, step: int) -> str | None:
        """What is wrong with a checkpoint, or None."""
        folder = self.folder / f"step-{step}"
        try:
            files = read_json(folder / "manifest.json")["files"]
            if missing := _FILES - files.keys():
                return f"its manifest does not name {min(missing)}"
            for name, expected in files.items():
                if "/" in name or name.startswith("."):
                    return f"its manifest names {name!r}, which is no file of a checkpoint"
                if sha256_of(folder / name) != expected:
                    return f"{name} does not match its checksum"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return str(error)
        return None

    def load(self, step: int) -> Checkpoint:
        """Read the checkpoint of a step, onto the CPU.

        Raises:
            BadInput: its files are not what their checksums promised, or somebody made others of both.
        """
        folder = self.folder / f"step-{step}"
        average = folder / "average.safetensors"
        try:
            return Checkpoint(
                step=step,
                model=load_file(folder / "model.safetensors"),
                optimizer=load_file(folder / "optimizer.safetensors"),
                state=read_json(folder / "state.json"),
                average=load_file(average) if average.is_file() else None,
            )
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            raise BadInput(
                f"the checkpoint {folder} cannot be read: {error}; delete it to go on from another"
            ) from None

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the best checkpoint, if one was marked."""
        path = self.folder / "best.json"
        if not path.is_file():
            return None
        content = read_json(path)
        try:
            return int(content["step"]), float(content["score"])
        except (KeyError, TypeError, ValueError, OverflowError):
            raise BadInput(f"{path} is not what was written: delete it, and the best is chosen anew") from None

    def mark_best(self, step: int, score: float) -> None:
        """Keep the checkpoint of a step whatever comes after."""
        write_atomically(self.folder / "best.json", json.dumps({"step": step, "score": score}) + "\n")

    def _steps(self, *, newest_first: bool = False) -> list[int]:
        names = (path.name for path in self.folder.iterdir()) if self.folder.is_dir() else ()
        return sorted((int(m[1]) for name in names if (m := _NAME.fullmatch(name))), reverse=newest_first)

    def _retain(self, stays: Callable[[int], bool]) -> None:
        steps, best = self._steps(newest_first=True), self.best
        kept = {next(filter(stays, steps), None), None if best is None else best[0]}
        for step in steps[self.keep_last :]:
            if step not in kept:
                self._remove(self.folder / f"step-{step}")

    def _remove(self, folder: Path) -> None:
        # First out of sight, so that a kill halfway leaves no folder that looks like a checkpoint.
        doomed = folder.with_name(f".del-{folder.name}")
        os.rename(folder, doomed)
        shutil.rmtree(doomed)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that own their memory, as safetensors wants them; tied weights are stored once per name."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        separate[name] = tensor.clone() if shared else tensor
    return separate
