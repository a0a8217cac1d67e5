"""The optimizer follows the schedule and the rules, and skips a step that is not finite."""

import pytest
import torch
from torch import nn

from foreseen.config import Optim
from foreseen.engine.objective import ParameterRule
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.errors import BadInput
from tests.golden_cases import load_case


def _optimizer(module: nn.Module, rules: dict[str, ParameterRule] | None = None, **optim: object) -> SteppedOptimizer:
    rules = rules or {name: ParameterRule() for name, _ in module.named_parameters()}
    section = Optim.model_validate({"base_lr": 0.1, "lr_scaling": "none", **optim})
    return SteppedOptimizer(module, rules, section, global_size=8, total_steps=10)


def _give_gradients(module: nn.Module, value: float = 1.0) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_a_step_that_is_not_finite_changes_nothing(name: str) -> None:
    module = nn.Linear(3, 2)
    optimizer = _optimizer(module, name=name)
    _give_gradients(module)
    optimizer.step(0, torch.tensor(True))
    before = [p.clone() for p in module.parameters()]
    tensors, numbers = optimizer.state()
    tensors = {key: value.clone() for key, value in tensors.items()}
    _give_gradients(module, float("nan"))
    optimizer.step(1, torch.tensor(False))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
    after, numbers_after = optimizer.state()
    assert tensors.keys() == after.keys()
    assert all(torch.equal(tensors[key], after[key]) for key in tensors)
    assert numbers == numbers_after


def test_moments_of_a_parameter_that_is_one_number_go_back_to_its_device() -> None:
    module = nn.ParameterDict({"gain": nn.Parameter(torch.ones((), device="meta"))})
    optimizer = _optimizer(module, name="lamb")
    taken = {f"{what}/gain": torch.ones(()) for what in ("exp_avg", "exp_avg_sq", "step")}
    optimizer.load_state(taken, {})
    devices = {what: value.device.type for what, value in optimizer.optimizer.state[module["gain"]].items()}
    assert devices == {"exp_avg": "meta", "exp_avg_sq": "meta", "step": "cpu"}


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_state_that_was_taken_and_put_back_gives_the_same_next_step(name: str) -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(3, 2), nn.Linear(3, 2)
    first = _optimizer(one, name=name)
    for step in range(3):
        _give_gradients(one, step + 1.0)
        first.step(step, torch.tensor(True))
    two.load_state_dict(one.state_dict())
    second = _optimizer(two, name=name)
    second.load_state(*first.state())
    for module, optimizer in ((one, first), (two, second)):
        _give_gradients(module, 0.5)
        optimizer.step(3, torch.tensor(True))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_going_back_to_the_beginning_forgets_every_step(name: str) -> None:
    module = nn.Linear(3, 2)
    start = {key: value.clone() for key, value in module.state_dict().items()}
    optimizer = _optimizer(module, name=name)
    ends = []
    for _ in range(2):
        module.load_state_dict(start)
        optimizer.load_state({}, {})
        for step in range(3):
            _give_gradients(module, step + 1.0)
            optimizer.step(step, torch.tensor(True))
        ends.append(module.weight.detach().clone())
    assert torch.equal(*ends)


def _wave(*shape: int, phase: float) -> torch.Tensor:
    return (1.7 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + phase).sin().view(shape)


