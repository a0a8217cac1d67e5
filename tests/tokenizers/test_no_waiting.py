"""No step waits for the device: nothing that a step runs reads a number back or makes a tensor of Python's numbers.

Either stops the host until the GPU is done. Here the functions that do so are taken away, so a CPU can tell.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.tokenizers.methods import METHODS
from foreseen.tokenizers.pixel_clusters import PixelClusters
from foreseen.tokenizers.tokenizer import Tokenizer
from foreseen.tokenizers.training import TokenizerObjective
from tests.small_methods import small_method

RECIPES = {"dvae": "dvae_cpu_minutes", "fsq": "fsq_cpu_minutes", "vqkd": "vqkd_cpu_minutes"}


def _objective(method: str) -> TokenizerObjective:
    config = load_recipe("tokenizer", RECIPES[method], ["run.dir=none", "method.teacher=x"] if method == "vqkd" else [])
    changes = {"run.dir": "none", "views.size": "32", **small_method(config)}
    if "method.network" in changes:
        changes["method.network"] = changes["method.network"].replace("0.5}", "0.5, standardise: true}")
    if method == "vqkd":
        changes["model.args"] = "{patch_size: 8, embed_dim: 48, depth: 1, num_heads: 3}"
    config = load_recipe("tokenizer", RECIPES[method], [f"{key}={value}" for key, value in changes.items()])
    return METHODS[method].build(config)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def take_away() -> None:
        def waits(*_: Any, **__: Any) -> None:
            raise AssertionError("this waits for the device")

        for name in ("new_tensor", "item", "tolist", "nonzero", "cpu", "__bool__", "__float__", "__int__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, waits)
        for name in ("tensor", "as_tensor", "from_numpy", "nonzero", "unique", "masked_select"):
            monkeypatch.setattr(torch, name, waits)

    return take_away


def _step(objective: TokenizerObjective, batch: Batch, step: int) -> None:
    progress = Progress(step, 40, 4.0, 0)
    prepared = objective.prepare([batch], progress)
    objective(batch, prepared[0], progress)["loss"].backward()
    with torch.no_grad():
        objective.after_step(progress, torch.isfinite(batch.images["image"]).all())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_training_waits_for_nothing(method: str, no_waiting: Callable[[], None]) -> None:
    objective = _objective(method).train()
    key = torch.arange(4) * 7919 + 1
    views = [view.name for view in objective.request.views]
    batch = Batch(key, key, key, {name: torch.rand(4, 3, 32, 32) for name in views})
    _step(objective, batch, 0)  # what is made once may wait
    no_waiting()
    for step in (1, 20, 49):  # 49: codes that begin anew
        _step(objective, batch, step)


def _clusters() -> Tokenizer:
    return PixelClusters(8, 4, (32, 32))


@pytest.mark.parametrize("kind", ["pixel_clusters", *METHODS])
def test_encoding_waits_for_nothing(kind: str, no_waiting: Callable[[], None]) -> None:
    tokenizer = _clusters() if kind == "pixel_clusters" else _objective(kind).tokenizer
    images = torch.rand(2, 3, 32, 32)
    tokenizer.eval().encode(images)
    no_waiting()
    tokenizer.encode(images)
