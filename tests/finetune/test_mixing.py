import numpy as np
import pytest
import torch

from foreseen.finetune.mixing import PairMix, mix, partner, soft_targets


def drawn(n=2000, size=(16, 24), **options):
    draw = PairMix(**{"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch": 0.5, **options}, size=size)
    rng = np.random.default_rng(0)
    return torch.from_numpy(np.stack([draw(rng, 0) for _ in range(n)]))


def per_image(pairs):
    return pairs.repeat_interleave(2, dim=0)


def test_pairs_are_neighbours():
    assert partner(torch.arange(6)).tolist() == [1, 0, 3, 2, 5, 4]


def test_the_share_of_pixels_is_the_share_of_the_label():
    draws = per_image(drawn(200))
    images = torch.arange(2.0, dtype=torch.float64).repeat(200).view(-1, 1, 1, 1).expand(-1, 3, 16, 24)
    own = (1 - torch.arange(2.0, dtype=torch.float64)).repeat(200)
    others_share = mix(images, draws).mean(dim=(1, 2, 3))
    expected = torch.where(own == 1, 1 - draws[:, 0], draws[:, 0])
    torch.testing.assert_close(others_share, expected, rtol=0, atol=1e-9)


def test_cutmix_pastes_a_box_and_mixup_blends():
    images = torch.stack([torch.zeros(3, 16, 24), torch.ones(3, 16, 24)])
    box = torch.tensor([[1 - 4 * 6 / 384, 2, 6, 3, 9]], dtype=torch.float64)
    pasted = mix(images, per_image(box))
    assert pasted[0].unique().tolist() == [0, 1]
    assert pasted[0, 0, 2:6, 3:9].all()
    assert pasted[0].sum() == 3 * 4 * 6
    blended = mix(images, per_image(torch.tensor([[0.75, 0, 0, 0, 0]], dtype=torch.float64)))
    assert blended[:, 0, 0, 0].tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    ("options", "cut", "mixed"),
    [
        ({}, 0.5, 1.0),
        ({"switch": 0.2}, 0.2, 1.0),
        ({"mixup": 0.0}, 1.0, 1.0),
        ({"cutmix": 0.0}, 0.0, 1.0),
        ({"probability": 0.3}, 0.15, 0.3),
    ],
)
def test_the_kinds_come_as_often_as_asked(options, cut, mixed):
    draws = drawn(size=(224, 224), **options)
    is_cut = draws[:, 2] > 0
    assert is_cut.double().mean().item() == pytest.approx(cut, abs=0.04)
    assert (draws[:, 0] < 1).double().mean().item() == pytest.approx(mixed, abs=0.04)


def test_the_share_follows_the_beta_distribution():
    share = drawn(cutmix=0.0)[:, 0]
    assert share.mean().item() == pytest.approx(0.5, abs=0.03)
    assert share.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)


def test_boxes_are_cut_off_at_the_border_and_counted_as_they_are():
    draws = drawn(mixup=0.0)
    top, bottom, left, right = draws[:, 1:].unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert bottom.max() == 16
    assert right.max() == 24
    torch.testing.assert_close(draws[:, 0], 1 - (bottom - top) * (right - left) / 384)


def test_targets_are_smoothed_then_mixed():
    labels = torch.tensor([0, 3])
    smooth = soft_targets(labels, None, 4, 0.1)
    assert smooth[0].tolist() == pytest.approx([0.925, 0.025, 0.025, 0.025])
    draws = per_image(torch.tensor([[0.75, 0, 0, 0, 0]], dtype=torch.float64))
    mixed = soft_targets(labels, draws, 4, 0.0)
    assert mixed.tolist() == [[0.75, 0, 0, 0.25], [0.25, 0, 0, 0.75]]