def test_lamb_has_the_numbers_of_another_implementation() -> None:
    """optax 0.2.8 in float64: `chain(clip_by_global_norm(1), lamb(...))`, `adam` for what has no weight decay."""
    shapes = {"kernel": (3, 2), "deep": (2, 2), "bias": (3,), "zero": (2, 2)}
    values = {name: _wave(*shape, phase=place) for place, (name, shape) in enumerate(shapes.items())}
    values["zero"].zero_()  # a norm of 0 has no trust ratio
    module = nn.ParameterDict({name: nn.Parameter(value) for name, value in values.items()})
    rules = {name: ParameterRule(decay=name != "bias", lr_scale=0.5 if name == "deep" else 1.0) for name in shapes}
    # Constant, since it ends where it begins; LAMB clips by itself at a norm of 1, which every other step exceeds.
    optimizer = _optimizer(module, rules, name="lamb", base_lr=0.01, min_lr=0.01, weight_decay=0.05)
    for step in range(8):
        for place, (name, shape) in enumerate(shapes.items()):
            module[name].grad = (0.1 if step % 2 else 2.0) * _wave(*shape, phase=10 * place + step)
        optimizer.step(step, torch.tensor(True))
    expected = {
        "kernel": [-0.016653931483734265, 0.9725698516072896, -0.22556548790854483,
                   -0.9101590989828353, 0.4618220196153721, 0.7860162340689199],
        "deep": [0.8541657542390374, 0.43220499203479545, -0.9631892484788851, -0.18652257010313858],
        "bias": [0.8800798202688277, -0.5320468199371434, -0.7475298783119838],
        "zero": [0.010125858894099678, -0.010324879782564961, -0.01008209210908409, 0.010347248010455131],
    }  # fmt: skip
    for name, numbers in expected.items():
        found = module[name].detach().flatten()
        torch.testing.assert_close(found, torch.tensor(numbers, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lars_has_the_authors_numbers(dtype: torch.dtype) -> None:
    case, tensors = load_case("dino", "lars")
    asked, out = case["config"], "out64" if dtype == torch.float64 else "out"
    module = nn.Module()
    for name in ("w", "z", "b"):
        start = torch.zeros_like(tensors["in/w"]) if name == "z" else tensors[f"in/{name}"]
        module.register_parameter(name, nn.Parameter(start.to(dtype)))
    optimizer = _optimizer(
        module,
        {name: ParameterRule(decay=name != "b") for name in ("w", "z", "b")},
        name="lars",
        base_lr=asked["lr"],
        min_lr=asked["lr"],
        weight_decay=asked["weight_decay"],
    )
    for step in range(3):
        for name, parameter in module.named_parameters():
            parameter.grad = tensors["in/gb" if name == "b" else "in/gw"][step].to(dtype)
        optimizer.step(step, torch.tensor(True))
        for name, parameter in module.named_parameters():
            expected = tensors[f"{out}/{name}.{step}"]
            exact = 1e-12 if dtype == torch.float64 else 1e-5
            torch.testing.assert_close(parameter.detach(), expected, rtol=10 * exact, atol=exact)


def test_rules_scale_the_lr_and_switch_decay_off() -> None:
    module = nn.Linear(3, 2)
    rules = {"weight": ParameterRule(lr_scale=0.25), "bias": ParameterRule(decay=False)}
    optimizer = _optimizer(module, rules, weight_decay=0.3, warmup_steps=2)
    _give_gradients(module)
    optimizer.step(1, torch.tensor(True))
    groups = {len(g["params"][0].shape): g for g in optimizer.optimizer.param_groups}
    assert (groups[2]["lr"], groups[2]["weight_decay"]) == (pytest.approx(0.1 * 0.5 * 0.25), 0.3)
    assert (groups[1]["lr"], groups[1]["weight_decay"]) == (pytest.approx(0.05), 0.0)


def test_after_it_was_frozen_the_lr_rises_over_the_ramp() -> None:
    module = nn.Linear(1, 1, bias=False)
    optimizer = _optimizer(module, {"weight": ParameterRule(frozen_steps=2, ramp_steps=4)}, name="sgd", min_lr=0.1)
    rates = []
    for step in range(8):
        _give_gradients(module)
        optimizer.step(step, torch.tensor(True))
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0, 0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1])


def test_a_frozen_parameter_stands_still_until_its_time() -> None:
    module = nn.Linear(3, 2)
    rules = {"weight": ParameterRule(frozen_steps=2), "bias": ParameterRule()}
    optimizer = _optimizer(module, rules, weight_decay=0.3)
    start = module.weight.clone()
    for step in range(3):
        _give_gradients(module)
        optimizer.step(step, torch.tensor(True))
        assert torch.equal(module.weight, start) == (step < 2)


@pytest.mark.parametrize(("name", "waits"), [("adamw", False), ("lamb", True)])
def test_an_optimizer_that_waits_for_the_device_is_known(name: str, waits: bool) -> None:
    assert _optimizer(nn.Linear(3, 2, device="meta"), name=name).waits_for_device == waits
    assert not _optimizer(nn.Linear(3, 2), name=name).waits_for_device  # on a CPU there is nothing to wait for


def test_an_unknown_optimizer_is_a_sentence() -> None:
    with pytest.raises(BadInput, match="optim.name 'adamv'"):
        _optimizer(nn.Linear(3, 2), name="adamv")
