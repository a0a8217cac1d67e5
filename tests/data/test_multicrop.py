"""Multi-crop views are crops of one decoded picture, with the papers' colours, the same however they are made."""

from typing import Any

import numpy as np
import pytest
import torch

from foreseen.config import Blur, Colour, Jitter, Views
from foreseen.data.loader import assemble
from foreseen.data.multicrop import MultiCrop, multicrop_views, papers_crop_colours
from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD, Request, View, finish
from foreseen.errors import BadInput
from tests.data.test_colour import CPU, pictures

VIEWS = Views(size=(32, 40), scale=(0.4, 1.0))


def views_of(views: Views = VIEWS, **options: Any) -> tuple[View, ...]:
    given = {"local_count": 3, "local_size": (16, 12)} | options
    return multicrop_views(MultiCrop(**given), views, IMAGENET_MEAN, IMAGENET_STD)


def seen(views: tuple[View, ...], positions: range) -> dict[str, torch.Tensor]:
    """[n * B, 3, H, W]."""
    request, given = Request(views), pictures(16, 120, 150)
    batch = assemble(request, 0, np.array(positions), iter([given[position] for position in positions]))
    return finish(batch, request, CPU, torch.float32).images


@pytest.mark.parametrize("exact", [True, False])
def test_crops_of_one_size_are_one_tensor_whose_rows_depend_on_the_sample_alone(exact: bool) -> None:
    views = views_of(global_count=3, local_count=5, exact=exact)
    whole = seen(views, range(12))
    assert {name: tuple(x.shape) for name, x in whole.items()} == {
        "global": (36, 3, 32, 40),
        "local": (60, 3, 16, 12),
    }
    for start, stop in ((0, 1), (1, 5), (5, 12)):
        part = seen(views, range(start, stop))
        for name, count in (("global", 3), ("local", 5)):
            rows = whole[name].unflatten(0, (count, 12))[:, start:stop]
            assert torch.equal(part[name].unflatten(0, (count, stop - start)), rows)


def test_crops_see_what_their_scale_says() -> None:
    columns = np.linspace(0, 255, 160).round().astype(np.uint8)
    ramp = np.broadcast_to(columns[None, :, None], (160, 160, 3)).copy()
    views = views_of(colours=None, local_scale=(0.04, 0.09), local_size=(20, 20))
    batch = assemble(Request(views), 0, np.arange(40), iter([ramp] * 40))
    spans = {name: (x.float().amax((1, 2, 3)) - x.float().amin((1, 2, 3))) / 255 for name, x in batch.images.items()}
    assert 0.15 < spans["local"].min() < spans["local"].max() < 0.36  # the roots of 0.04 and 0.09, stretched by 3 / 4
    assert 0.5 < spans["global"].min() < spans["global"].max() <= 1


def test_all_crops_are_normalised_and_cut_as_the_views_say() -> None:
    shared = Views(
        size=(32, 32), ratio=(0.5, 2.0), interpolation="bilinear", flip=0.0, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    for view in views_of(shared):
        assert (view.ratio, view.interpolation, view.flip) == ((0.5, 2.0), "bilinear", 0.0)
        assert (view.mean, view.std) == ((0.5,) * 3, (0.25,) * 3)


def blurs(view: View) -> list[tuple[float, int | None, float]]:
    """Of each crop: how often it is blurred, the kernel, how often it is solarised."""
    found = []
    for colour in view.colours:
        assert colour is not None
        assert colour.jitter == Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8)
        assert (colour.grey, colour.blur is not None) == (0.2, True)
        assert colour.blur is not None
        assert colour.blur.radius == (0.1, 2.0)
        solarised = colour.solarise.probability if colour.solarise else 0.0
        found.append((colour.blur.probability, colour.blur.kernel_size, solarised))
    return found


@pytest.mark.parametrize(
    ("paper", "first", "other", "local"),
    [
        ("dino", (1.0, None, 0.0), (0.1, None, 0.2), (0.5, None, 0.0)),
        ("byol", (1.0, 23, 0.0), (0.1, 23, 0.2), (0.5, 23, 0.0)),
        ("dinov2", (0.0, 9, 0.0), (0.9, 9, 0.2), (0.5, 9, 0.0)),  # as its code runs
    ],
)
def test_the_colours_are_the_papers(paper: Any, first: Any, other: Any, local: Any) -> None:
    large, small = views_of(colours=paper, global_count=3, local_size=(16, 16))
    assert blurs(large) == [first, other, other]
    assert blurs(small) == [local] * 3


def test_dinov2s_blur_happens_as_torchvision_would_do_it() -> None:
    from torchvision.transforms import RandomApply

    torch.manual_seed(0)
    # Its code: RandomApply(..., p=1 - p), for the p of 1.0, 0.1 and 0.5 of the paper.
    happened = [sum(RandomApply([lambda _: True], p=1 - p)(False) for _ in range(400)) / 400 for p in (1.0, 0.1, 0.5)]
    large, small = papers_crop_colours("dinov2", 2)
    for colour, share in zip((*large, small), happened, strict=True):
        assert colour.blur is not None
        assert abs(colour.blur.probability - share) < 0.1


def test_without_the_papers_colours_all_crops_have_those_of_the_views() -> None:
    colour = Colour(grey=1.0, blur=Blur(probability=0.3))
    for view in views_of(VIEWS.model_copy(update={"colour": colour}), colours=None):
        assert set(view.colours) == {colour}
    for view in views_of(colours=None):
        assert set(view.colours) == {None}
    with pytest.raises(BadInput, match=r"views.colour is given besides the colours of dino .*=null"):
        views_of(VIEWS.model_copy(update={"colour": colour}))


def test_deits_simple_crop_is_refused() -> None:
    with pytest.raises(BadInput, match=r"views\.simple_crop true .* set it to false"):
        views_of(VIEWS.model_copy(update={"simple_crop": True}))


def test_there_may_be_no_small_crops() -> None:
    (large,) = views_of(local_count=0)
    assert (large.name, large.count) == ("global", 2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"global_count": 0}, "greater than or equal to 1"),
        ({"local_count": -1}, "greater than or equal to 0"),
        ({"local_size": 0}, r"method.crops.local_size must be positive, got \(0, 0\)"),
        (
            {"local_scale": (0.4, 0.05)},
            r"method.crops.local_scale must be two rising shares in \(0, 1\], got \(0\.4, 0\.05\)",
        ),
        ({"local_scale": (0.05, 1.5)}, "method.crops.local_scale must be two rising shares"),
        ({"colours": "simclr"}, "'dino', 'dinov2' or 'byol'"),
    ],
)
def test_crops_that_cannot_be_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        MultiCrop(**options)


def test_a_blur_that_does_not_fit_the_small_crops_is_refused() -> None:
    with pytest.raises(BadInput, match=r"blur.kernel_size 23 does not fit crops of 11 x 16 pixels"):
        views_of(colours="byol", local_size=(11, 16))
