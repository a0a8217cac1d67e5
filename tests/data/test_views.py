"""Crops are torchvision's in distribution and in pixels, and a function of the sample's key alone."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms import v2

from foreseen.data import views
from foreseen.data.batch import Batch
from foreseen.data.views import Request, View, ViewCutter, Window, denormalise, finish, normalise, random_window
from foreseen.keys import sample_keys, uniform

KEYS = sample_keys(0, np.arange(8))


def picture(height: int, width: int) -> NDArray[np.uint8]:
    """A smooth picture that tells left from right and top from bottom."""
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    channels = [rows + 0 * columns, columns + 0 * rows, (rows + columns) / 2]
    return (255 * np.stack(channels, axis=-1)).round().astype(np.uint8)


def cut(*wanted: View, image: NDArray[np.uint8], keys: NDArray[np.uint64] = KEYS) -> dict[str, torch.Tensor]:
    cutter = ViewCutter(wanted, keys)
    for row in range(len(keys)):
        cutter.cut(row, image)
    return cutter.tensors


def drawn_windows(view: View, height: int, width: int, n: int) -> list[Window]:
    numbers = uniform(sample_keys(1, np.arange(n)), "window", 2 * views.CROP_ATTEMPTS + 2)
    return [random_window(row, height, width, view) for row in numbers]


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((60, 80), (0.08, 1.0), (3 / 4, 4 / 3)),
        ((200, 90), (0.2, 1.0), (3 / 4, 4 / 3)),  # some attempts do not fit
        ((100, 100), (0.05, 0.25), (0.5, 3.0)),
    ],
)
def test_windows_are_distributed_as_torchvision_draws_them(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    n = 2500
    ours = drawn_windows(View("a", (8, 8), scale=scale, ratio=ratio), *size, n)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(8, scale=scale, ratio=ratio)
    image = torch.empty(3, *size)
    theirs = [crop.make_params([image]) for _ in range(n)]
    for side in ("top", "left", "height", "width"):
        one, two = sorted(getattr(w, side) for w in ours), sorted(w[side] for w in theirs)
        grid = np.arange(max(size) + 1)
        gap = np.searchsorted(one, grid, "right") - np.searchsorted(two, grid, "right")
        assert np.abs(gap).max() / n < 1.95 * (2 / n) ** 0.5, side  # Kolmogorov and Smirnov, one in a thousand


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (5, 400), (400, 5), (33, 47)])
def test_windows_lie_inside_the_picture_and_fall_back_as_torchvision_does(height: int, width: int) -> None:
    view = View("a", (8, 8), scale=(0.9, 1.0))
    found = drawn_windows(view, height, width, 200)
    for window in found:
        assert 0 <= window.top <= window.top + window.height <= height
        assert 0 <= window.left <= window.left + window.width <= width
        assert min(window.height, window.width) >= 1
    if max(height, width) > 4 * min(height, width):
        params = v2.RandomResizedCrop(8, scale=view.scale).make_params([torch.empty(3, height, width)])
        expected = Window(params["top"], params["left"], max(1, params["height"]), max(1, params["width"]))
        assert set(found) == {expected}


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_random_crop_has_the_pixels_of_pillow(interpolation: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(60, 196, (70, 90, 3), dtype=np.uint8)  # where nothing is clipped, for which orders differ
    view = View("a", (24, 32), interpolation=interpolation, flip=0.0)
    found = cut(view, image=image)["a"]
    numbers = uniform(views.subkeys(KEYS, "view/a/0"), "window", 2 * views.CROP_ATTEMPTS + 3)
    for row in range(len(KEYS)):
        w = random_window(numbers[row, :-1], 70, 90, view)
        box = Image.fromarray(image).crop((w.left, w.top, w.left + w.width, w.top + w.height))
        resized = box.resize((32, 24), getattr(Image.Resampling, interpolation.upper()))
        expected = torch.from_numpy(np.asarray(resized).astype(np.int16)).permute(2, 0, 1)
        assert (found[row].to(torch.int16) - expected).abs().max() <= 1


def test_a_lanczos_view_of_shared_windows_is_pillows() -> None:
    image = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    owner = View("input", (32, 32))
    found = cut(owner, View("tokenizer", (14, 18), window_of="input", interpolation="lanczos"), image=image)
    numbers = uniform(views.subkeys(KEYS, "view/input/0"), "window", 2 * views.CROP_ATTEMPTS + 3)
    for row in range(len(KEYS)):
        w = random_window(numbers[row, :-1], 70, 90, owner)
        box = Image.fromarray(image).crop((w.left, w.top, w.left + w.width, w.top + w.height))
        expected = torch.from_numpy(np.array(box.resize((18, 14), Image.Resampling.LANCZOS))).permute(2, 0, 1)
        assert torch.equal(found["tokenizer"][row], expected.flip(-1) if numbers[row, -1] < 0.5 else expected)


def test_a_flip_mirrors_the_same_window() -> None:
    image = picture(50, 60)
    straight = cut(View("a", (16, 16), flip=0.0), image=image)["a"]
    mirrored = cut(View("a", (16, 16), flip=1.0), image=image)["a"]
    sometimes = cut(View("a", (16, 16), flip=0.5), image=image)["a"]
    assert torch.equal(mirrored, straight.flip(-1))
    flipped = [torch.equal(a, b) for a, b in zip(sometimes, mirrored, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(sometimes, straight, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 0 < sum(flipped) < len(KEYS)


def test_a_view_that_shares_windows_sees_the_same_part_at_its_own_size() -> None:
    wanted = (
        View("input", (32, 32), count=2),
        View("tokenizer", (16, 16), count=2, window_of="input"),
        View("other", (16, 16), count=2),
    )
    found = {name: x.float() for name, x in cut(*wanted, image=picture(120, 150)).items()}
    assert found["input"].shape == (16, 3, 32, 32)
    halved = F.avg_pool2d(found["input"], 2)
    assert (halved - found["tokenizer"]).abs().max() < 4
    apart = (halved - found["other"]).abs().flatten(1).mean(1)
    assert (apart > 4).all()  # its own windows
    assert ((halved[:8] - halved[8:]).abs().flatten(1).mean(1) > 4).all()  # as have the crops of one view


def _random_shift(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    shift = random.randrange(60) + int(np.random.randint(60)) + int(torch.randint(60, ()))
    return pixels // 4 + np.uint8(shift)


def test_a_view_that_shares_windows_shares_the_draws_of_its_transform() -> None:
    wanted = (
        View("input", (16, 16), transform=_random_shift),
        View("tokenizer", (8, 8), window_of="input", transform=_random_shift),
        View("centre", (8, 8), crop="centre", transform=_random_shift),
    )
    found = {
        name: x.float().mean((1, 2, 3)) for name, x in cut(*wanted, image=np.full_like(picture(20, 20), 40)).items()
    }
    assert torch.equal(found["input"], found["tokenizer"])
    assert len(found["input"].unique()) > 1
    assert not torch.equal(found["input"], found["centre"])


def test_crops_depend_on_neither_their_neighbours_nor_other_views_nor_the_state_of_generators() -> None:
    image = picture(50, 60)
    view = View("a", (16, 16), count=2, transform=_random_shift)
    together = cut(view, image=image)["a"]
    torch.manual_seed(1)
    random.seed(1)
    for row in range(len(KEYS)):
        alone = cut(View("b", (8, 8)), view, image=image, keys=KEYS[row : row + 1])["a"]
        assert torch.equal(alone, together[row :: len(KEYS)])


@pytest.mark.parametrize("sides", [(50, 70), (71, 50), (64, 64), (33, 200), (20, 21), (32, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_centre_crop_equals_torchvisions(sides: tuple[int, int], interpolation: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*sides, 3), dtype=np.uint8)
    found = cut(View("a", (28, 28), crop="centre", interpolation=interpolation), image=image, keys=KEYS[:1])["a"][0]
    stock = v2.Compose([v2.Resize(32, interpolation=v2.InterpolationMode(interpolation)), v2.CenterCrop(28)])
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    pillow = np.asarray(stock(Image.fromarray(image))).astype(np.int16)
    for expected in (stock(tensor).to(torch.int16), torch.from_numpy(pillow).permute(2, 0, 1)):
        assert (found.to(torch.int16) - expected).abs().max() <= 1


def test_a_centre_crop_of_another_shape_covers_it() -> None:
    found = cut(View("a", (16, 48), crop="centre", centre_fraction=1.0), image=picture(60, 60), keys=KEYS[:1])["a"][0]
    assert found.shape == (3, 16, 48)
    assert found[1, 0, 0] < 10  # the whole width
    assert found[1, 0, -1] > 245
    assert 70 < found[0, 0, 0] < found[0, -1, 0] < 185  # and the middle third of the height


def test_a_ribbon_is_not_blown_up(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    resize = views._resize
    monkeypatch.setattr(
        views, "_resize", lambda x, size, how: (sizes.append(size[0] * size[1]), resize(x, size, how))[1]
    )
    for image in (picture(2, 30_000), picture(30_000, 2)):
        assert cut(View("a", (64, 64), crop="centre"), image=image, keys=KEYS[:1])["a"].shape == (1, 3, 64, 64)
    assert len(sizes) == 2
    assert max(sizes) < 100_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalising_and_its_inverse(dtype: torch.dtype) -> None:
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    found = normalise(pixels, mean, std, dtype)
    expected = v2.functional.normalize(pixels.to(dtype) / 255, list(mean), list(std))
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous()
    assert torch.equal(denormalise(found, mean, std), pixels)


def test_finishing_normalises_every_view_by_its_own_constants() -> None:
    request = Request(views=(View("a", (8, 8)), View("b", (4, 4), mean=(0.5,) * 3, std=(0.5,) * 3)))
    images = cut(*request.views, image=picture(20, 20))
    numbers = torch.arange(8)
    batch = Batch(position=numbers, key=numbers, sample=numbers, images=images)
    found = finish(batch, request, torch.device("cpu"), torch.float32)
    assert torch.equal(
        found.images["a"], normalise(images["a"], views.IMAGENET_MEAN, views.IMAGENET_STD, torch.float32)
    )
    torch.testing.assert_close(found.images["b"], images["b"].float() / 127.5 - 1)
    assert images["b"].dtype == torch.uint8  # the worker's batch is left as it was


@pytest.mark.parametrize(
    "bad",
    [
        (View("a", (8, 8), window_of="b"),),
        (View("a", (8, 8), crop="centre"), View("b", (8, 8), window_of="a")),
        (View("a", (8, 8)), View("b", (8, 8), count=2, window_of="a")),
        (View("a", (8, 8)), View("b", (8, 8), window_of="a"), View("c", (8, 8), window_of="b")),
    ],
)
def test_windows_that_cannot_be_shared_are_refused(bad: tuple[View, ...]) -> None:
    with pytest.raises(ValueError, match="cannot share the windows"):
        Request(views=bad)


def test_views_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="share a name"):
        Request(views=(View("a", (8, 8)), View("a", (4, 4))))


def test_a_simple_random_crop_is_torchvisions_in_distribution() -> None:
    image = picture(60, 90)
    wanted = View("image", (24, 24), crop="simple", flip=0.0)
    crops = cut(wanted, image=image, keys=sample_keys(0, np.arange(400)))["image"]
    resized = v2.functional.resize(torch.from_numpy(image).permute(2, 0, 1), [24], antialias=True, interpolation=3)
    wide = F.pad(resized.float(), (4, 4, 4, 4), mode="reflect").round()
    possible = wide.unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4)
    assert possible.shape[:2] == (9, 21)
    found = np.zeros((9, 21))
    for crop in crops.float():
        distance = (possible - crop).abs().amax(dim=(2, 3, 4))
        assert distance.min() <= 2  # rounding
        found[np.unravel_index(int(distance.argmin()), found.shape)] += 1
    assert (found.sum(1) > 20).all()
    assert (found.sum(0) > 4).all()


def test_simple_crops_of_two_sizes_show_the_same_part() -> None:
    image = picture(60, 90)
    views_ = View("image", (24, 24), crop="simple"), View("large", (48, 48), crop="simple", window_of="image")
    both = cut(*views_, image=image, keys=sample_keys(0, np.arange(20)))
    small = F.avg_pool2d(both["large"].float(), 2)
    assert (small - both["image"].float()).abs().mean() < 6  # a pixel of the small one is 10 levels wide
    with pytest.raises(ValueError, match="of one kind"):
        Request(views=(views_[0], View("large", (48, 48), window_of="image")))


def test_simple_crops_of_small_pictures_are_cut_too() -> None:
    assert cut(View("image", (24, 24), crop="simple"), image=picture(1, 3))["image"].shape == (8, 3, 24, 24)
