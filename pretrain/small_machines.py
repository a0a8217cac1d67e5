"""What the papers fixed for a million pictures and a thousand a step, fitted to other data, batches and lengths.

A recipe that states a number keeps it. Where it leaves null, a rule that stands here decides, and its reason is
printed when the run starts.
"""

import math
from dataclasses import dataclass

from foreseen.config import Config

_MOST_PROTOTYPES, _FEWEST_PROTOTYPES = 65_536, 256
_MOMENTUM, _MOMENTUM_BATCH = 0.996, 1024  # DINO's
_TEACHER_MEMORIES = 20  # of the teacher in a run, at least
_HEADS_SHARE, _HEADS_STEPS = 0.1, 1000  # of the run; new heads settle within some hundred steps
_WARMUP_SHARE, _WARMUP_STEPS = 0.3, 37_500  # 30 of 100 epochs of ImageNet at 1024 a step


@dataclass(frozen=True)
class Size:
    """How much a run sees.

    Attributes:
        samples: in the data, N.
        global_size: in a step, G.
        steps: in the run.
    """

    samples: int
    global_size: int
    steps: int

    @classmethod
    def of(cls, config: Config) -> "Size":
        """That of a config with its length resolved."""
        steps, epochs = config.run.steps, config.run.epochs
        assert steps is not None, "Config.with_length resolves it"
        assert epochs is not None, "Config.with_length resolves it"
        return cls(max(1, round(steps * config.batch.global_size / epochs)), config.batch.global_size, steps)

    @property
    def steps_per_epoch(self) -> float:
        """Updates in one pass over the data."""
        return self.samples / self.global_size


def prototypes(asked: int | None, size: Size, key: str) -> tuple[int, str | None]:
    """How many prototypes, K, and a sentence about it where there is something to say.

    The papers' 65,536 are 64 for each picture of a step and a twentieth of the data. With fewer pictures most would
    never be used, and a batch cannot balance them.

    Args:
        asked: by the config; null takes the largest power of two that is neither above the number of pictures nor
            above 64 times the global batch, between 256 and 65,536.
        size: of the run.
        key: of the config, for the sentence.
    """
    most = min(size.samples, 64 * size.global_size)
    fitted = min(_MOST_PROTOTYPES, max(_FEWEST_PROTOTYPES, 1 << int(math.log2(most))))
    if asked is None:
        return fitted, (
            f"{key} {fitted:,}: the largest power of two within {size.samples:,} pictures and 64 × {size.global_size} "
            f"in a step, between {_FEWEST_PROTOTYPES} and {_MOST_PROTOTYPES:,}"
        )
    if asked > 4 * fitted:
        return asked, (
            f"{key} {asked:,} is many for {size.samples:,} pictures, {size.global_size} in a step: most prototypes "
            f"will never be used, and small batches collapse more easily with more of them; {key}=null takes {fitted:,}"
        )
    return asked, None


def teacher_momentum(asked: float | None, size: Size) -> tuple[float, str | None]:
    """The teacher's momentum at the start, and a sentence about it where there is something to say.

    Args:
        asked: by the config; null takes DINO's 0.996 at 1024 a step raised to the power G / 1024, so that the teacher
            remembers as many pictures (Busbridge et al. 2023, arXiv:2307.13813), and less where a run is so short that
            it would hold fewer than 20 such memories.
        size: of the run.
    """
    scaled = _MOMENTUM ** (size.global_size / _MOMENTUM_BATCH)
    most = max(0.9, 1.0 - _TEACHER_MEMORIES / size.steps)
    momentum = min(scaled, most)
    if asked is not None:
        memory = 1 / (1 - asked)
        return asked, None if memory <= size.steps / 2 else (
            f"method.teacher_momentum {asked} remembers {memory:,.0f} steps, and the run has {size.steps:,}: the "
            f"teacher hardly leaves its start; method.teacher_momentum=null takes {momentum:.5g}"
        )
    reason = (
        f"{_MOMENTUM} at {_MOMENTUM_BATCH} a step, raised to the power {size.global_size}/{_MOMENTUM_BATCH}"
        if scaled <= most
        else f"1 - {_TEACHER_MEMORIES} / {size.steps} steps, so that the teacher can follow in so short a run"
    )
    return momentum, f"method.teacher_momentum {momentum:.5g}: {reason}"


def temperature_warmup(size: Size) -> tuple[int, str]:
    """Steps over which the teacher's temperature rises where no number of epochs is stated, and a sentence about it."""
    steps = max(1, min(round(_WARMUP_SHARE * size.steps), _WARMUP_STEPS))
    return steps, (
        f"method.warmup_teacher_temp_epochs {steps / size.steps_per_epoch:.3g} ({steps:,} steps): {_WARMUP_SHARE:.0%} "
        f"of the run, at most {_WARMUP_STEPS:,} steps"
    )


def head_warmup(asked: int | None, size: Size, *, begins_from_weights: bool) -> tuple[int, str | None]:
    """Steps for which new heads alone are trained, and a sentence about it where there is something to say.

    Args:
        asked: by the config; null takes a tenth of the run, at most 1,000 steps, where the backbone has learned
            something that new heads would destroy, and 0 else.
        size: of the run.
        begins_from_weights: whether it has.
    """
    if asked is not None:
        return asked, None
    if not begins_from_weights:
        return 0, None
    steps = min(round(_HEADS_SHARE * size.steps), _HEADS_STEPS)
    return steps, (
        f"method.head_warmup_steps {steps:,}: {_HEADS_SHARE:.0%} of the run, at most {_HEADS_STEPS:,} steps, in which "
        "new heads learn and the backbone, which begins from weights, stands still"
    )


def too_long(key: str, steps: int, size: Size, what: str) -> str | None:
    """A sentence where something that should be a part of a run takes all of it.

    Args:
        key: of the config.
        steps: that it takes.
        size: of the run.
        what: comes of it.
    """
    return f"{key} is {steps:,} steps, and the run has {size.steps:,}: {what}" if steps >= size.steps else None
