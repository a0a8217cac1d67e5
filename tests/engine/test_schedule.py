"""Schedules are pure functions of the step, equal to the authors'."""

import pytest

from foreseen.engine.schedule import scaled_lr, warmup_cosine
from tests.golden_cases import load_case


def test_warmup_and_cosine_equal_the_mae_code() -> None:
    case, _ = load_case("mae", "lr_schedule")
    args, per_epoch = case["config"]["args"], case["config"]["steps_per_epoch"]
    for epoch, expected, *_ in case["values"]["rows"]:
        lr = warmup_cosine(
            round(epoch * per_epoch),
            peak=args["lr"],
            end=args["min_lr"],
            warmup_steps=args["warmup_epochs"] * per_epoch,
            total_steps=args["epochs"] * per_epoch,
        )
        assert lr == pytest.approx(expected, rel=1e-12)


def test_a_run_without_warmup_begins_at_the_peak_and_tends_to_the_end() -> None:
    values = [warmup_cosine(step, peak=1.0, end=0.1, warmup_steps=0, total_steps=10) for step in range(10)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)
    assert warmup_cosine(10, peak=1.0, end=0.1, warmup_steps=0, total_steps=10) == pytest.approx(0.1)


@pytest.mark.parametrize(("scaling", "expected"), [("linear", 2.4e-3), ("sqrt", 6e-4), ("none", 1.5e-4)])
def test_the_lr_rule_is_the_recipes_choice(scaling: str, expected: float) -> None:
    assert scaled_lr(1.5e-4, scaling, 4096, 256) == pytest.approx(expected)  # type: ignore[arg-type]
