"""A recipe is data: nothing of it runs, nothing is looked up, and it does not unfold."""

import os
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from foreseen.commands.verbs import load_recipe
from foreseen.config import RECIPES, read_yaml
from foreseen.errors import BadInput
from tests.trust.payload import Canary

WHOLE = (RECIPES / "pretrain/mae_cpu_minutes.yaml").read_text(encoding="utf-8")
TAGS = (
    "!!python/object/apply:os.makedirs [{cage}]",
    "!!python/object/new:os.makedirs [[{cage}]]",
    "!!python/object/apply:os.system ['mkdir {cage}']",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object/apply:eval [\"__import__('os').makedirs('{cage}')\"]",
)


def _load(tmp_path: Path, text: str, *overrides: str) -> object:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe("pretrain", str(tmp_path / "recipe.yaml"), list(overrides))


@pytest.mark.parametrize("tag", TAGS)
def test_python_tags_are_refused_in_recipes_and_overrides(tag: str, canary: Canary, tmp_path: Path) -> None:
    tag = tag.format(cage=canary.cage)
    with pytest.raises(BadInput, match="cannot be read"):
        _load(tmp_path, WHOLE + f"probe: {tag}\n")
    with pytest.raises(BadInput, match="cannot be read"):
        _load(tmp_path, WHOLE, f"run.dir={tag}")
    (tmp_path / "config.yaml").write_text(f"run: {tag}\n", encoding="utf-8")
    with pytest.raises(BadInput, match="is no YAML that can be read"):
        read_yaml(tmp_path / "config.yaml")
    assert not canary.sang


def test_such_a_tag_runs_in_a_reader_that_trusts_it(canary: Canary) -> None:
    yaml.unsafe_load(TAGS[0].format(cage=canary.cage))
    assert canary.sang


@pytest.mark.parametrize("value", ["${oc.env:SECRET}", "${oc.decode:${oc.env:SECRET}}", "a ${seed}", "${run}"])
def test_interpolation_is_refused_before_it_is_resolved(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert OmegaConf.create({"a": "${oc.env:SECRET}"}).a == "hunter2"  # what OmegaConf would do
    for text, overrides in ((WHOLE.replace("path: null", f"path: '{value}'"), ()), (WHOLE, (f"data.path={value}",))):
        with pytest.raises(BadInput, match=r"data\.path is .* does not look up") as refused:
            _load(tmp_path, text, *overrides)
        assert "hunter2" not in str(refused.value)


def test_aliases_that_unfold_to_a_billion_values_are_refused(tmp_path: Path) -> None:
    layers = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    layers += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    text = "\n".join(layers) + "\n"
    for refuse in (lambda: _load(tmp_path, text), lambda: read_yaml(tmp_path / "recipe.yaml")):
        with pytest.raises(BadInput, match="more than 10,000 values, aliases counted each time"):
            refuse()


def test_aliases_that_hold_themselves_are_refused(tmp_path: Path) -> None:
    for text in ("a: &a [*a]\n", "a: &a {b: *a}\n"):
        with pytest.raises(BadInput, match=r"more than 10,000 values|cannot be read"):
            _load(tmp_path, text)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "{a: " * 100_000, "- " * 50_000 + "a", "a" * (2 << 20), "\0", "\xff" * 3]
)
def test_a_recipe_that_is_deep_or_large_is_a_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        _load(tmp_path, text)


def test_a_recipe_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "recipe.yaml")
    with pytest.raises(BadInput):
        load_recipe("pretrain", str(tmp_path / "recipe.yaml"), [])


def test_an_alias_used_plainly_is_still_welcome(tmp_path: Path) -> None:
    text = WHOLE.replace("size: [48, 48]", "size: &size [48, 48]")
    text = text.replace("{name: vit_tiny_patch16_224,", "{name: vit_tiny_patch16_224, img_size: *size,")
    text = "\n".join(sorted(text.splitlines(), key=lambda line: line.startswith("model:")))
    _load(tmp_path, text)
