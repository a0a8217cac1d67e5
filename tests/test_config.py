"""Recipes are found, overridden and checked, and what is wrong is said with the key to change."""

from pathlib import Path

import pytest

from foreseen.commands.verbs import VERBS, load_recipe, method_options
from foreseen.config import RECIPES, Config, recipe_names
from foreseen.errors import BadInput


def _load(*overrides: str) -> Config:
    return load_recipe("pretrain", "mae_vit_b16", overrides)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("optim.l=1", r"unknown key 'optim.l' \(did you mean 'optim.min_lr' or 'optim.base_lr'\?\)"),
        ("method.mask_ration=0.5", "unknown key 'method.mask_ration' .*'method.mask_ratio'"),
        ("optm.base_lr=1", "unknown key 'optm' .*'optim'"),
        ("optim.base_lr=abc", "optim.base_lr should be a valid number.* got 'abc'"),
        ("optim.base_lr=.inf", "optim.base_lr should be a finite number, got inf"),
        ("method.mask_ratio=1.5", "method.mask_ratio should be less than 1, got 1.5"),
        ("method.name=mea", "method.name is 'mea' .*'mae'"),
        ("views.scale=[0.5,0.1]", "views.scale must be two rising shares"),
        ("run.epochs=null", "run.steps and run.epochs are both null"),
        ("model.img_size=96", r"model.img_size \[96, 96\] differs from views.size \[224, 224\]"),
        ("compute.precision=fp8", "compute.precision should be 'bf16', 'fp16', 'fp32' or 'fp64', got 'fp8'"),
        (
            "compute.checkpoint_activations=some",
            "compute.checkpoint_activations should be a valid boolean.* got 'some'",
        ),
        ("optim.ema_decay=1", "optim.ema_decay should be less than 1, got 1"),
        ("compute.compil=true", "unknown key 'compute.compil' .*'compute.compile'"),
        ("run", "'run' is no override; write key=value"),
        ("run.dir=${nowhere}", r"run.dir is .* does not look up \$\{…\}"),
        ("model.args={depth:6}", "model.args 'depth:6' is no name .* a space follows the colon"),
        ("run.dir=[", "cannot be read"),
    ],
)
def test_a_wrong_override_is_a_sentence_that_names_the_key(override: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        _load(override)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(BadInput) as error:
        _load("optim.base_lr=-1", "method.mask_ratio=2", "batch.size=3")
    assert len(str(error.value).splitlines()) == 3


def test_a_model_of_another_family_comes_without_the_recipes_arguments() -> None:
    def args(*overrides: str) -> dict[str, object]:
        return load_recipe("pretrain", "mae_cpu_minutes", overrides).model.args

    own = args()
    assert own["patch_size"] == 8
    assert args("model.name=vit_small_patch16_224.augreg_in1k", "model.args.depth=2") == own | {"depth": 2}
    assert args("model.name=resnet10t", "model.args.stem_width=8") == {"stem_width": 8}
    assert args("model.name=resnet10t") == {}
    assert args("model.name=null", "model.init_from=x") == own
    assert args("model.name=vit_smal_patch16_224") == own  # timm has none, which is said later


def test_an_option_of_another_method_is_named_as_such() -> None:
    from foreseen.config import MethodOptions, resolve

    class Other(MethodOptions):
        wings: int = 3

    raw = {
        "run": {"dir": "x", "steps": 1},
        "model": {"name": "m"},
        "method": {"name": "mae", "wings": 5},
        "optim": {"base_lr": 1.0},
        "batch": {"global_size": 4},
    }
    with pytest.raises(BadInput, match=r"'method.wings' is an option of other, not of the method chosen"):
        resolve(raw, {**method_options("pretrain"), "other": Other})


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(BadInput, match=r"no pretrain recipe 'mae_vit_b15' .*'mae_vit_b16'"):
        load_recipe("pretrain", "mae_vit_b15", [])
    with pytest.raises(BadInput, match=r"no recipe file nowhere\.yaml"):
        load_recipe("pretrain", "nowhere.yaml", [])


def test_numbers_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    assert _load("optim.base_lr=1e-3").optim.base_lr == 1e-3
    recipe = tmp_path / "mine.yaml"
    recipe.write_text((RECIPES / "pretrain/mae_vit_b16.yaml").read_text(encoding="utf-8").replace("1.5e-4", "3e-4"))
    assert load_recipe("pretrain", str(recipe), []).optim.base_lr == 3e-4


def test_epochs_and_steps_are_both_shown_once_the_data_is_known(tmp_path: Path) -> None:
    config = _load("run.epochs=10", "optim.warmup_epochs=2", "batch.global_size=50").with_length(1000)
    assert (config.run.steps, config.run.epochs) == (200, 10)
    assert (config.optim.warmup_steps, config.optim.warmup_epochs) == (40, 2)
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_recipe("pretrain", str(path), []).model_dump() == config.model_dump()


@pytest.mark.parametrize(
    ("value", "backend"), [("false", None), ("true", "inductor"), ("aot_eager", "aot_eager"), ("''", None)]
)
def test_compile_is_a_yes_or_the_name_of_a_backend(value: str, backend: str | None) -> None:
    assert _load(f"compute.compile={value}").compute.backend == backend


def test_a_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(BadInput, match="warm-up of 200 steps is not shorter than the run of 200 steps"):
        _load("run.epochs=10", "optim.warmup_epochs=10", "batch.global_size=50").with_length(1000)


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb in VERBS for name in recipe_names(verb)])
def test_every_shipped_recipe_is_valid_and_says_what_it_does(verb: str, name: str) -> None:
    load_recipe(verb, name)
    text = (RECIPES / verb / f"{name}.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"foreseen {verb} {name}" in line for line in head), "the head shows the command"
    assert any("Expected" in line for line in head)
    assert any("Cost" in line for line in head)
