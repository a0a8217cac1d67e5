"""The scale of fp16 losses follows GradScaler's rule without reading the host."""

import pytest
import torch

from foreseen.engine import loss_scale
from foreseen.engine.loss_scale import LossScale

CPU = torch.device("cpu")


def test_the_scale_moves_as_that_of_torchs_grad_scaler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GOOD_STEPS", 3)
    ours, theirs = LossScale(CPU), torch.amp.GradScaler("cpu", growth_interval=3)
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    assert theirs.scale(torch.ones(())) == ours.value
    for finite in (True, True, False, True, True, True, True, False, False, True, True, True, True, True, True):
        weight.grad = torch.full((2,), 1.0 if finite else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(finite))
        assert float(ours.value) == theirs.get_scale()


def test_gradients_come_back_as_they_would_have_been() -> None:
    scale, gradients = LossScale(CPU), [torch.tensor([1.5, -3e-7]), torch.tensor([2.0])]
    scaled = [gradient * scale.value for gradient in gradients]
    scale.unscale(scaled)
    assert all(torch.equal(one, two) for one, two in zip(gradients, scaled, strict=True))


def test_a_row_of_bad_steps_never_ends_in_a_scale_of_zero() -> None:
    scale = LossScale(CPU)
    for _ in range(400):
        scale.update(torch.tensor(False))
    assert float(scale.value) == loss_scale.SMALLEST


def test_no_step_waits_for_the_device() -> None:
    # A tensor on the meta device has no value to wait for: reading one raises.
    scale = LossScale(torch.device("meta"))
    scale.unscale([torch.ones(3, device="meta")])
    scale.update(torch.ones((), dtype=torch.bool, device="meta"))
