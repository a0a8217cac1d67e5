"""Every way to compute resumes bit for bit, and those that may change no result change none."""

import json
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.config import Compute
from foreseen.data.batch import Batch
from foreseen.engine import loss_scale
from foreseen.engine.launch import place, start
from foreseen.engine.objective import Objective, Progress
from foreseen.errors import BadInput
from foreseen.models.backbone import create_backbone
from foreseen.models.drop_path import draw_drop_path
from tests.engine.driver import GLOBAL_SIZE, OPTIM, STEPS, drive, loss_distance, norm_distance, weight_distance
from tests.engine.skeletons import IBOT, Supervised
from tests.engine.test_train import MeanColour
from tests.engine.two_ranks import EXACT, history, run

COMPILED = pytest.param({"compile": "aot_eager"}, {}, marks=pytest.mark.slow, id="compiled")
WAYS = [
    COMPILED,
    pytest.param({"precision": "fp16"}, {}, id="fp16"),
    pytest.param({}, {"ema_decay": 0.9}, id="averaged"),
    pytest.param({"checkpoint_activations": True}, {}, id="recomputed"),
    pytest.param(
        {"precision": "fp16", "compile": "aot_eager", "checkpoint_activations": True}, {"ema_decay": 0.9},
        marks=pytest.mark.slow, id="all together",
    ),
]  # fmt: skip


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture
def _lively_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that overflows now and then, and doubles after every second good step."""
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**18)
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 2)


def _stopping(make: type[Objective], at: int | None) -> Objective:
    """An objective that is told to stop during a step."""

    class Stopping(make):  # type: ignore[misc, valid-type]
        def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Any]:
            if progress.step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().prepare(micro_batches, progress)  # type: ignore[no-any-return]

    return Stopping()


def _kept(folder: Path) -> dict[str, bytes]:
    files = sorted((folder / f"checkpoints/step-{STEPS}").iterdir())
    return {file.name: file.read_bytes() for file in files if file.suffix == ".safetensors"} | {
        "loss_scale": json.dumps(_state(folder, STEPS)["loss_scale"]).encode()
    }


def _state(folder: Path, step: int) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / f"checkpoints/step-{step}/state.json").read_text(encoding="utf-8"))
    return state


@pytest.mark.usefixtures("_lively_scale")
@pytest.mark.parametrize(("compute", "optim"), WAYS)
def test_a_run_that_was_told_to_stop_goes_on_bit_for_bit(
    compute: dict[str, Any], optim: dict[str, Any], tmp_path: Path, accelerator: Accelerator
) -> None:
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    ways = {"compute": Compute(**{"precision": "fp32", **compute}), "optim": OPTIM.model_copy(update=optim)}
    run(partial(_stopping, Supervised, None), unbroken, 8, accelerator, **ways)
    torch._dynamo.reset()
    assert run(partial(_stopping, Supervised, 2), stopped, 8, accelerator, **ways).preempted
    torch._dynamo.reset()
    assert run(partial(_stopping, Supervised, None), stopped, 8, accelerator, **ways).step == STEPS
    assert _kept(unbroken) == _kept(stopped)
    assert ("average.safetensors" in _kept(unbroken)) == ("ema_decay" in optim)
    if compute.get("precision") == "fp16":
        lines = (unbroken / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert len({json.loads(line)["loss_scale"] for line in lines}) > 1
        assert 0 < _state(unbroken, STEPS)["skipped_steps"] < STEPS


@pytest.mark.parametrize("micro_size", [GLOBAL_SIZE, 4])
def test_recomputed_activations_change_no_step(micro_size: int, tmp_path: Path, accelerator: Accelerator) -> None:
    whole = drive(IBOT, GLOBAL_SIZE)  # two forwards before each backward, drop path, a teacher
    compute = EXACT.model_copy(update={"checkpoint_activations": True})
    run(IBOT, tmp_path, micro_size, accelerator, compute=compute)
    recomputed = history(tmp_path)
    assert loss_distance(whole, recomputed) < 1e-12
    assert norm_distance(whole, recomputed) < 1e-12
    assert weight_distance(whole, recomputed) < 1e-10


class DeepVit(Objective):
    """Ten blocks with drop path, all of different rates."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        args = {"patch_size": 8, "embed_dim": 24, "depth": 10, "num_heads": 3}
        self.vit = create_backbone(
            "vit_tiny_patch16_224", img_size=(32, 32), num_classes=4, drop_path_rate=rate, args=args
        )


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_blocks_share_graphs_and_compute_the_same(recomputed: bool, accelerator: Accelerator) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    images = torch.rand(6, 3, 32, 32)
    torch.manual_seed(0)
    plain = DeepVit().train()
    torch.manual_seed(0)
    compiled = DeepVit().train()
    compute = Compute(precision="fp32", compile="aot_eager", checkpoint_activations=recomputed)
    place(compiled, accelerator, compute)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for step in range(3):
        gradients = [_gradients(objective.vit, images, step) for objective in (plain, compiled)]
        for one, two in zip(*gradients, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # the first block has no drop path, the others share one
    with torch.no_grad():
        for rows in (6, 5):  # the last batch of a split is smaller
            torch.testing.assert_close(plain.eval().vit(images[:rows]), compiled.eval().vit(images[:rows]))
    assert counters["stats"]["unique_graphs"] <= 6


def _gradients(vit: torch.nn.Module, images: Tensor, step: int) -> list[Tensor]:
    vit.zero_grad()
    with draw_drop_path(vit, torch.arange(len(images)) + 1000 * step):
        vit(images).square().mean().backward()
    return [parameter.grad for parameter in vit.parameters()]


def test_a_backend_that_torch_does_not_have_is_refused() -> None:
    with pytest.raises(BadInput, match=r"compute.compile 'inducter' is no backend .* inductor"):
        start(Compute(precision="fp32", compile="inducter"))


def test_a_machine_that_cannot_compile_is_a_sentence(
    recipe: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", (None, "no-such-compiler"))
    overrides = recipe(run__steps=1, optim__warmup_steps=0, batch__global_size=8, compute__compile=True)
    torch._dynamo.reset()
    with pytest.raises(BadInput, match=r"'inductor' cannot compile .*compiler.* set compute\.compile=false"):
        pretrain.run(load_recipe("pretrain", "mae_cpu_minutes", overrides))


@pytest.mark.parametrize("key", ["compile", "checkpoint_activations"])
def test_a_method_without_blocks_is_refused(key: str, accelerator: Accelerator) -> None:
    with pytest.raises(BadInput, match=f"no network of this method has repeated blocks; set compute.{key}=false"):
        place(MeanColour(), accelerator, Compute(precision="fp32", **{key: True}))
