"""A block that computes its activations again gives the gradients of one that kept them."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from foreseen.models.backbone import create_backbone
from foreseen.models.blocks import repeated_blocks
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.recompute import recompute_activations

KEYS = torch.arange(4) * 7919
LARGE, SMALL = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32).sin(), torch.rand(4, 3, 16, 16)
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "dynamic_img_size": True}


def _vit() -> nn.Module:
    torch.manual_seed(0)
    return create_backbone(
        "vit_tiny_patch16_224", img_size=(32, 32), num_classes=5, drop_path_rate=0.5, args=VIT
    ).train()


def _swin() -> nn.Module:
    torch.manual_seed(0)
    args = {"window_size": 2, "embed_dim": 12, "depths": [2, 2], "num_heads": [2, 2], "strict_img_size": False}
    return create_backbone(
        "swin_tiny_patch4_window7_224", img_size=(32, 32), num_classes=5, drop_path_rate=0.5, args=args
    ).train()


def _convnet() -> nn.Module:
    torch.manual_seed(0)
    args = {"layers": [1, 1, 1, 2], "channels": [8, 8, 8, 8]}
    return create_backbone("resnet18", img_size=(32, 32), num_classes=5, drop_path_rate=0.5, args=args).train()


def _recomputed(model: nn.Module) -> nn.Module:
    for block in repeated_blocks(model):
        recompute_activations(block)
    return model


def _gradients(model: nn.Module) -> list[Tensor]:
    """Of two forwards before one backward, each with draws of its own, as a method with two kinds of crops has them."""
    with draw_drop_path(model, KEYS):
        first = model(LARGE)
    with draw_drop_path(model, KEYS + 1):
        second = model(SMALL)
    (first.square().mean() + second.square().mean()).backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("make", [_vit, _swin, _convnet])
def test_gradients_and_batch_statistics_are_the_same_with_two_forwards_before_one_backward(
    make: Callable[[], nn.Module],
) -> None:
    kept, recomputed = make(), _recomputed(make())
    assert all(torch.equal(a, b) for a, b in zip(_gradients(kept), _gradients(recomputed), strict=True))
    for (name, one), two in zip(kept.named_buffers(), recomputed.buffers(), strict=True):
        assert torch.equal(one, two), name


def test_putting_back_the_draws_is_what_makes_them_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from foreseen.models import recompute

    def without_context(*args: object, context_fn: object, **kwargs: object) -> object:
        return checkpoint(*args, **kwargs)

    expected = _gradients(_vit())
    monkeypatch.setattr(recompute, "checkpoint", without_context)
    model = _recomputed(_vit())
    with draw_drop_path(model, KEYS + 2):  # what another forward left behind
        found = _gradients(model)
    assert not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_what_is_kept_between_forward_and_backward_shrinks() -> None:
    kept, recomputed = (_bytes_kept(model) for model in (_vit(), _recomputed(_vit())))
    assert recomputed < 0.4 * kept


def _bytes_kept(model: nn.Module) -> int:
    tensors: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        tensors[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), draw_drop_path(model, KEYS):
        output = model(LARGE)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    assert output.requires_grad
    return sum(size for place, size in tensors.items() if place not in weights)


def test_names_of_weights_stay_and_evaluation_is_the_same() -> None:
    kept, recomputed = _vit(), _recomputed(_vit())
    assert list(kept.state_dict()) == list(recomputed.state_dict())
    assert type(recomputed.blocks[0]).__name__ == "Block"
    with torch.no_grad():
        assert torch.equal(kept.eval()(LARGE), recomputed.eval()(LARGE))


def test_a_copy_recomputes_its_own_blocks() -> None:
    model = _recomputed(_vit())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    scaled = _vit()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.mul_(1.5)
    assert all(torch.equal(a, b) for a, b in zip(_gradients(twin), _gradients(scaled), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
