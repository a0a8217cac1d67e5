"""The average of the weights moves as promised, and is what is scored and handed over."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from foreseen.engine.weight_average import WeightAverage
from tests.engine.driver import GLOBAL_SIZE, OPTIM, STEPS
from tests.engine.skeletons import Supervised
from tests.engine.two_ranks import history, run

DECAY = 0.25  # reached in the third step of the warm-up
AVERAGED = OPTIM.model_copy(update={"ema_decay": DECAY})


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_the_average_of_a_run_is_that_of_its_steps_whatever_the_accumulation(
    tmp_path: Path, accelerator: Accelerator
) -> None:
    ends = []
    for micro_size in (GLOBAL_SIZE, 4):
        folder = tmp_path / str(micro_size)
        run(Supervised, folder, micro_size, accelerator, optim=AVERAGED, save_every=1)
        ends.append(load_file(folder / f"checkpoints/step-{STEPS}/average.safetensors"))
    torch.manual_seed(3)
    expected = {name: weight.detach().double() for name, weight in Supervised().named_parameters()}
    for step in range(STEPS):
        weights = load_file(folder / f"checkpoints/step-{step + 1}/model.safetensors")
        decay = min(DECAY, (1 + step) / (10 + step))
        expected = {name: decay * old + (1 - decay) * weights[name] for name, old in expected.items()}
    assert expected.keys() == ends[0].keys()
    for name, value in expected.items():
        if not name.endswith("qkv.bias"):  # its key third is rounding alone
            torch.testing.assert_close(ends[0][name], value, rtol=1e-10, atol=1e-13)
            torch.testing.assert_close(ends[1][name], value, rtol=1e-10, atol=1e-13)
    handed_over = history(folder).state
    assert all(torch.equal(handed_over[name], value) for name, value in ends[1].items())


def test_a_step_that_was_skipped_leaves_the_average_as_it_is() -> None:
    module = nn.Linear(3, 2)
    average = WeightAverage(module, 0.9)
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update(0, torch.tensor(True))
    before = {name: value.clone() for name, value in average.state().items()}
    with torch.no_grad():
        module.weight.add_(1.0)
    average.update(1, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.state().items())
    average.update(2, torch.tensor(True))
    assert not torch.equal(average.state()["weight"], before["weight"])


def test_batch_statistics_that_are_not_finite_leave_the_average_as_it_is() -> None:
    module = nn.BatchNorm1d(3)
    average = WeightAverage(module, 0.9)
    before = {name: value.clone() for name, value in average.state().items()}
    module.running_mean.fill_(torch.nan)
    module.running_var.fill_(torch.inf)
    average.update(0, torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in average.state().items())


def test_inside_the_module_holds_the_average_and_outside_its_weights_even_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2).requires_grad_(False))
    average = WeightAverage(module, 0.9)
    with torch.no_grad():
        module[0].weight.add_(1.0)
        module[1].running_mean.add_(1.0)
    average.update(0, torch.tensor(True))
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    averaged = {name: value.clone() for name, value in average.state().items()}
    assert averaged.keys() == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    inside: dict[str, Tensor] = {}

    def look_and_fail() -> None:
        with average.applied():
            inside.update({name: value.clone() for name, value in module.state_dict().items()})
            raise RuntimeError("within")

    with pytest.raises(RuntimeError, match="within"):
        look_and_fail()
    assert all(torch.equal(inside[name], value) for name, value in averaged.items())
    assert not torch.equal(inside["1.running_mean"], weights["1.running_mean"])
    assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())
    assert all(torch.equal(average.state()[name], value) for name, value in averaged.items())


def test_the_batch_statistics_of_a_teacher_stay_its_own() -> None:
    module = nn.ModuleDict({
        "student": nn.BatchNorm1d(2), "teacher": nn.BatchNorm1d(2).requires_grad_(False),
        "centred": nn.BatchNorm1d(2, affine=False),
    })  # fmt: skip
    average = WeightAverage(module, 0.9)
    statistics = {name for name in average.state() if "running" in name}
    assert statistics == {f"{name}.running_{what}" for name in ("student", "centred") for what in ("mean", "var")}


def test_no_step_waits_for_the_device() -> None:
    # A tensor on the meta device has no value to wait for: reading one raises.
    average = WeightAverage(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).to("meta"), 0.9)
    average.update(0, torch.ones((), dtype=torch.bool, device="meta"))
