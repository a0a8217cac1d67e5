"""Two runs of one job, compared by what they left in their folders: ledgers, losses, gradient norms, weights.

Each comparison gives sentences with whether all is well, for a person to read.
"""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.torch import load_file
from torch import Tensor

from foreseen.commands.launched import metrics
from foreseen.engine.ledger import PIXELS, SAMPLES, read_ledger

# Relative difference of losses and gradient norms that another order of sums explains, over so few steps: it grows.
_TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
_TOLERANCE_STEPS = 20
# Rounding in bf16 has no bound over many steps, but the first begins from equal weights; a wrong scale is off by more.
_FIRST_STEP_IN_BF16 = 0.05
# A GPU's kernels may add in any order; nothing is promised there but that it is rounding, which grows in the weights.
_ROUNDING_ON_A_GPU, _WEIGHTS_ON_A_GPU = 1e-3, 1e-2

Sentence = tuple[bool, str]


def compare_same_topology(one: Path, two: Path, *, on_cpu: bool) -> list[Sentence]:
    """A run against an unbroken one of the same ranks and micro-batches: bit for bit on a CPU."""
    distance, step = distance_of(one, two)
    if distance == 0.0:
        numbers = (True, "losses and gradient norms are equal to the bit")
    else:
        text = f"losses and gradient norms differ by up to {distance:.1e}, first in step {step}"
        numbers = (not on_cpu and distance <= _ROUNDING_ON_A_GPU, text)
    return [*compare_ledgers(one, two), numbers, _compare_ends(one, two, on_cpu=on_cpu)]


def _compare_ends(one: Path, two: Path, *, on_cpu: bool) -> Sentence:
    """The last checkpoints: tensors by their checksums, and what the run remembers beside them."""
    first, second = _final_checksums(one), _final_checksums(two)
    if first == second and (differing := _differing(_final_state(one), _final_state(two))):
        return not on_cpu, f"final weights and optimizer state are equal, but not what is counted: {differing}"
    if first == second:
        return True, "final weights and optimizer state are equal"
    if on_cpu or first["of"] != second["of"]:
        return False, f"final weights and optimizer state are NOT equal, at {first['of']} and {second['of']}"
    distance = _weight_distance(_last_checkpoint(one), _last_checkpoint(two))
    return distance <= _WEIGHTS_ON_A_GPU, f"final weights differ by {distance:.1e} of their norm, on a GPU"


def compare_other_topology(one: Path, two: Path, *, precision: str, on_cpu: bool) -> list[Sentence]:
    """A run against one on other ranks or micro-batches: the same samples and pixels, and losses but for rounding."""
    ledgers = compare_ledgers(one, two)
    distance, step = distance_of(one, two, steps=_TOLERANCE_STEPS)
    text = f"losses and gradient norms of {_TOLERANCE_STEPS} steps differ by up to {distance:.1e}"
    text += "" if step is None else f", first in step {step}"
    if (limit := _TOLERANCE.get(precision)) is not None:
        limit = limit if on_cpu else max(limit, _ROUNDING_ON_A_GPU)
        return [*ledgers, (distance <= limit, f"{text}; {precision} allows {limit:.0e}")]
    text += f"; {precision} rounds too much to be bounded"
    if precision != "bf16":  # whether a step of fp16 overflows depends on how it is cut
        return [*ledgers, (True, text)]
    distance, _ = distance_of(one, two, steps=1)
    text += f", but for the first step, where they differ by {distance:.1e} and {_FIRST_STEP_IN_BF16:.0e} is allowed"
    return [*ledgers, (distance <= _FIRST_STEP_IN_BF16, text)]


def check_moves(run: Path) -> Sentence:
    """Runs in which nothing happens are all the same, and prove nothing."""
    losses = [line["loss"] for line in metrics(run) if "loss" in line]
    different = len({loss for loss in losses if math.isfinite(loss)})
    return 2 * different > len(losses), f"{different} different losses in {len(losses)} steps"


