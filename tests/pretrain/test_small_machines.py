"""Prototypes, momentum and temperature fitted to data, batch and length: the papers' numbers at the papers' size."""

import pytest

from foreseen.commands.verbs import load_recipe
from foreseen.pretrain.dino import DINO
from foreseen.pretrain.self_distillation_options import Plan
from foreseen.pretrain.small_machines import Size, head_warmup, prototypes, teacher_momentum, temperature_warmup

IMAGENET = Size(1_281_167, 1024, 125_000)
PETS = Size(3_312, 256, 5_200)
LAPTOP = Size(4_000, 32, 2_000)


def test_at_the_papers_size_the_rules_give_the_papers_numbers() -> None:
    assert prototypes(None, IMAGENET, "method.out_dim")[0] == 65_536
    assert teacher_momentum(None, IMAGENET)[0] == pytest.approx(0.996)
    assert temperature_warmup(IMAGENET)[0] == 37_500


@pytest.mark.parametrize(("size", "count"), [(PETS, 2048), (LAPTOP, 2048), (Size(50, 8, 100), 256)])
def test_prototypes_follow_the_pictures_and_the_batch(size: Size, count: int) -> None:
    found, reason = prototypes(None, size, "method.out_dim")
    assert found == count
    assert reason is not None
    assert f"{size.samples:,} pictures" in reason


def test_more_prototypes_than_make_sense_are_warned_of_and_kept() -> None:
    found, warning = prototypes(65_536, PETS, "method.out_dim")
    assert found == 65_536
    assert warning is not None
    assert "65,536 is many for 3,312 pictures, 256 in a step" in warning
    assert "method.out_dim=null takes 2,048" in warning
    assert prototypes(8192, PETS, "method.out_dim") == (8192, None)


def test_the_teacher_remembers_as_many_pictures_unless_the_run_is_short() -> None:
    long = Size(4_000, 256, 100_000)
    momentum, reason = teacher_momentum(None, long)
    assert momentum == pytest.approx(0.996**0.25)
    assert "0.996 at 1024" in (reason or "")
    momentum, reason = teacher_momentum(None, LAPTOP)
    assert momentum == pytest.approx(1 - 20 / 2000)
    assert "2000 steps" in (reason or "")
    assert teacher_momentum(0.99, LAPTOP) == (0.99, None)
    assert teacher_momentum(None, Size(100, 8, 5))[0] == 0.9


def test_the_reasons_are_among_the_runs_notes() -> None:
    small = ["model.args={embed_dim: 48, depth: 1, num_heads: 3, patch_size: 8}", "method.teacher_temp=0.06"]
    config = load_recipe("pretrain", "dino_pets", [*small, "method.hidden_dim=32", "views.size=32"])
    notes = DINO.build(config.with_length(3_312)).notes
    assert [note.split(" ")[0] for note in notes] == [
        "method.out_dim", "method.teacher_momentum", "method.warmup_teacher_temp_epochs",
    ]  # fmt: skip
    stated = load_recipe("pretrain", "dino_vit_s16", [*small[:1], "method.hidden_dim=32", "views.size=32"])
    (of_lr,) = DINO.build(stated.with_length(1_281_167)).notes
    assert of_lr.startswith("peak lr 0.002: optim.base_lr 0.0005 × 1024 / 256")


def test_a_run_with_an_average_is_told_that_the_teacher_is_handed_over() -> None:
    small = ["model.args={layers: [1, 1, 1, 1], channels: [4, 8, 8, 12]}"]
    config = load_recipe("pretrain", "dino_cpu_minutes", [*small, "optim.ema_decay=0.999"])
    (note,) = [note for note in DINO.build(config.with_length(3_312)).notes if note.startswith("optim.ema_decay 0.999")]
    assert "the teacher" in note
    assert "optim.ema_decay=null" in note


def test_heads_warm_up_where_the_backbone_has_something_to_lose() -> None:
    assert head_warmup(None, LAPTOP, begins_from_weights=False) == (0, None)
    steps, reason = head_warmup(None, LAPTOP, begins_from_weights=True)
    assert steps == 200
    assert reason is not None
    assert "method.head_warmup_steps 200: 10% of the run" in reason
    assert head_warmup(None, IMAGENET, begins_from_weights=True)[0] == 1000
    assert head_warmup(3, LAPTOP, begins_from_weights=True) == (3, None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr_scaling=linear", "peak lr 0.00075: optim.base_lr 0.003 × 64 / 256, as optim.lr_scaling=linear says"),
        ("optim.lr_scaling=sqrt", "peak lr 0.0015: optim.base_lr 0.003 × the square root of 64 / 256"),
        ("method.teacher_momentum=0.9999", "remembers 10,000 steps, and the run has 2,600: the teacher hardly leaves"),
        ("method.freeze_last_layer_epochs=100", "9,375 steps, and the run has 2,600: the prototypes are never trained"),
        ("method.warmup_teacher_temp=0.03 method.warmup_teacher_temp_epochs=99", "temperature never arrives"),
        ("model.init_from=x method.head_warmup_steps=9999", "9,999 steps, and the run has 2,600: the backbone never"),
    ],
)
def test_what_makes_no_sense_is_told_and_kept(override: str, said: str) -> None:
    def notes(*overrides: str) -> tuple[str, ...]:
        return Plan.of(load_recipe("pretrain", "dino_cpu_minutes", list(overrides)).with_length(6000)).notes

    assert notes() == ()
    (note,) = notes(*override.split())
    assert said in note
