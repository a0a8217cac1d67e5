"""A collapsed run is told once, in time and with a remedy; a healthy one is left in peace."""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.engine.job import Outcome
from foreseen.errors import BadInput
from foreseen.pretrain.collapse import CollapseAlarm
from foreseen.pretrain.dino import DINO

K = 128
HEALTHY = {
    "teacher_entropy": 3.9, "health/prototypes_used": 60.0, "health/feature_rank": 5.0, "health/feature_spread": 0.04,
    "health/target_information": 1.5,
}  # fmt: skip
COLLAPSED: dict[str, dict[str, float]] = {  # each as it looks in a run
    "uniform": {
        "teacher_entropy": 0.999 * math.log(K), "health/prototypes_used": 127.9, "health/target_information": 1e-3,
    },
    "one-hot": {"teacher_entropy": 1e-3, "health/prototypes_used": 1.0, "health/target_information": 0.0},
    "same": {"health/target_information": 0.02},
    "rank": {"health/feature_spread": 1e-5},
}  # fmt: skip
WEAK = {"health/target_information": 0.5}


def _alarm(stop: bool = False, grace_steps: int = 0) -> CollapseAlarm:
    return CollapseAlarm(K, grace_steps=grace_steps, stop=stop)


def _first_told(alarm: CollapseAlarm, numbers: Mapping[str, float], every: int, steps: int = 1000) -> int | None:
    for step in range(every, steps + 1, every):
        if alarm.look(step, numbers) is not None:
            return step
    return None


@pytest.mark.parametrize("every", [1, 20, 100, 250])
@pytest.mark.parametrize("sign", COLLAPSED)
def test_a_collapse_is_told_within_500_steps_however_seldom_a_run_logs(sign: str, every: int) -> None:
    step = _first_told(_alarm(), HEALTHY | COLLAPSED[sign], every)
    assert step is not None
    assert 200 <= step <= 500


@pytest.mark.parametrize("sign", COLLAPSED)
def test_it_is_told_once_with_the_numbers_and_a_remedy_and_again_after_a_recovery(sign: str) -> None:
    alarm, bad = _alarm(), HEALTHY | COLLAPSED[sign]
    said = [alarm.look(step, bad) for step in range(50, 1001, 50)]
    (sentence,) = [each for each in said if each is not None]
    assert f"COLLAPSE ({sign})" in sentence
    assert "teacher entropy" in sentence
    assert "method." in sentence or "optim." in sentence
    assert [alarm.look(step, HEALTHY) for step in range(1050, 1201, 50)] == [None] * 4
    assert any(alarm.look(step, bad) for step in range(1250, 1501, 50))


def test_a_healthy_run_and_a_passing_sign_are_left_in_peace() -> None:
    assert _first_told(_alarm(), HEALTHY, 20, steps=5000) is None
    alarm = _alarm()
    for step in range(20, 2001, 20):
        passing = COLLAPSED["rank"] if step // 20 % 5 == 0 else {}
        assert alarm.look(step, HEALTHY | passing) is None


@pytest.mark.parametrize("sign", COLLAPSED)
def test_a_run_that_goes_on_or_back_is_judged_as_an_unbroken_one(sign: str) -> None:
    numbers = {
        step: HEALTHY | (COLLAPSED[sign] if step in (500, 750) or step > 1000 else {}) for step in range(50, 1401, 50)
    }
    unbroken = _alarm()
    expected = {step: unbroken.look(step, each) for step, each in numbers.items()}
    assert [step for step, said in expected.items() if said] == [1300 if sign == "same" else 1100]
    for saved in (450, 700, 1050, 1100, 1200):
        first, second = _alarm(), _alarm()
        for step in range(50, saved + 1, 50):
            first.look(step, numbers[step])
        state = json.dumps(first.state())
        for step in range(saved + 50, 1401, 50):
            first.look(step, HEALTHY | COLLAPSED[sign])  # what is thrown away when it goes back
        for alarm in (first, second):
            alarm.load_state(json.loads(state))
            assert {step: alarm.look(step, numbers[step]) for step in range(saved + 50, 1401, 50)} == {
                step: said for step, said in expected.items() if step > saved
            }


def test_weak_targets_are_told_once_after_a_thousand_steps_and_never_stop_a_run() -> None:
    alarm = _alarm(stop=True)
    said = {step: alarm.look(step, HEALTHY | WEAK) for step in range(50, 3001, 50)}
    ((step, sentence),) = [(step, each) for step, each in said.items() if each is not None]
    assert step == 1100
    assert "WEAK TARGETS" in sentence
    assert "0.5 nats" in sentence
    assert _first_told(_alarm(), HEALTHY | {"health/target_information": 0.8}, 50, steps=3000) is None


@pytest.mark.parametrize("sign", COLLAPSED)
def test_a_collapse_is_one_sentence_though_its_targets_are_weak_as_well(sign: str) -> None:
    alarm = _alarm()
    said = [alarm.look(step, HEALTHY | WEAK | COLLAPSED[sign]) for step in range(50, 3001, 50)]
    (sentence,) = [each for each in said if each is not None]
    assert f"COLLAPSE ({sign})" in sentence


