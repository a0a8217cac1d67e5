"""Early stopping: when validation has not improved for so many evaluations.

What it remembers is a function of the run's own scores and stands in every checkpoint, so a run that is killed, or that
goes back, ends where the unbroken one does.
"""

import math
from collections.abc import Mapping
from typing import Any


class Patience:
    """Counts evaluations without a better score.

    Args:
        limit: so many in a row are enough; None is never out of patience.

    Attributes:
        best: the highest score so far, if there was one.
        waited: evaluations since then.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.best: float | None = None
        self.waited = 0

    @property
    def is_over(self) -> bool:
        """Whether the run should end."""
        return self.limit is not None and self.waited >= self.limit

    def judge(self, score: float | None) -> None:
        """Take in the score of an evaluation; None where there was none. One that is no number is no better."""
        if score is None:
            return
        if not math.isnan(score) and (self.best is None or score > self.best):
            self.best, self.waited = score, 0
        else:
            self.waited += 1

    def describe(self) -> str:
        """Why the run ends."""
        best = "nothing" if self.best is None else f"{self.best:.4g}"
        return f"validation has not improved on {best} for {self.waited} evaluations (run.stop_after)"

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state` gave; None, of an older version's checkpoint, is a fresh start."""
        self.best, self.waited = (state["best"], state["waited"]) if state else (None, 0)
