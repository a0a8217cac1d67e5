import pickle

import numpy as np
import pytest
import torch

from foreseen.data.views import Request, View, ViewCutter
from foreseen.device_keys import as_tensor
from foreseen.errors import BadInput
from foreseen.finetune.augment import EraseBox, RandAugment, ThreeAugment, erase
from foreseen.keys import sample_keys


def keys(n, start=0):
    return sample_keys(0, np.arange(start, start + n, dtype=np.int64))


def boxes(probability, size, n):
    rng = np.random.default_rng(0)
    return np.stack([EraseBox(probability, size)(rng, 0) for _ in range(n)])


def rand_augment(notation="rand-m9-mstd0.5-inc1"):
    return RandAugment(notation, (32, 32), (0.5, 0.5, 0.5), "bicubic")


def test_rand_augment_depends_on_the_sample_and_on_nothing_else():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    request = Request(views=(View("image", (32, 32), transform=pickle.loads(pickle.dumps(rand_augment()))),))

    def cut(all_keys):
        cutter = ViewCutter(request.views, all_keys)
        for row in range(len(all_keys)):
            cutter.cut(row, picture)
        return cutter.tensors["image"]

    whole = cut(keys(6))
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(cut(keys(2, start=3)), whole[3:5])
    assert len({image.numpy().tobytes() for image in whole}) == 6


def test_rand_augment_has_timms_settings():
    operation = rand_augment()._transform.ops[0]
    assert operation.magnitude == 9
    assert operation.hparams["magnitude_std"] == 0.5
    assert operation.hparams["translate_const"] == 14
    assert operation.kwargs["fillcolor"] == (128, 128, 128)


def test_a_picture_that_keeps_no_bit_is_black():
    augment = pickle.loads(pickle.dumps(rand_augment("rand-m10-inc1")))
    operations = [each for each in augment._transform.ops if each.name == "PosterizeIncreasing"]
    for operation in operations:
        operation.prob = 1.0
    augment._transform.ops, augment._transform.num_layers = operations, 1
    assert len(operations) == 1
    assert not augment(np.full((8, 8, 3), 255, dtype=np.uint8)).any()


@pytest.mark.parametrize(
    "notation", ["randaug", "rand-x3", "rand-m9-tnowhere", "rand-m9-std0.5", "rand-m", "rand-inc1.5"]
)
def test_an_unknown_notation_is_refused(notation):
    with pytest.raises(BadInput, match="is not timm's notation"):
        rand_augment(notation)


def test_boxes_have_the_areas_and_ratios_asked_for():
    drawn = boxes(0.25, (64, 96), 4000)
    erased = drawn[drawn.any(axis=1)]
    assert len(erased) / 4000 == pytest.approx(0.25, abs=0.02)
    height, width = erased[:, 1] - erased[:, 0], erased[:, 3] - erased[:, 2]
    share, ratio = height * width / (64 * 96), height / width
    assert (erased >= 0).all()
    assert erased[:, 1].max() <= 64
    assert erased[:, 3].max() <= 96
    assert 0.015 < share.min() < 0.03 < 0.3 < share.max() < 0.35
    assert 0.25 < ratio.min() < 0.4 < 2.5 < ratio.max() < 3.6


def test_erasing_fills_the_box_with_normal_noise_of_the_sample():
    images = torch.full((64, 3, 32, 32), 7.0, dtype=torch.float64)
    box = torch.from_numpy(boxes(0.5, (32, 32), 64))
    key = as_tensor(keys(64))
    out = erase(images, box, key)
    changed = out != 7.0
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    assert torch.equal(changed.sum(dim=(1, 2, 3)), 3 * area)
    noise = out[changed]
    assert noise.mean().item() == pytest.approx(0, abs=0.05)
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    assert noise.isfinite().all()
    assert torch.equal(erase(images[10:12], box[10:12], key[10:12]), out[10:12])


def test_three_augment_applies_one_of_grey_solarise_and_blur_to_every_crop():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    request = Request(views=(View("image", (40, 40), scale=(1, 1), ratio=(1, 1), flip=0.0, transform=ThreeAugment(0)),))
    cutter = ViewCutter(request.views, keys(300))
    kinds = {"grey": 0, "solarised": 0, "blurred": 0}
    for row in range(300):
        cutter.cut(row, picture)
    for crop in cutter.tensors["image"].permute(0, 2, 3, 1).numpy():
        if (crop == crop[..., :1]).all():
            kinds["grey"] += 1
        elif np.array_equal(crop, np.where(picture < 128, picture, 255 - picture)):
            kinds["solarised"] += 1
        else:
            assert crop.std() < picture.std()
            kinds["blurred"] += 1
    assert min(kinds.values()) > 70


def test_three_augment_depends_on_the_sample_and_on_nothing_else():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    request = Request(views=(View("image", (32, 32), transform=pickle.loads(pickle.dumps(ThreeAugment(0.3)))),))

    def cut(all_keys):
        cutter = ViewCutter(request.views, all_keys)
        for row in range(len(all_keys)):
            cutter.cut(row, picture)
        return cutter.tensors["image"]

    whole = cut(keys(6))
    np.random.seed(5)
    torch.manual_seed(5)
    assert torch.equal(cut(keys(2, start=3)), whole[3:5])