def compare_ledgers(one: Path, two: Path) -> list[Sentence]:
    """What each step consumed, place by place and never sorted."""
    sentences = []
    for kind, what in ((SAMPLES, "samples"), (PIXELS, "pixels, masks and labels from the loader")):
        first, second = (read_ledger(run, kind) for run in (one, two))
        if first.shape != second.shape:
            sentences.append((False, f"ledgers of {what} have other shapes, {first.shape} and {second.shape}"))
            continue
        missing = int(((first < 0) | (second < 0)).sum())
        differing = np.argwhere(first != second)
        found = "are the same, element for element"
        if len(differing):
            found = f"differ in {len(differing)}, first in step {differing[0][0]} at place {differing[0][1]}"
        text = f"{what} of {first.shape[0]} steps × {first.shape[1]} places {found}"
        sentences.append((not missing and not len(differing), text + (f"; {missing} are missing" if missing else "")))
    return sentences


def check_epochs(run: Path) -> Sentence:
    """Every sample once in each full epoch and never twice in a part of one; stand-ins for unreadable ones may be."""
    stream = read_ledger(run).ravel()
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    samples = round(len(stream) / config["run"]["epochs"])
    replaced = max((line.get("unreadable_samples", 0) for line in metrics(run)), default=0)
    epochs = [stream[start : start + samples] for start in range(0, len(stream), samples)]
    twice = sum(len(epoch) - len(np.unique(epoch)) for epoch in epochs)
    text = f"{len(stream):,} samples are {len(stream) / samples:.2f} epochs of {samples:,}: "
    text += f"{twice or 'none'} comes twice in one"
    # Each epoch meets them again.
    return twice <= replaced * len(epochs), text + (f" ({replaced} stand in for unreadable ones)" if replaced else "")


def distance_of(one: Path, two: Path, *, steps: int | None = None) -> tuple[float, int | None]:
    """Largest relative difference of loss or gradient norm in the first steps, or all, and the first that differs."""
    first, second = ({line["step"]: line for line in metrics(run) if "loss" in line} for run in (one, two))
    if first.keys() != second.keys() or not first:
        return math.inf, None
    worst, where = 0.0, None
    for step, line in itertools.islice(first.items(), steps):
        for name in ("loss", "grad_norm"):
            a, b = line[name], second[step][name]
            gap = 0.0 if a == b or (a != a and b != b) else abs(a - b) / max(abs(a), abs(b))
            if gap != 0.0 and where is None:
                where = step
            worst = max(worst, gap) if gap == gap else math.inf
    return worst, where


def _final_checksums(run: Path) -> dict[str, str]:
    """Checksums of the tensors of the last checkpoint, from its manifest."""
    newest = _last_checkpoint(run)
    files = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {"of": newest.name} | {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def _final_state(run: Path) -> dict[str, Any]:
    """What the last checkpoint remembers beside tensors: counts, the loss scale, the recorder's norms."""
    state: dict[str, Any] = json.loads((_last_checkpoint(run) / "state.json").read_text(encoding="utf-8"))
    del state["config"]  # names the run folder, and what may change
    return state


def _differing(one: dict[str, Any], two: dict[str, Any]) -> str:
    """Keys under which two states differ; NaN is like NaN."""
    return ", ".join(key for key in one.keys() | two.keys() if json.dumps(one.get(key)) != json.dumps(two.get(key)))


def _last_checkpoint(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))


def _weight_distance(one: Path, two: Path) -> float:
    """Norm of the difference of all weights over their norm; infinite where that is not finite, or names differ."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    if first.keys() != second.keys():
        return math.inf

    def squares(tensors: list[Tensor]) -> float:
        return sum(float(tensor.double().square().sum()) for tensor in tensors)

    gap = squares([value.double() - second[name].double() for name, value in first.items()])
    whole = squares(list(first.values()))
    return math.sqrt(gap / whole) if math.isfinite(gap) and whole else math.inf