def test_targets_that_become_the_same_are_told_though_weak_ones_were() -> None:
    alarm = _alarm(stop=True)
    for step in range(50, 3001, 50):
        alarm.look(step, HEALTHY | WEAK)
    for step in range(3050, 3300, 50):
        assert alarm.look(step, HEALTHY | WEAK | {"health/target_information": 0.01}) is None
    with pytest.raises(BadInput, match=r"COLLAPSE \(same\)"):
        alarm.look(3300, HEALTHY | WEAK | {"health/target_information": 0.01})


@pytest.mark.parametrize(("sign", "step"), [("uniform", 800), ("same", 1000), ("one-hot", 400), ("rank", 400)])
def test_in_a_long_warm_up_only_what_no_start_looks_like_is_told(sign: str, step: int) -> None:
    assert _first_told(_alarm(grace_steps=700), HEALTHY | COLLAPSED[sign], 20) == step


def test_the_run_stops_where_it_is_asked_to() -> None:
    with pytest.raises(BadInput, match=r"COLLAPSE \(one-hot\).*method.center_momentum"):
        _first_told(_alarm(stop=True), HEALTHY | COLLAPSED["one-hot"], 20)


PROVOKED = {
    "uniform": ["method.teacher_temp=0.1", "method.warmup_teacher_temp=0.1"],
    "one-hot": ["method.center_momentum=1.0"],
    "rank": ["optim.base_lr=0.05", "optim.weight_decay=1.0", "optim.weight_decay_end=1.0", "optim.warmup_steps=0"],
}

OF_PATCHES = {
    "uniform": ["method.teacher_patch_temp=0.1", "method.warmup_teacher_patch_temp=0.1"],
    "one-hot": ["method.patch_center_momentum=1.0"],
}
OF_METHOD = {"dinov2": ["method.patch_bottleneck_dim=32"]}


def _short_run(folder: Path, pets: Path, *overrides: str) -> list[str]:
    return [
        f"run.dir={folder}", f"data.path={pets}", "data.workers=0", "run.steps=500", "run.log_every=25",
        "run.rewind_after=null", "views.size=32", "optim.base_lr=1e-3", "method.centering=centre",
        "model.name=vit_tiny_patch16_224", "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",
        "method.out_dim=128", "method.head_layers=3", "method.hidden_dim=64", "method.bottleneck_dim=32",
        "method.koleo_weight=0", "batch.global_size=16",
        "method.crops={colours: dino, local_count: 2, local_size: 16}", "views.colour=null", "compute.precision=fp32",
        "method.teacher_momentum=null", "optim.weight_decay_end=0.1", "optim.min_lr=1e-5", "optim.warmup_steps=50",
        "method.on_collapse=stop", *overrides,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from foreseen.data.procedural import write_procedural_pets

    path = tmp_path_factory.mktemp("pets") / "pets"
    write_procedural_pets(path, train=512, test=8, size=48, seed=0, workers=1)
    return path


def test_a_stopped_run_saves_what_its_alarm_has_seen_and_takes_it_up(pets: Path, tmp_path: Path) -> None:
    overrides = [*_short_run(tmp_path / "run", pets), "run.steps=2", "run.save_every=1", "optim.warmup_steps=0"]
    config = load_recipe("pretrain", "dino_cpu_minutes", overrides)
    seen = {"since": {"rank": 1}, "said": ["rank"], "last": 1}
    taken: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DINO, "alarm_state", lambda self: seen)
        pretrain.run(config)
        patch.setattr(DINO, "load_alarm_state", lambda self, state: taken.append(state))
        shutil.rmtree(tmp_path / "run/checkpoints/step-2")
        pretrain.run(config)
    assert taken == [seen]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2"])
@pytest.mark.parametrize("sign", PROVOKED)
def test_a_provoked_collapse_stops_the_run_within_500_steps(sign: str, method: str, pets: Path, tmp_path: Path) -> None:
    own = [*PROVOKED[sign], *(OF_PATCHES.get(sign, []) if method != "dino" else []), *OF_METHOD.get(method, [])]
    config = load_recipe("pretrain", f"{method}_cpu_minutes", _short_run(tmp_path / "run", pets, *own))
    with pytest.raises(BadInput, match=rf"step \d+: COLLAPSE \({sign}\)"):
        pretrain.run(config)


@pytest.mark.parametrize("word", ["stop", "warn"])
def test_on_collapse_is_an_option_of_the_command(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(pretrain, "run", lambda config: asked.append(config) or Outcome(0, False, None))
    CliRunner().invoke(
        cli.app, ["pretrain", "dino_cpu_minutes", "seed=1", "--on-collapse", word], catch_exceptions=False
    )
    assert [(config.method.on_collapse, config.seed) for config in asked] == [(word, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_of_any_seed_reaches_its_end(seed: int, pets: Path, tmp_path: Path) -> None:
    config = load_recipe("pretrain", "dino_cpu_minutes", _short_run(tmp_path / "run", pets, f"seed={seed}"))
    assert pretrain.run(config).step == 500
