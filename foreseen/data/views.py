"""What an objective asks to see of each image, and how a worker cuts it out.

A worker decodes an image once and cuts every view from it: an antialiased uint8 crop per view, written straight into
the batch. Normalising is left to the device (`finish`), where it costs nothing. Windows are drawn from the sample's
key, so a sample at a position has the same crops whoever loads it.

Letters: B images, n crops of one view, C channels, H and W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from foreseen.config import Views as ViewOptions
from foreseen.data.batch import Batch
from foreseen.device_keys import library_generators_seeded
from foreseen.keys import Keys, subkeys, uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries as often before it falls back to the centre
_CROP_NUMBERS = 2 * CROP_ATTEMPTS + 2
_LONGEST_SIDE = 16  # times the shortest; of a longer ribbon the ends are cut, or resizing it could take gigabytes

Transform = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class View:
    """One kind of crop.

    Attributes:
        name: under which the batch holds it.
        size: (H, W) in pixels.
        crop: "random" is a RandomResizedCrop (Szegedy et al. 2014) with `scale` and `ratio`; "centre" resizes the
            image until it covers size / `centre_fraction` and cuts the middle, as the field evaluates.
        scale: smallest and largest share of the image's area that a random crop covers.
        ratio: narrowest and widest aspect ratio (width / height) of a random crop.
        interpolation: "bicubic" or "bilinear", always antialiased.
        flip: probability of a horizontal flip.
        count: crops of this kind, n; the batch holds them crop-major as [n * B, C, H, W].
        window_of: the name of a view whose windows and flips this one shares, at its own size; and the random numbers
            of its transform.
        transform: a library's augmentation [H, W, C] -> [H, W, C], run in the worker after the crop with python's,
            numpy's and torch's generators seeded from the sample's key. Must be picklable.
        mean, std: what `finish` normalises by, per channel, for pixels in [0, 1].
    """

    name: str
    size: tuple[int, int]
    crop: Literal["random", "centre"] = "random"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: float = 0.5
    count: int = 1
    window_of: str | None = None
    centre_fraction: float = 0.875
    transform: Transform | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


def configured_view(options: ViewOptions, mean: tuple[float, ...], std: tuple[float, ...]) -> View:
    """The random crop, named "image", that a config's `views` section asks for.

    Args:
        options: the section; its own mean and std win.
        mean, std: of the encoder, where the section leaves them out.
    """
    return View(
        name="image",
        size=options.size,
        scale=options.scale,
        ratio=options.ratio,
        interpolation=options.interpolation,
        flip=options.flip,
        mean=options.mean or mean,
        std=options.std or std,
    )


@dataclass(frozen=True)
class Draw:
    """A random array per sample that only a worker can draw alike everywhere (sequential masks, Beta, logarithms).

    Attributes:
        name: under which the batch holds it.
        function: from a generator and the position in the stream (for what is stratified over the global batch; the
            first one of the group) to an array of one shape and dtype; must be picklable.
        group: so many consecutive positions share one draw; 1 draws for each sample, 2 for a mixup pair.
    """

    name: str
    function: Callable[[np.random.Generator, int], NDArray[Any]]
    group: int = 1


@dataclass(frozen=True)
class Request:
    """All that an objective wants of the samples of a batch."""

    views: tuple[View, ...]
    draws: tuple[Draw, ...] = ()
    labels: bool = False

    def __post_init__(self) -> None:
        by_name = {view.name: view for view in self.views}
        if len(by_name) < len(self.views):
            raise ValueError(f"two views share a name: {[view.name for view in self.views]}")
        for view in self.views:
            if view.window_of is None:
                continue
            owner = by_name.get(view.window_of)
            if owner is None or owner.window_of or "centre" in (owner.crop, view.crop) or view.count > owner.count:
                raise ValueError(
                    f"view {view.name!r} cannot share the windows of {view.window_of!r}: both must be random crops of "
                    "one request, the owner must draw its own windows, and at least as many"
                )


@dataclass(frozen=True)
class Window:
    """A box of the image in whole pixels, and whether what is cut from it is flipped."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool = False


