"""The page that teaches to add a method is true: its code is read off it, trained, and its result loaded in timm."""

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch

from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.engine.objective import Objective
from foreseen.pretrain import methods
from tests.documentation import arguments_of, read, split_job, typed_commands

PAGE = read("docs/add_a_method.md")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


@pytest.fixture
def inpaint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The page's method, imported, named in the dict of methods, and its recipe in the working directory."""
    module, table, _ = PYTHON
    monkeypatch.chdir(tmp_path)
    Path("inpaint.py").write_text(module, encoding="utf-8")
    (recipe,) = (code for language, code in BLOCKS if language == "yaml")
    Path("inpaint.yaml").write_text(recipe, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("foreseen.pretrain.inpaint", "inpaint.py")
    assert spec is not None
    assert spec.loader is not None
    inpaint = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, inpaint)
    spec.loader.exec_module(inpaint)
    names: dict[str, Any] = vars(methods) | vars(inpaint)
    exec(table, names)
    assert names["METHODS"].keys() == methods.METHODS.keys() | {"inpaint"}, "the page shows the table as it is"
    monkeypatch.setitem(methods.METHODS, "inpaint", names["METHODS"]["inpaint"])
    return inpaint


def test_the_method_trains_and_its_encoder_loads_in_timm(
    inpaint: ModuleType, recipe: Callable[..., list[str]], tmp_path: Path
) -> None:
    small = recipe(run__steps=60, run__log_every=10, optim__warmup_steps=5, batch__global_size=16, seed=1)
    (command,) = typed_commands("docs/add_a_method.md")
    job = split_job(arguments_of(command))
    assert job is not None
    verb, name, overrides, _ = job
    outcome = pretrain.run(load_recipe(verb, name, [*overrides, *small]))
    assert outcome.step == 60
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert losses[-1] < 0.8 * losses[0]
    model = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 48)


def test_the_pages_own_test_passes(inpaint: ModuleType) -> None:
    names: dict[str, Any] = {}
    exec(PYTHON[2], names)
    names["test_a_run_does_not_depend_on_accumulation"]()


def test_it_is_as_short_as_the_page_says_and_names_what_exists() -> None:
    assert len(PYTHON[0].splitlines()) < 80
    for name in re.findall(r"^\*\*(\w+)\(", PAGE, flags=re.MULTILINE):
        assert hasattr(Objective, name), name
