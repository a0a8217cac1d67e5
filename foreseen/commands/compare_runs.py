"""Two runs of one job, compared by what they left in their folders: ledgers, losses, gradient norms, weights.

Each comparison gives sentences with whether all is well, for a person to read.
"""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import yaml

from foreseen.commands.launched import metrics
from foreseen.engine.ledger import PIXELS, SAMPLES, read_ledger

# Relative difference of losses and gradient norms that another order of sums explains, over so few steps: it grows.
_TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5}
_TOLERANCE_STEPS = 20
_ROUNDING_ON_A_GPU = 1e-3  # its kernels may add in any order; nothing is promised there but that it is rounding

Sentence = tuple[bool, str]


def compare_same_topology(one: Path, two: Path, *, on_cpu: bool) -> list[Sentence]:
    """A run against an unbroken one of the same ranks and micro-batches: bit for bit on a CPU."""
    distance, step = distance_of(one, two)
    if distance == 0.0:
        numbers = (True, "losses and gradient norms are equal to the bit")
    else:
        text = f"losses and gradient norms differ by up to {distance:.1e}, first in step {step}"
        numbers = (not on_cpu and distance <= _ROUNDING_ON_A_GPU, text)
    same = _final_checksums(one) == _final_checksums(two)
    weights = (same or not on_cpu, f"final weights and optimizer state are {'equal' if same else 'NOT equal'}")
    return [*compare_ledgers(one, two), numbers, weights]


def compare_other_topology(one: Path, two: Path, *, precision: str) -> list[Sentence]:
    """A run against one on other ranks or micro-batches: the same samples and pixels, and losses but for rounding."""
    distance, step = distance_of(one, two, steps=_TOLERANCE_STEPS)
    limit = _TOLERANCE.get(precision)
    text = f"losses and gradient norms of {_TOLERANCE_STEPS} steps differ by up to {distance:.1e}"
    text += "" if step is None else f", first in step {step}"
    text += f"; {precision} allows {limit:.0e}" if limit else f"; {precision} rounds too much to be bounded"
    return [*compare_ledgers(one, two), (limit is None or distance <= limit, text)]


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
    replaced = metrics(run)[-1].get("unreadable_samples", 0)
    epochs = [stream[start : start + samples] for start in range(0, len(stream), samples)]
    twice = sum(len(epoch) - len(np.unique(epoch)) for epoch in epochs)
    text = f"{len(stream):,} samples are {len(stream) / samples:.2f} epochs of {samples:,}: "
    text += f"{twice or 'none'} comes twice in one"
    return twice <= replaced, text + (f" ({replaced} stand in for unreadable ones)" if replaced else "")


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
    newest = max((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    files = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))["files"]
    return {"of": newest.name} | {name: digest for name, digest in files.items() if name.endswith(".safetensors")}
