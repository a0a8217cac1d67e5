"""What a run is made of, and where it ended."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foreseen.config import Config
from foreseen.data.feed import Feeder
from foreseen.data.loader import SweepDataset
from foreseen.engine.checkpoint import Checkpoint, Checkpoints
from foreseen.engine.objective import Objective
from foreseen.engine.online_probe import OnlineProbe

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """All that a run is made of.

    Attributes:
        config: with its length resolved.
        objective: on the CPU, drawn from the config's seed.
        builder: what the training batches are made from.
        subset: sample numbers trained on; None for all.
        validation: this rank's share of the samples to choose by, if any.
        choose_by: the validation number whose largest value marks the best checkpoint.
        probe: what judges the frozen encoder on the way, if anything does.
        parents: what the weights began from, each with its "source" and "weights_sha256"; see `parents_of`.
        verb: the command that makes such jobs, so that `foreseen replay` can make it again.
    """

    config: Config
    objective: Objective
    builder: Feeder
    subset: Any = None
    validation: SweepDataset | None = None
    choose_by: str | None = None
    probe: OnlineProbe | None = None
    parents: Sequence[Mapping[str, Any]] = ()
    verb: str = ""


@dataclass(frozen=True)
class Outcome:
    """Where a run ended.

    Attributes:
        step: updates made.
        preempted: it was told to stop, and is not at its end.
        best_step: by validation, if there is any.
        told_to_stop: so it was, perhaps at its very end.
        parents: what its weights began from, at its first start, wherever that lies now.
    """

    step: int
    preempted: bool
    best_step: int | None = None
    told_to_stop: bool = False
    parents: Sequence[Mapping[str, Any]] = ()


def load_best(job: Job, outcome: Outcome) -> Checkpoint:
    """The checkpoint that a finished run is judged by: the best on validation, else or if damaged the last."""
    checkpoints = Checkpoints(job.config.run.dir / "checkpoints", job.config.run.keep_last)
    best = outcome.best_step
    if best is not None and (problem := checkpoints.find_damage(best)) is not None:
        _logger.warning("the best checkpoint, step-%d, is damaged (%s); taking the last one", best, problem)
        best = None
    return checkpoints.load(best or outcome.step)
