"""Whether a self-distilled run has collapsed: every picture the same, in one of four ways, or nearly so.

* uniform: every target is the uniform distribution, the loss sits at ln K and student and teacher agree on nothing;
* one-hot: every target is the same prototype, and the loss falls to 0;
* same: every target is the same distribution, neither of the two, which wanders from step to step as the centre runs
  after it;
* rank: the features of all pictures lie on a line or a point, whatever the targets are;
* weak: no collapse, but over a long time targets tell less than two kinds of pictures apart.

A rule looks at logged numbers alone, so it costs nothing and can be tried on any metrics.jsonl.
"""

import math
from collections.abc import Mapping
from typing import Any

from foreseen.errors import BadInput

# How long a sign must last, in steps. Targets of a small run were the same for its first 280 steps, and came apart.
_LASTING_STEPS = {"uniform": 100, "one-hot": 100, "rank": 100, "same": 300, "weak": 1000}
# Shares of ln K that the targets' entropy has. Healthy runs of the small recipes stay between 0.3 and 0.9; provoked
# collapses come to 1.000 and to 1e-6.
_UNIFORM, _CERTAIN = 0.98, 0.05
_ONE_PROTOTYPE = 1.5  # effective number used; of healthy runs a single step may have as few
_SAME = 0.1  # nats that a target says of its picture; targets that are the same: 0.05 and less, others 0.3 and more
_WEAK = math.log(2.0)  # two runs whose features were no better than guessing stayed below 0.66 for 2,000 steps
_LOWEST_RANK = 2.0  # effective number of directions in which features differ; healthy: 4 and more
_SMALLEST_SPREAD = 5e-4  # share of the features' mean square that differs between pictures; healthy: 2e-3 and more

_CENTRED = "raise method.teacher_momentum, lower optim.base_lr, or set method.centering=sinkhorn"
_INFORMATION = "health/target_information"
# Untrained features tell pictures apart and use all prototypes, so these two need not wait for a long warm-up to end;
# targets of an untrained network are nearly uniform once they are centred (0.97 ln K), so the others do.
_SOON = {"one-hot", "rank"}
_SOON_STEPS = 300
_MILDER = ("same", "weak")  # and not said besides another one
_REMEDIES = {
    "uniform": (
        "every target is nearly uniform: pictures are told apart by nothing",
        "lower method.teacher_temp (0.04 is safe) or method.warmup_teacher_temp, lower optim.base_lr, or take fewer "
        "prototypes",
    ),
    "one-hot": (
        "nearly all pictures get the same prototype",
        "raise method.teacher_temp, lower method.center_momentum (0.9), or set method.centering=sinkhorn",
    ),
    "same": ("all pictures of a step get the same target", _CENTRED),
    "rank": (
        "the teacher's features of all pictures are nearly the same",
        "lower optim.base_lr and lengthen optim.warmup_steps, lower weight decay, or raise batch.global_size",
    ),
    "weak": (
        "targets have told less than two kinds of pictures apart for long",
        f"{_CENTRED}, or make the crops more alike (views.scale, method.crops)",
    ),
}


class CollapseAlarm:
    """Says once, in one sentence, that a run has collapsed, and how to avoid it.

    A sign must last for 100 steps, targets that are the same for 300, weak ones for 1,000; and none counts before
    `grace_steps`, or 300 steps for one-hot targets and for the rank: at the start targets are near uniform.

    Args:
        prototypes: K.
        grace_steps: not judged; the warm-up of the lr, and 100 at least.
        stop: whether to stop the run then; weak targets never do.
    """

    def __init__(self, prototypes: int, *, grace_steps: int, stop: bool) -> None:
        self._prototypes = prototypes
        self._grace_steps = max(100, grace_steps)
        self._stop = stop
        self.load_state(None)

    def state(self) -> dict[str, Any]:
        """What verdicts to come depend on."""
        return {"since": dict(self._since), "said": sorted(self._said), "last": self._last}

    def load_state(self, state: Mapping[str, Any] | None) -> None:
        """Take back what `state` gave; None forgets what was seen."""
        state = state or {"since": {}, "said": [], "last": 0}
        self._since: dict[str, int] = dict(state["since"])
        self._said: set[str] = set(state["said"])
        self._last: int = state["last"]

    def look(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """Judge the numbers of a line.

        Args:
            step: updates made.
            numbers: `teacher_entropy`, and of `health/`: `prototypes_used`, `target_information`, `feature_rank` and
                `feature_spread`.

        Returns:
            The sentence, once for each row of lines that show it.

        Raises:
            BadInput: the same sentence, where the run is to stop.
        """
        before, self._last = self._last, step
        signs = {sign for sign in self._signs(numbers) if step > self._grace(sign)}
        self._said &= signs
        self._since = {sign: self._since.get(sign, max(before, self._grace(sign))) for sign in sorted(signs)}
        for sign in sorted(signs - self._said):
            graver = self._said - {"weak"} if sign == "same" else self._said
            if step - self._since[sign] < _LASTING_STEPS[sign] or (sign in _MILDER and graver):
                continue
            self._said.add(sign)
            sentence = self._sentence(step, sign, numbers)
            if self._stop and sign != "weak":
                raise BadInput(sentence)
            return sentence
        return None

    def _grace(self, sign: str) -> int:
        return min(self._grace_steps, _SOON_STEPS) if sign in _SOON else self._grace_steps

    def _signs(self, numbers: Mapping[str, float]) -> set[str]:
        signs = set()
        entropy, information = numbers["teacher_entropy"] / math.log(self._prototypes), numbers[_INFORMATION]
        if entropy > _UNIFORM:
            signs.add("uniform")
        if entropy < _CERTAIN and numbers["health/prototypes_used"] < _ONE_PROTOTYPE:
            signs.add("one-hot")
        if information < _SAME:
            signs.add("same")
        if information < _WEAK:
            signs.add("weak")
        if numbers["health/feature_rank"] < _LOWEST_RANK or numbers["health/feature_spread"] < _SMALLEST_SPREAD:
            signs.add("rank")
        return signs

    def _sentence(self, step: int, sign: str, numbers: Mapping[str, float]) -> str:
        what, remedy = _REMEDIES[sign]
        name = "WEAK TARGETS" if sign == "weak" else f"COLLAPSE ({sign})"
        return (
            f"step {step}: {name}: {what} (teacher entropy {numbers['teacher_entropy']:.3g} of "
            f"ln K = {math.log(self._prototypes):.3g}, {numbers['health/prototypes_used']:.3g} prototypes used, "
            f"targets say {numbers[_INFORMATION]:.2g} nats of a picture, "
            f"feature rank {numbers['health/feature_rank']:.3g}, spread {numbers['health/feature_spread']:.2g}). "
            f"Start anew in another run.dir: {remedy}"
        )
