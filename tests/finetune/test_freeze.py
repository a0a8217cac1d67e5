"""Frozen layers stay to the bit, in any kind of backbone, and all the rest is trained."""

import pytest
import torch

from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.errors import BadInput
from foreseen.finetune.freeze import frozen_parameters
from foreseen.models.backbone import create_backbone
from tests.engine.driver import drive, loss_distance, norm_distance, weight_distance
from tests.finetune.test_supervised import PLAIN, PROGRESS, batch_of, build

STEM = ("model.cls_token", "model.pos_embed", "model.patch_embed.")


def _trained(objective, steps=3, **optim):
    """Which parameters moved in some steps with weight decay."""
    from foreseen.config import Optim

    before = {name: parameter.detach().clone() for name, parameter in objective.named_parameters()}
    config = Optim(base_lr=1e-2, lr_scaling="none", weight_decay=0.5, **optim)
    optimizer = SteppedOptimizer(objective, objective.parameter_rules(0.75), config, global_size=8, total_steps=10)
    objective.train()
    for step in range(steps):
        objective(batch_of(objective, start=8 * step), None, PROGRESS)["loss"].backward()
        optimizer.drop_frozen()
        optimizer.step(step, torch.ones((), dtype=torch.bool))
    return {name for name, parameter in objective.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("name", ["adamw", "lamb", "sgd"])
@pytest.mark.parametrize(
    ("freeze", "prefixes"), [("embeddings", STEM), (1, (*STEM, "model.blocks.0.")), (None, ("nothing",))]
)
def test_what_is_frozen_stays_to_the_bit_and_the_rest_moves(freeze, prefixes, name):
    objective = build(method={**PLAIN, "freeze": freeze})
    assert all(parameter.requires_grad for parameter in objective.parameters())
    moved = _trained(objective, name=name)
    expected = {name for name, _ in objective.named_parameters() if not name.startswith(prefixes)}
    # The key's share of a bias gets no gradient, and a zero that decays stays a zero.
    assert moved == expected
    assert any(name.startswith("model.head") for name in moved)


@pytest.mark.parametrize(("name", "blocks"), [("test_resnet", 4), ("test_convnext", 9), ("test_vit", 6)])
def test_layers_of_other_backbones_are_those_of_timm(name, blocks):
    model = create_backbone(name, img_size=(32, 32), num_classes=3)
    stem, some, every = (frozen_parameters(model, what) for what in ("embeddings", 2, blocks))
    assert 0 < len(stem) < len(some) < len(every) < len(list(model.parameters()))
    assert stem < some < every
    assert not any(name.startswith(("head.", "fc.")) for name in every)
    with pytest.raises(BadInput, match=rf"method.freeze is {blocks + 1}, and \w+ has {blocks} blocks: lower it"):
        frozen_parameters(model, blocks + 1)


def test_frozen_batch_norm_keeps_its_statistics_and_trained_goes_on():
    objective = build(model={"name": "test_resnet", "args": {}}, method={**PLAIN, "freeze": 2})
    before = {name: value.clone() for name, value in objective.named_buffers()}
    _trained(objective)
    moved = {name for name, value in objective.named_buffers() if not torch.equal(value, before[name])}
    assert not any(name.startswith(("model.conv1", "model.bn1", "model.layer1", "model.layer2")) for name in moved)
    assert any(name.startswith("model.layer3") for name in moved)


def test_frozen_blocks_drop_no_path():
    objective = build(model={"drop_path_rate": 0.9}, method={**PLAIN, "freeze": 2}).train()
    one, other = (objective(batch_of(objective), None, PROGRESS)["loss"] for _ in range(2))
    calm = objective.eval()
    assert one == other == calm(batch_of(objective), None, PROGRESS)["loss"]
    assert objective.train().model.head.training
    assert not objective.model.blocks[1].training


def test_a_frozen_gradient_is_neither_clipped_nor_remembered():
    objective = build(method={**PLAIN, "freeze": "embeddings"})
    from foreseen.config import Optim

    rules = objective.parameter_rules(None)
    optimizer = SteppedOptimizer(objective, rules, Optim(base_lr=1e-3), global_size=8, total_steps=10)
    objective(batch_of(objective), None, PROGRESS)["loss"].backward()
    objective.model.pos_embed.grad.fill_(float("inf"))  # as half precision may overflow there
    optimizer.drop_frozen()
    gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
    assert torch.nn.utils.get_total_norm(gradients).isfinite()
    optimizer.step(0, torch.ones((), dtype=torch.bool))
    assert not any("pos_embed" in key for key in optimizer.state()[0])
    assert objective.model.pos_embed.isfinite().all()


def test_a_frozen_run_does_not_depend_on_accumulation():
    def make():
        return build(seed=3, model={"drop_path_rate": 0.5}, method={"freeze": 1})

    whole, split = drive(make, 16), drive(make, 2)
    assert loss_distance(whole, split) < 1e-13
    assert norm_distance(whole, split) < 1e-13
    assert weight_distance(whole, split) < 1e-11


@pytest.mark.parametrize("value", [0, -1, "stem"])
def test_other_values_are_refused(value):
    with pytest.raises(BadInput, match="method.freeze"):
        build(method={"freeze": value})
