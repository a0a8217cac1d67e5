"""A step on a GPU mixes no tensors of the host into its products, and copies nothing back.

Fake tensors have a device and a shape, and no numbers, so no GPU is needed. Autograd asks a real one for its context,
so nothing runs backward here: gradients are zeros.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foreseen.commands.verbs import Verb
from foreseen.data import views
from foreseen.engine import trainer as trainer_module
from foreseen.engine.trainer import Trainer
from foreseen.models import drop_path, position
from tests.engine.topologies import Topology, config_of, job_of, methods

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_fake_is_kept() -> Iterator[None]:
    yield
    for kept in (views._constants, drop_path._rates, position._shares):
        kept.cache_clear()


class Copies(TorchDispatchMode):
    """Notes what takes tensors of the GPU and gives one of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if "cuda" in _devices((args, kwargs)) and "cpu" in _devices(result):
            self.found.append(str(func))
        return result


def _devices(tree: Any) -> set[str]:
    return {leaf.device.type for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


def _move(module: nn.Module, fakes: FakeTensorMode) -> None:
    """Put fake weights and buffers on a GPU in the place of real ones; what is shared stays shared."""
    moved: dict[Tensor, Tensor] = {}

    def fake(real: Tensor) -> Tensor:
        with fakes:
            found = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=GPU)
        return nn.Parameter(found, real.requires_grad) if isinstance(real, nn.Parameter) else found

    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, real in tensors.items():
                if real is not None:
                    tensors[name] = moved[real] if real in moved else moved.setdefault(real, fake(real))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")  # numpy() on the host, where all is real
@pytest.mark.parametrize(("verb", "method"), methods())
def test_a_step_stays_on_its_device(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb, method: str
) -> None:
    # fp16 for the scale of its loss; autocast itself wants a real GPU.
    config = config_of(verb, method, small_shards, tmp_path, Topology(1, 2, precision="fp16"))
    adamw = config.optim.model_copy(update={"name": "adamw"})  # others wait once a step, and the log says so
    # The ledger is kept on the host, and fake tensors of the host have no numbers either.
    config = config.model_copy(update={"optim": adamw, "run": config.run.model_copy(update={"ledger": None})})
    job = job_of(verb, config, small_shards)
    fakes, accelerator, draw_colours = (
        FakeTensorMode(allow_non_fake_inputs=True),
        Accelerator(cpu=True),
        views.draw_colours,
    )

    def backward(loss: Tensor) -> None:
        assert loss.device == GPU
        for parameter in trainer.optimizer.parameters.values():
            parameter.grad = torch.zeros_like(parameter)

    def drawn_on_the_host(*args: Any) -> Any:
        with unset_fake_temporarily():
            return draw_colours(*args)

    monkeypatch.setattr(accelerator.state, "device", GPU)
    monkeypatch.setattr(accelerator, "backward", backward)
    monkeypatch.setattr(trainer_module, "place", lambda objective, *_: _move(objective, fakes))
    monkeypatch.setattr(trainer_module, "wrap", lambda objective, _: objective)
    monkeypatch.setattr(Trainer, "autocast", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(views, "draw_colours", drawn_on_the_host)
    with fakes:
        trainer = Trainer(job, accelerator)
    assert None not in (trainer.recorder, trainer.average, trainer.loss_scale)
    trainer.job.objective.train()
    batches = trainer.feed.batches(0, 4, workers=0, pin_memory=False)
    loaded = [next(batches) for _ in range(4)]
    with fakes, Copies() as copies:
        trainer.step(0, iter(loaded[:2]))
        trainer.step(1, iter(loaded[2:]))
        assert copies.found == []
        assert all(value.device == GPU for value in trainer.job.objective.health().values())
        trainer.skipped.cpu()
        assert copies.found
        with pytest.raises(RuntimeError, match="same device"):
            trainer.skipped.reshape(1) + torch.zeros(1)
