import copy

import pytest
import torch
from torch import nn

from foreseen.models.frozen import Frozen


class Trained(nn.Module):
    """What an objective is: a network that is trained, and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)
        self.teacher = Frozen(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_a_frozen_network_is_in_no_checkpoint_and_stays_when_one_is_loaded():
    one, two = Trained(), Trained()
    kept = copy.deepcopy(two.teacher.network.state_dict())
    assert set(one.state_dict()) == {"head.weight", "head.bias"}
    assert one.teacher.state_dict() == {}
    two.load_state_dict(one.state_dict())  # strictly
    assert torch.equal(one.head.weight, two.head.weight)
    assert all(torch.equal(value, kept[name]) for name, value in two.teacher.network.state_dict().items())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        two.load_state_dict({**one.state_dict(), "other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        two.load_state_dict({"head.weight": one.head.weight})


def test_it_moves_with_its_owner_and_is_neither_trained_nor_counts_batches():
    owner = Trained().double().train()
    network = owner.teacher.network
    assert network[0].weight.dtype == torch.float64
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module.training for module in owner.teacher.modules())
    before = network[1].running_mean.clone()
    network(torch.randn(8, 3, dtype=torch.float64))
    assert torch.equal(network[1].running_mean, before)


def test_a_copy_holds_its_own():
    owner = Trained()
    other = copy.deepcopy(owner)
    assert other.teacher.network[0].weight is not owner.teacher.network[0].weight
    assert set(other.state_dict()) == {"head.weight", "head.bias"}
