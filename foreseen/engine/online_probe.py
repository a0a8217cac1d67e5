"""Probes of a run while it trains: the frozen encoder is judged every so many steps, and the run goes on unmoved."""

import json
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from foreseen import config
from foreseen.data.batch import Problem
from foreseen.data.loader import BatchBuilder
from foreseen.data.shards import ShardSet
from foreseen.data.subsets import Subsets, labelled_subsets
from foreseen.engine.extract import Extracted, Samples, choose, extract
from foreseen.engine.probe import Exam, probe
from foreseen.engine.verdict import verdict
from foreseen.errors import BadInput
from foreseen.models.features import default_features

_PREFIX = "probe/"


class OnlineProbe:
    """Judges an encoder on a fixed choice of pictures, and remembers what it found.

    Labelled pictures are cut in two: one part votes or trains, the other is judged. So a test split is never read, and
    what is decided by these numbers stays honest.

    Args:
        options: the config's section, with `every`.
        builder: of what is looked at, with one view: the encoder's own preprocessing.
        has_labels: judge by the labels of its shards; else by the spectrum alone.
        has_start: the run begins from weights that have learned something, which each probe is compared with.
        seed: chooses the pictures and the cut.

    Raises:
        BadInput: there are no labels to judge by, or too few.
    """

    def __init__(
        self, options: config.Probe, builder: BatchBuilder, *, has_labels: bool, has_start: bool, seed: int
    ) -> None:
        self._options = options
        self._seed = seed
        self._builder = builder
        shards = builder.shards
        self._every = options.every or 0
        self._has_start = has_start
        self._history: dict[int, dict[str, float]] = {}
        self._began, self._spent_s = time.perf_counter(), 0.0
        if has_labels:
            labelled = np.flatnonzero(_labels(shards) >= 0)
            self._samples = labelled[choose(len(labelled), options.samples, seed)]
        else:
            self._samples = choose(len(shards), options.samples, seed)
        self._cut: Subsets | None = None
        if has_labels:
            self._cut = _cut(shards, self._samples, options.validation_fraction, seed)
            if not len(self._cut.validation):
                raise BadInput(
                    f"no class has two labels among the {len(self._samples)} pictures that probes look at in "
                    f"{shards.place}, so none can be judged; raise probe.samples, or label more"
                )

    def recall(self, metrics: Path, accelerator: Accelerator) -> None:
        """Take up what earlier processes of the run wrote into its metrics.jsonl; rank 0 reads it for all."""
        found: list[dict[int, dict[str, float]]] = [{}]
        if accelerator.is_main_process and metrics.is_file():
            found = [_read_history(metrics)]
        if accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(found, src=0)
        self._history = found[0]
        self._began = time.perf_counter()

    def is_due(self, step: int, total_steps: int) -> bool:
        """Whether to probe after so many updates: at multiples of `every`, 0 among them, and at the end; once each."""
        return step not in self._history and (step == total_steps or step % self._every == 0)

    def run(
        self, step: int, encoder: nn.Module, accelerator: Accelerator, compute: config.Compute, *, batch_size: int,
        workers: int,
    ) -> tuple[dict[str, float], str, tuple[Problem, ...]]:  # fmt: skip
        """Judge the encoder as it is after `step` updates; it is left as it was.

        Returns:
            The numbers to log, the sentence, and what of the pictures could not be read.
        """
        began = time.perf_counter()
        features = self._options.features or default_features(encoder)
        extracted = extract(
            encoder, features, self._builder, self._samples, accelerator, compute, batch_size=batch_size,
            workers=workers,
        )  # fmt: skip
        found = probe(extracted.features, self._exam(extracted))
        sentence = verdict(found, self._history, has_start=self._has_start)
        self._history[step] = found.values()
        seconds = time.perf_counter() - began
        self._spent_s += seconds
        share = self._spent_s / (time.perf_counter() - self._began)
        values = {f"{_PREFIX}{name}": value for name, value in found.values().items()}
        values |= {f"{_PREFIX}seconds": seconds, f"{_PREFIX}time_share": share}
        spent = f", {share:.1%} of the time so far" if step else ""
        numbers = "  ".join(f"{_PREFIX}{name} {value:.3g}" for name, value in found.values().items())
        return values, f"step {step}  {numbers}  ({seconds:.1f} s{spent})\n  {sentence}", extracted.problems

    def _exam(self, extracted: Extracted) -> Exam | None:
        shards, options = self._builder.shards, self._options
        if self._cut is None or not (options.knn or options.linear):
            return None
        labels = _labels(shards)
        bank = extracted.labelled(self._cut.train, labels)
        linear = None
        if options.linear:
            parts = _cut(shards, self._cut.train, options.validation_fraction, self._seed)
            linear = extracted.labelled(parts.train, labels), extracted.labelled(parts.validation, labels)
        return Exam(
            judged=extracted.labelled(self._cut.validation, labels),
            bank=bank if options.knn else None,
            linear=linear,
            num_classes=shards.num_classes,
            seed=self._seed,
        )


def _labels(shards: ShardSet) -> Samples:
    if shards.labels is None or not (shards.labels >= 0).any():
        raise BadInput(
            f"split {shards.split!r} of {shards.place} has no labels to probe by; name labelled data in probe.data, or "
            "leave probe.data and probe.labels out for the numbers that need none"
        )
    return shards.labels.astype(np.int64)


def _cut(shards: ShardSet, samples: Samples, validation_fraction: float, seed: int) -> Subsets:
    """Two parts of some labelled samples."""
    labels = np.full(len(shards), -1, dtype=np.int64)
    labels[samples] = _labels(shards)[samples]
    return labelled_subsets(labels, validation_fraction=validation_fraction, shots=None, seed=seed)


def _read_history(metrics: Path) -> dict[int, dict[str, float]]:
    history: dict[int, dict[str, float]] = {}
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        found = {name.removeprefix(_PREFIX): value for name, value in line.items() if name.startswith(_PREFIX)}
        if found:
            history[line["step"]] = found
    return history