def random_window(numbers: NDArray[np.float32], height: int, width: int, view: View) -> Window:
    """Draw a RandomResizedCrop window from keyed uniforms, with torchvision's rule and fall-back.

    Args:
        numbers: 2 * CROP_ATTEMPTS + 2 uniforms in [0, 1): area and ratio of each attempt, then the place.
        height, width: of the image, in pixels.
        view: gives scale and ratio.
    """
    area = height * width
    log_ratio = (math.log(view.ratio[0]), math.log(view.ratio[1]))
    u = numbers.tolist()
    for attempt in range(CROP_ATTEMPTS):
        target = area * _between(u[2 * attempt], *view.scale)
        ratio = math.exp(_between(u[2 * attempt + 1], *log_ratio))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Window(int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w)
    w, h = width, height
    if width / height < view.ratio[0]:
        h = max(1, round(width / view.ratio[0]))
    elif width / height > view.ratio[1]:
        w = max(1, round(height * view.ratio[1]))
    return Window((height - h) // 2, (width - w) // 2, h, w)


def _between(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


class ViewCutter:
    """Cuts the views of one sample after another into the tensors of a batch.

    Args:
        views: what to cut.
        keys: of the batch's samples, [B].
    """

    def __init__(self, views: tuple[View, ...], keys: Keys) -> None:
        self._views = views
        self._keys = keys
        by_name = {view.name: view for view in views}
        owners = {view.window_of or view.name for view in views if view.crop == "random"}
        self._numbers = {
            (name, crop): uniform(subkeys(keys, f"view/{name}/{crop}"), "window", _CROP_NUMBERS + 1)
            for name in owners
            for crop in range(by_name[name].count)
        }
        # Stored as the pictures come, channels last; handed out as [n * B, C, H, W].
        self.tensors = {
            view.name: torch.empty((view.count * len(keys), *view.size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
            for view in views
        }

    def cut(self, row: int, image: NDArray[np.uint8]) -> None:
        """Cut every view of the batch's sample number `row` from its image [H, W, 3]."""
        pixels = torch.from_numpy(image).permute(2, 0, 1)
        for view in self._views:
            for crop in range(view.count):
                window = None if view.crop == "centre" else self._window(row, crop, pixels, view)
                seen = _centre(pixels, view) if window is None else _cut(pixels, window, view)
                if view.transform is not None:
                    stream = f"transform/{view.window_of or view.name}/{crop}"
                    seen = self._transformed(seen, view.transform, stream, row)
                self.tensors[view.name][crop * len(self._keys) + row].copy_(seen)

    def _window(self, row: int, crop: int, pixels: Tensor, view: View) -> Window:
        owner = next(v for v in self._views if v.name == (view.window_of or view.name))
        numbers = self._numbers[owner.name, crop][row]
        window = random_window(numbers[:-1], pixels.shape[1], pixels.shape[2], owner)
        flipped = bool(numbers[-1] < owner.flip)
        return Window(window.top, window.left, window.height, window.width, flipped)

    def _transformed(self, pixels: Tensor, transform: Transform, stream: str, row: int) -> Tensor:
        with library_generators_seeded(int(subkeys(self._keys[row : row + 1], stream)[0])):
            changed = transform(pixels.permute(1, 2, 0).contiguous().numpy())
        return torch.from_numpy(changed).permute(2, 0, 1)


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    # uint8 in, uint8 out: equal to Pillow's antialiased filter to within the rounding. The batch axis is put before
    # channels that stand last: `pixels[None]` would hide that they do, and torch would unpack and repack them.
    images = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, size=size, mode=interpolation, antialias=True, align_corners=False)[0]


def _cut(pixels: Tensor, window: Window, view: View) -> Tensor:
    box = pixels[:, window.top : window.top + window.height, window.left : window.left + window.width]
    resized = _resize(box, view.size, view.interpolation)
    return resized.flip(-1) if window.flipped else resized


def _centre(pixels: Tensor, view: View) -> Tensor:
    # torchvision's Resize and CenterCrop, to the pixel, and the same rule for windows that are not square.
    longest = _LONGEST_SIDE * min(pixels.shape[1:])
    pixels = _middle(pixels, min(pixels.shape[1], longest), min(pixels.shape[2], longest))
    sides = pixels.shape[1:]
    covers = [int(size / view.centre_fraction) for size in view.size]
    tight = 0 if covers[0] * sides[1] >= covers[1] * sides[0] else 1
    resized_size = [covers[tight] * side // sides[tight] for side in sides]
    resized_size[tight] = covers[tight]
    height, width = resized_size
    resized = pixels if (height, width) == tuple(sides) else _resize(pixels, (height, width), view.interpolation)
    return _middle(resized, *view.size)


def _middle(pixels: Tensor, height: int, width: int) -> Tensor:
    top, left = round((pixels.shape[1] - height) / 2), round((pixels.shape[2] - width) / 2)
    return pixels[:, top : top + height, left : left + width]


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made once per device, or every batch would send them again.
    return torch.tensor([255.0 * value for value in values], dtype=dtype, device=device).view(-1, 1, 1)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Bring uint8 pixels to zero mean and unit variance: [B, C, H, W] uint8 -> [B, C, H, W] `dtype`, contiguous."""
    floats = images.to(dtype=dtype, memory_format=torch.contiguous_format)
    return floats.sub_(_constants(mean, images.device, dtype)).div_(_constants(std, images.device, dtype))


def denormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalise`, for pictures: [B, C, H, W] float -> [B, C, H, W] uint8, clipped."""
    scale = images.new_tensor(std).view(-1, 1, 1)
    shift = images.new_tensor(mean).view(-1, 1, 1)
    return ((images * scale + shift) * 255.0).round().clamp(0, 255).to(torch.uint8)


def finish(batch: Batch, request: Request, device: torch.device, dtype: torch.dtype) -> Batch:
    """Move a worker's batch to the device and normalise its views there."""
    batch = batch.to(device)
    images = {view.name: normalise(batch.images[view.name], view.mean, view.std, dtype) for view in request.views}
    return batch.with_images(images)
