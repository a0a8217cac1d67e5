"""Colours are a function of the sample's key alone, torchvision's in what they do, and near the papers' own."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as reference

from foreseen.commands.verbs import load_recipe
from foreseen.config import Blur, Colour, Jitter, Solarise
from foreseen.data import colour_batched
from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.colour_batched import ColourChanges
from foreseen.data.colour_draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourDraws, draw_colours
from foreseen.data.colour_pillow import papers_colours
from foreseen.data.loader import BatchBuilder, StreamDataset, assemble, load
from foreseen.data.shards import ShardSet
from foreseen.data.views import Request, View, finish, normalise
from foreseen.errors import BadInput
from foreseen.keys import sample_keys

CPU = torch.device("cpu")
ALL = Colour(
    jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8),
    grey=0.2,
    blur=Blur(probability=0.5),
    solarise=Solarise(probability=0.2),
)
LEVELS = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # what `finish` then leaves are values of 0 to 255


def pictures(n: int, height: int = 60, width: int = 72) -> list[NDArray[np.uint8]]:
    """Smooth pictures of all colours, saturated ones among them, with some noise."""
    rng = np.random.default_rng(1)
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    found = []
    for _ in range(n):
        phase, pace = rng.uniform(0, 6, (3, 2, 3))[0], rng.uniform(1, 9, (2, 3))
        waves = np.sin(pace[0] * rows + phase[0]) + np.sin(pace[1] * columns + phase[1])
        noisy = 128 + 100 * waves + rng.normal(0, 8, (height, width, 3))
        found.append(noisy.clip(0, 255).round().astype(np.uint8))
    return found


def seen(*views: View, positions: NDArray[np.int64], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """What an objective sees of pictures that are a function of the position, [B, n, 3, H, W]."""
    request = Request(views)
    given = pictures(64)
    batch = assemble(request, 0, positions, iter([given[position] for position in positions]))
    images = finish(batch, request, CPU, dtype).images
    return {name: x.unflatten(0, (-1, len(positions))).transpose(0, 1) for name, x in images.items()}


@pytest.mark.parametrize("exact", [True, False])
def test_colours_do_not_depend_on_how_a_batch_is_cut(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    views = (
        View("global", (32, 40), count=2, colour=(ALL.model_copy(update={"exact": exact}), None)),
        View("local", (16, 16), count=3, colour=ALL.model_copy(update={"exact": exact})),
    )
    positions = np.arange(24)
    whole = seen(*views, positions=positions)
    for cut in (1, 5):
        # As small a cache as gives parts of another size, sorted besides, with their own neighbours.
        monkeypatch.setattr(colour_batched, "_GROUPED_BYTES", 0)
        monkeypatch.setattr(colour_batched, "_CPU_BYTES", cut * 3 * 4 * 16 * 16)
        found = [seen(*views, positions=part) for part in np.split(positions, range(cut, 24, cut))]
        for name in whole:
            assert torch.equal(torch.cat([part[name] for part in found]), whole[name])
    assert not torch.equal(whole["local"][:, 0], whole["local"][:, 1])


def test_crops_that_are_changed_all_at_once_as_on_a_gpu_get_the_same_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    view = View("image", (24, 20), count=3, colour=ALL)
    positions = np.arange(24)
    found = seen(view, positions=positions)["image"]
    monkeypatch.setattr(ColourChanges, "parts", lambda self, size, device: iter([np.arange(72)]))
    assert torch.equal(seen(view, positions=positions)["image"], found)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_changes_colours_as_a_cpu_does() -> None:
    request = Request((View("image", (96, 80), count=2, colour=ALL, **LEVELS),))
    batch = assemble(request, 0, np.arange(32), iter(pictures(32)))
    on_cpu = finish(batch, request, CPU, torch.float32).images["image"]
    on_gpu = finish(batch, request, torch.device("cuda"), torch.float32).images["image"]
    assert (on_cpu - on_gpu.cpu()).abs().max() < 0.01


@pytest.mark.parametrize("exact", [True, False])
def test_colours_do_not_depend_on_workers(exact: bool, small_shards: Path) -> None:
    request = Request((View("image", (24, 32), count=2, colour=ALL.model_copy(update={"exact": exact})),))
    builder = BatchBuilder(ShardSet.open(small_shards, "train"), request, seed=5)

    def images(micro_size: int, workers: int) -> Tensor:
        dataset = StreamDataset(builder, BatchLayout(16, micro_size), rank=0)
        loaded = load(dataset, range(32 // micro_size), workers=workers, pin_memory=False)
        crops = [finish(batch, request, CPU, torch.float32).images["image"] for batch in loaded]
        return torch.cat([x.unflatten(0, (2, micro_size)).transpose(0, 1) for x in crops])

    assert torch.equal(images(16, 0), images(4, 2))


@pytest.mark.parametrize("exact", [True, False])
def test_views_that_share_windows_share_their_colours(exact: bool) -> None:
    colour = Colour(jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4), exact=exact)
    views = (
        View("input", (48, 48), colour=colour, **LEVELS),
        View("tokenizer", (24, 24), window_of="input", interpolation="lanczos", colour=colour, **LEVELS),
        View("other", (24, 24), colour=colour, **LEVELS),
    )
    found = seen(*views, positions=np.arange(32))
    halved = torch.nn.functional.avg_pool2d(found["input"][:, 0], 2)
    apart = (halved - found["tokenizer"][:, 0]).abs().mean((1, 2, 3))
    assert apart.max() < 8
    assert (halved - found["other"][:, 0]).abs().mean((1, 2, 3)).median() > 20


def change_colours(images: Tensor, draws: ColourDraws, colour: Colour) -> Tensor:
    pixels = images.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    ColourChanges(colour, draws).apply(pixels, np.arange(len(pixels)))
    return pixels


def draws(n: int, **given: Any) -> ColourDraws:
    """Of n crops for which nothing is to be done but what is given."""
    nothing = ColourDraws(
        order=np.full((n, 4), -1), factors=np.ones((n, 4), np.float32), grey=np.zeros(n, bool),
        radius=np.zeros(n, np.float32), solarised=np.zeros(n, bool),
    )  # fmt: skip
    return replace(nothing, **given)


_TORCHVISION = {
    BRIGHTNESS: reference.adjust_brightness,
    CONTRAST: reference.adjust_contrast,
    SATURATION: reference.adjust_saturation,
    HUE: reference.adjust_hue,
}
_FACTORS = {
    BRIGHTNESS: (0.6, 1.4),
    CONTRAST: (0.6, 1.0, 1.4),
    SATURATION: (0.0, 0.6, 1.4),
    HUE: (-0.5, -0.1, 0.02, 0.4),
}


@pytest.mark.parametrize("operation", list(_TORCHVISION))
def test_each_jitter_is_torchvisions(operation: int) -> None:
    for factor in _FACTORS[operation]:
        given = pictures(6)
        order = np.full((6, 4), -1)
        order[[0, 2, 3, 5], [0, 1, 2, 3]] = operation  # for some crops only, at any place
        factors = np.full((6, 4), np.float32(factor))
        batched = change_colours(
            torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2), draws(6, order=order, factors=factors), ALL
        )
        for row, pixels in enumerate(given):
            floats = torch.from_numpy(pixels).permute(2, 0, 1) / 255
            pillow = Image.fromarray(pixels)
            if operation in order[row]:
                floats = _TORCHVISION[operation](floats, factor)
                pillow = _TORCHVISION[operation](pillow, factors[row, operation].item())
            assert (batched[row] - 255 * floats).abs().max() < 0.06  # it has other digits of the weights of grey
            ours = papers_colours(pixels, draws(6, order=order, factors=factors), row, ALL)
            assert np.array_equal(ours, np.asarray(pillow))


def test_the_other_operations_are_torchvisions_and_pillows() -> None:
    pixels = pictures(1)[0]
    images = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    blurs = {"radius": np.full(1, 1.3, np.float32)}
    torchvisions = Colour(blur=Blur(kernel_size=9))
    floats = reference.gaussian_blur(images.float(), [9, 9], [1.3, 1.3])
    assert (change_colours(images, draws(1, **blurs), torchvisions) - floats).abs().max() < 1e-3
    solarised = draws(1, solarised=np.ones(1, bool))
    inverted = reference.solarize(images, 100)
    assert torch.equal(change_colours(images, solarised, Colour(solarise=Solarise(threshold=100))), inverted.float())
    grey = reference.rgb_to_grayscale(images.float(), 3)
    assert (change_colours(images, draws(1, grey=np.ones(1, bool)), Colour()) - grey).abs().max() < 0.06


@pytest.mark.parametrize(
    ("colour", "most", "mean"),
    [
        (Colour(jitter=Jitter(brightness=0.4)), 1.1, 0.6),
        (Colour(jitter=Jitter(contrast=0.4)), 1.3, 0.6),
        (Colour(jitter=Jitter(saturation=0.4)), 1.3, 0.6),
        (Colour(jitter=Jitter(hue=0.1)), 20, 1.3),
        (Colour(jitter=Jitter(hue=0.5)), 20, 1.3),
        (Colour(jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.4)), 5, 1.8),
        (Colour(grey=1.0), 0.6, 0.3),
        (Colour(blur=Blur(probability=1.0)), 3.5, 0.7),
        (Colour(blur=Blur(probability=1.0, radius=(2.0, 9.0))), 3.5, 0.7),
        (Colour(blur=Blur(probability=1.0, kernel_size=9)), 0.6, 0.3),
        (Colour(solarise=Solarise(probability=1.0)), 0, 0),
        (Colour(solarise=Solarise(probability=1.0, threshold=40)), 0, 0),
        (ALL, 24, 1.8),
    ],
)
def test_the_batched_operations_are_near_the_papers(colour: Colour, most: float, mean: float) -> None:
    views = [
        View("exact", (40, 56), colour=colour.model_copy(update={"exact": True}), **LEVELS),
        View("batched", (40, 56), window_of="exact", colour=colour, **LEVELS),
        View("plain", (40, 56), window_of="exact", **LEVELS),
    ]
    found = seen(*views, positions=np.arange(48))
    gap = (found["exact"] - found["batched"]).abs()
    assert gap.max() <= most
    assert gap.mean() <= mean
    assert (found["exact"] - found["plain"]).abs().mean() > 1.5 * gap.mean()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "colour",
    [
        Colour(),
        Colour(jitter=Jitter()),
        Colour(jitter=Jitter(brightness=0.4, hue=0.1, probability=0.0), blur=Blur(probability=0.0)),
        Colour(solarise=Solarise(probability=0.0)),
    ],
)
def test_without_strength_or_probability_nothing_changes(colour: Colour, exact: bool) -> None:
    view = View("image", (24, 24), count=2, colour=colour.model_copy(update={"exact": exact}))
    assert torch.equal(
        seen(view, positions=np.arange(8))["image"], seen(replace(view, colour=None), positions=np.arange(8))["image"]
    )


def test_draws_happen_as_often_and_lie_where_they_should() -> None:
    n = 20_000
    found = draw_colours(ALL, sample_keys(3, np.arange(n)))
    jittered = (found.order >= 0).any(axis=1)
    for happened, probability in (
        (jittered, 0.8), (found.grey, 0.2), (found.radius > 0, 0.5), (found.solarised, 0.2),
    ):  # fmt: skip
        assert abs(happened.mean() - probability) < 4 * (probability * (1 - probability) / n) ** 0.5
    together = np.corrcoef([jittered, found.grey, found.radius > 0, found.solarised])
    assert np.abs(together - np.eye(4)).max() < 4 / n**0.5
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]):
        spread = np.histogram(found.factors[:, column], bins=8, range=(low, high))[0]
        assert spread.sum() == n
        assert np.abs(spread - n / 8).max() < 5 * (n / 8) ** 0.5
    blurred = found.radius[found.radius > 0]
    assert 0.1 <= blurred.min() < 0.11
    assert 1.99 < blurred.max() <= 2.0
    orders, counts = np.unique(found.order[jittered], axis=0, return_counts=True)
    assert len(orders) == 24
    assert np.abs(counts - jittered.sum() / 24).max() < 5 * (jittered.sum() / 24) ** 0.5


def test_colours_come_in_the_precision_of_the_images() -> None:
    view = View("image", (24, 24), colour=ALL)
    single, double = (seen(view, positions=np.arange(8), dtype=d)["image"] for d in (torch.float32, torch.float64))
    assert double.dtype == torch.float64
    assert torch.equal(double.float(), single)


def test_nothing_is_read_from_the_device() -> None:
    # The meta device has no values to read.
    request = Request((View("image", (24, 24), count=2, colour=ALL), View("plain", (8, 8))))
    batch = assemble(request, 0, np.arange(8), iter(pictures(8)))
    found = finish(batch, request, torch.device("meta"), torch.float32)
    assert found.images["image"].shape == (16, 3, 24, 24)
    assert found.images["image"].device.type == "meta"


def test_a_view_of_one_pixel_has_colours() -> None:
    for exact in (True, False):
        view = View("image", (1, 2), colour=ALL.model_copy(update={"exact": exact}))
        assert seen(view, positions=np.arange(16))["image"].isfinite().all()


def test_a_crop_without_colours_is_only_normalised() -> None:
    view = View("image", (16, 16), count=3, colour=(ALL, None, ALL))
    batch = assemble(Request((view,)), 0, np.arange(6), iter(pictures(6)))
    found = finish(batch, Request((view,)), CPU, torch.float32).images["image"]
    plain = normalise(batch.images["image"], view.mean, view.std, torch.float32)
    assert torch.equal(found[6:12], plain[6:12])
    assert not torch.equal(found[:6], plain[:6])
    assert not torch.equal(found[12:], plain[12:])
    assert isinstance(batch, Batch)


def test_colours_for_another_number_of_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="view 'image' has 3 crops and colours for 2"):
        View("image", (16, 16), count=3, colour=(ALL, None))


def test_a_kernel_that_a_crop_cannot_mirror_is_refused() -> None:
    blur = Colour(blur=Blur(kernel_size=23))
    View("image", (12, 40), colour=blur)
    with pytest.raises(BadInput, match=r"blur.kernel_size 23 does not fit crops of 11 x 40 pixels.* 21 at most"):
        View("image", (11, 40), colour=blur)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "jitter.brightness=-0.4",
            r"views\.colour\.jitter\.brightness should be greater than or equal to 0, got -0\.4",
        ),
        ("jitter.contrast=.inf", r"views\.colour\.jitter\.contrast should be a finite number, got inf"),
        ("jitter.hue=0.6", r"views\.colour\.jitter\.hue should be less than or equal to 0\.5, got 0\.6"),
        ("jitter.probability=1.2", r"views\.colour\.jitter\.probability should be less than or equal to 1, got 1\.2"),
        ("jitter.brigthness=0.4", r"unknown key 'views\.colour\.jitter\.brigthness' .*jitter\.brightness'"),
        ("grey=-0.1", r"views\.colour\.grey should be greater than or equal to 0, got -0\.1"),
        ("blur.radius=[2,0.1]", r"blur\.radius must be two rising numbers of pixels in \(0, 100\], got \(2\.0, 0\.1\)"),
        ("blur.radius=[0,0]", r"blur\.radius must be two rising numbers"),
        ("blur.radius=[1,1e9]", r"blur\.radius must be two rising numbers"),
        ("blur.radius=[1]", r"views\.colour\.blur\.radius"),
        ("blur.kernel_size=8", r"blur\.kernel_size must be odd, got 8"),
        ("solarise.threshold=300", r"views\.colour\.solarise\.threshold should be less than or equal to 255, got 300"),
    ],
)
def test_a_wrong_colour_is_a_sentence_that_names_the_key(override: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        load_recipe("pretrain", "mae_vit_b16", [f"views.colour.{override}"])
