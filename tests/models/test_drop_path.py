import copy

import numpy as np
import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from foreseen.device_keys import as_tensor
from foreseen.keys import sample_keys
from foreseen.models.drop_path import KeyedDropPath, draw_drop_path, replace_drop_path

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def keys(n):
    return as_tensor(sample_keys(0, np.arange(n, dtype=np.int64)))


def tiny_vit(rate=0.5):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=rate, **TINY)
    replace_drop_path(model)
    return model.train()


def test_a_sample_drops_the_same_paths_wherever_it_stands_in_a_batch():
    model, key, images = tiny_vit().double(), keys(8), torch.randn(8, 3, 32, 32, dtype=torch.float64)
    with draw_drop_path(model, key):
        whole = model(images)
    shuffled = torch.tensor([5, 0, 7, 2])
    with draw_drop_path(model, key[shuffled]):
        part = model(images[shuffled])
    torch.testing.assert_close(part, whole[shuffled], rtol=1e-12, atol=1e-12)
    with draw_drop_path(model, key + 1):
        assert not torch.allclose(model(images), whole)


def test_every_timm_drop_path_is_replaced_and_names_stay():
    before = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.3, **TINY)
    names = list(before.state_dict())
    put_in = replace_drop_path(before)
    assert not [module for module in before.modules() if isinstance(module, DropPath)]
    assert [module.rate for module in put_in] == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.3, 0.3])
    assert list(before.state_dict()) == names


def test_paths_are_dropped_at_their_rate_and_the_rest_keeps_the_mean():
    model = nn.Sequential(DropPath(0.25), DropPath(0.0))
    assert len(replace_drop_path(model)) == 1
    with draw_drop_path(model, keys(20_000)):
        out = model(torch.ones(20_000, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


def test_evaluation_drops_nothing_and_training_without_a_draw_is_an_error():
    model, images = tiny_vit(), torch.randn(2, 3, 32, 32)
    plain = timm.create_model("vit_tiny_patch16_224", **TINY)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), plain.eval()(images))
    with pytest.raises(RuntimeError, match="draw_drop_path"):
        model.train()(images)
    with draw_drop_path(model, keys(2)):
        model(images)
    with pytest.raises(RuntimeError, match="draw_drop_path"):
        model(images)


def test_windows_of_one_sample_share_its_draw():
    module = KeyedDropPath(0.5).train()
    with draw_drop_path(module, keys(16)):
        rows = module(torch.ones(16 * 3, 2))
        samples = module(torch.ones(16, 2))
    assert torch.equal(rows.view(16, 3, 2), samples[:, None].expand(16, 3, 2))
    assert samples.unique().numel() == 2


def test_a_copied_model_draws_for_itself():
    model, key, images = tiny_vit(), keys(4), torch.randn(4, 3, 32, 32)
    with draw_drop_path(model, key):
        twin = copy.deepcopy(model)
        expected = model(images)
    with draw_drop_path(twin, key):
        assert torch.equal(twin(images), expected)
    with draw_drop_path(twin, key + 9), draw_drop_path(model, key):
        assert torch.equal(model(images), expected)
        assert not torch.equal(twin(images), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
def test_compiled_blocks_share_two_graphs_whatever_their_rates():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, images, counter = tiny_vit(), torch.randn(4, 3, 32, 32), CompileCounter()
    expected = []
    for shift in range(3):
        with draw_drop_path(model, keys(4) + shift):
            expected.append(model(images))
    for block in model.blocks:
        block.compile(backend=counter)
    for shift in range(3):
        with draw_drop_path(model, keys(4) + shift):
            torch.testing.assert_close(model(images), expected[shift])
    assert counter.frame_count <= 2
