"""What an objective asks to see of each image, and how a worker cuts it out.

A worker decodes an image once and cuts every view from it: an antialiased uint8 crop per view, written straight into
the batch. Colours (`colour_batched.py`) and normalising are left to the device (`finish`), unless a view wants the
papers' own colour operations (`colour_pillow.py`). Windows are drawn from the sample's key, so a sample at a position
has the same crops whoever loads it.

Letters: B images, n crops of one view, C channels, H and W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from foreseen.config import Colour
from foreseen.config import Views as ViewOptions
from foreseen.data.batch import Batch
from foreseen.data.colour_batched import ColourChanges
from foreseen.data.colour_draws import draw_colours
from foreseen.data.colour_pillow import papers_colours
from foreseen.device_keys import library_generators_seeded
from foreseen.errors import BadInput
from foreseen.keys import Keys, subkeys, uniform

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_ATTEMPTS = 10  # torchvision's RandomResizedCrop tries as often before it falls back to the centre
_CROP_NUMBERS = 2 * CROP_ATTEMPTS + 2
_SIMPLE_EDGE = 4  # pixels
_LONGEST_SIDE = 16  # times the shortest; of a longer ribbon the ends are cut, or resizing it could take gigabytes

Transform = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]


@dataclass(frozen=True)
class View:
    """One kind of crop.

    Attributes:
        name: under which the batch holds it.
        size: (H, W) in pixels.
        crop: "random" is a RandomResizedCrop (Szegedy et al. 2014) with `scale` and `ratio`; "simple" is DeiT III's
            simple random crop: the image is resized until it covers the size, mirrored at its edges by 4 pixels, and
            cut anywhere; "centre" resizes the image until it covers size / `centre_fraction` and cuts the middle, as
            the field evaluates.
        scale: smallest and largest share of the image's area that a random crop covers.
        ratio: narrowest and widest aspect ratio (width / height) of a random crop.
        interpolation: "bicubic", "bilinear" or "lanczos", always antialiased; the last is Pillow's, and slower.
        flip: probability of a horizontal flip.
        count: crops of this kind, n; the batch holds them crop-major as [n * B, C, H, W].
        window_of: the name of a view whose windows and flips this one shares, at its own size; and the random numbers
            of its transform and its colours.
        transform: a library's augmentation [H, W, C] -> [H, W, C], run in the worker after the crop with python's,
            numpy's and torch's generators seeded from the sample's key. Must be picklable.
        colour: what is done to the colours, after the transform; one for all crops of this kind, or one for each.
        mean, std: what `finish` normalises by, per channel, for pixels in [0, 1].
    """

    name: str
    size: tuple[int, int]
    crop: Literal["random", "simple", "centre"] = "random"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    flip: float = 0.5
    count: int = 1
    window_of: str | None = None
    centre_fraction: float = 0.875
    transform: Transform | None = None
    colour: Colour | tuple[Colour | None, ...] | None = None
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        if isinstance(self.colour, tuple) and len(self.colour) != self.count:
            raise ValueError(f"view {self.name!r} has {self.count} crops and colours for {len(self.colour)}")
        for colour in self.colours:
            kernel_size = colour.blur.kernel_size if colour is not None and colour.blur is not None else None
            if kernel_size is not None and kernel_size // 2 >= min(self.size):
                raise BadInput(
                    f"blur.kernel_size {kernel_size} does not fit crops of {self.size[0]} x {self.size[1]} pixels, "
                    f"whose edges it mirrors; it can be {2 * min(self.size) - 1} at most"
                )

    @property
    def colours(self) -> tuple[Colour | None, ...]:
        """Of each crop."""
        return self.colour if isinstance(self.colour, tuple) else (self.colour,) * self.count

    def crop_keys(self, keys: Keys, crop: int) -> Keys:
        """From the samples' keys, those that the window and the colours of a crop are drawn from, [B] -> [B]."""
        return subkeys(keys, f"view/{self.window_of or self.name}/{crop}")


def configured_view(options: ViewOptions, mean: tuple[float, ...], std: tuple[float, ...]) -> View:
    """The random crop, named "image", that a config's `views` section asks for.

    Args:
        options: the section; its own mean and std win.
        mean, std: of the encoder, where the section leaves them out.
    """
    return View(
        name="image",
        size=options.size,
        crop="simple" if options.simple_crop else "random",
        scale=options.scale,
        ratio=options.ratio,
        interpolation=options.interpolation,
        flip=options.flip,
        colour=options.colour,
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
            if (
                owner is None or owner.window_of or view.crop != owner.crop or view.crop == "centre"
                or view.count > owner.count
            ):  # fmt: skip
                raise ValueError(
                    f"view {view.name!r} cannot share the windows of {view.window_of!r}: both must be random crops of "
                    "one kind and one request, the owner must draw its own windows, and at least as many"
                )


@dataclass(frozen=True)
class Window:
    """A box of the image in whole pixels."""

    top: int
    left: int
    height: int
    width: int


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
        owners = {view.window_of or view.name for view in views if view.crop != "centre"}
        self._numbers = {
            (name, crop): uniform(by_name[name].crop_keys(keys, crop), "window", _CROP_NUMBERS + 1)
            for name in owners
            for crop in range(by_name[name].count)
        }
        self._exact_colours = {
            (view.name, crop): (colour, draw_colours(colour, view.crop_keys(keys, crop)))
            for view in views
            for crop, colour in enumerate(view.colours)
            if colour is not None and colour.exact
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
                seen = _centre(pixels, view) if view.crop == "centre" else self._cut(row, crop, pixels, view)
                if view.transform is not None:
                    stream = f"transform/{view.window_of or view.name}/{crop}"
                    seen = self._transformed(seen, view.transform, stream, row)
                if (found := self._exact_colours.get((view.name, crop))) is not None:
                    colour, draws = found
                    seen = _channels_first(papers_colours(_channels_last(seen), draws, row, colour))
                self.tensors[view.name][crop * len(self._keys) + row].copy_(seen)

    def _cut(self, row: int, crop: int, pixels: Tensor, view: View) -> Tensor:
        owner = next(v for v in self._views if v.name == (view.window_of or view.name))
        numbers = self._numbers[owner.name, crop][row]
        if view.crop == "simple":
            seen = _simple(pixels, numbers[:-1], view, round(_SIMPLE_EDGE * view.size[0] / owner.size[0]))
        else:
            seen = _cut(pixels, random_window(numbers[:-1], pixels.shape[1], pixels.shape[2], owner), view)
        return seen.flip(-1) if numbers[-1] < owner.flip else seen

    def _transformed(self, pixels: Tensor, transform: Transform, stream: str, row: int) -> Tensor:
        with library_generators_seeded(int(subkeys(self._keys[row : row + 1], stream)[0])):
            return _channels_first(transform(_channels_last(pixels)))


def _channels_last(pixels: Tensor) -> NDArray[np.uint8]:
    found: NDArray[np.uint8] = pixels.permute(1, 2, 0).contiguous().numpy()
    return found


def _channels_first(pixels: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _resize(pixels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    if interpolation == "lanczos":  # torch has none
        image = Image.fromarray(_channels_last(pixels))
        return _channels_first(np.array(image.resize((size[1], size[0]), Image.Resampling.LANCZOS)))
    # uint8 in, uint8 out: equal to Pillow's antialiased filter to within the rounding. The batch axis is put before
    # channels that stand last: `pixels[None]` would hide that they do, and torch would unpack and repack them.
    images = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return F.interpolate(images, size=size, mode=interpolation, antialias=True, align_corners=False)[0]


def _cut(pixels: Tensor, window: Window, view: View) -> Tensor:
    box = pixels[:, window.top : window.top + window.height, window.left : window.left + window.width]
    return _resize(box, view.size, view.interpolation)


def _simple(pixels: Tensor, numbers: NDArray[np.float32], view: View, edge: int) -> Tensor:
    covering = _covering(pixels, view, 1.0)
    wide = np.pad(covering.numpy(), ((0, 0), (edge, edge), (edge, edge)), mode="reflect")
    places = [int(u * (side - size + 1)) for u, side, size in zip(numbers[-2:], wide.shape[1:], view.size, strict=True)]
    return torch.from_numpy(wide[:, places[0] : places[0] + view.size[0], places[1] : places[1] + view.size[1]])


def _centre(pixels: Tensor, view: View) -> Tensor:
    return _middle(_covering(pixels, view, view.centre_fraction), *view.size)


def _covering(pixels: Tensor, view: View, fraction: float) -> Tensor:
    """The image, resized until it covers the view's size / `fraction`."""
    # torchvision's Resize, to the pixel, and the same rule for windows that are not square.
    longest = _LONGEST_SIDE * min(pixels.shape[1:])
    pixels = _middle(pixels, min(pixels.shape[1], longest), min(pixels.shape[2], longest))
    sides = pixels.shape[1:]
    covers = [int(size / fraction) for size in view.size]
    tight = 0 if covers[0] * sides[1] >= covers[1] * sides[0] else 1
    resized_size = [covers[tight] * side // sides[tight] for side in sides]
    resized_size[tight] = covers[tight]
    height, width = resized_size
    return pixels if (height, width) == tuple(sides) else _resize(pixels, (height, width), view.interpolation)


def _middle(pixels: Tensor, height: int, width: int) -> Tensor:
    top, left = round((pixels.shape[1] - height) / 2), round((pixels.shape[2] - width) / 2)
    return pixels[:, top : top + height, left : left + width]


@lru_cache(maxsize=64)
def _constants(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Made once per device, or every batch would send them again.
    return torch.tensor([255.0 * value for value in values], dtype=dtype, device=device).view(-1, 1, 1)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """Bring uint8 pixels to zero mean and unit variance: [B, C, H, W] uint8 -> [B, C, H, W] `dtype`, contiguous."""
    return _normalised(images.to(dtype=dtype, memory_format=torch.contiguous_format), mean, std)


def _normalised(floats: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """In place, of values in [0, 255]."""
    constants = (_constants(values, floats.device, floats.dtype) for values in (mean, std))
    return floats.sub_(next(constants)).div_(next(constants))


def denormalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """The inverse of `normalise`, for pictures: [B, C, H, W] float -> [B, C, H, W] uint8, clipped."""
    scale = images.new_tensor(std).view(-1, 1, 1)
    shift = images.new_tensor(mean).view(-1, 1, 1)
    return ((images * scale + shift) * 255.0).round().clamp(0, 255).to(torch.uint8)


def finish(batch: Batch, request: Request, device: torch.device, dtype: torch.dtype) -> Batch:
    """Move a worker's batch to the device, and there change the colours of its views and normalise them.

    Args:
        batch: as the loader hands it out, on the host.
        request: that it was made for.
        device: where the objective is.
        dtype: of the images; colours are computed in float32.
    """
    moved = batch.to(device)
    images = {view.name: _finished(moved.images[view.name], view, batch.key, dtype) for view in request.views}
    return moved.with_images(images)


def _finished(images: Tensor, view: View, key: Tensor, dtype: torch.dtype) -> Tensor:
    colours = [None if colour is None or colour.exact else colour for colour in view.colours]
    if not any(colours):
        return normalise(images, view.mean, view.std, dtype)
    keys = key.numpy().view(np.uint64)  # what is to be done is known on the host, so nothing waits to be told
    found = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    for colour, group in groupby(range(view.count), colours.__getitem__):
        crops = list(group)
        rows = slice(crops[0] * len(keys), (crops[-1] + 1) * len(keys))
        if colour is None:
            found[rows] = normalise(images[rows], view.mean, view.std, torch.float32)
            continue
        draws = draw_colours(colour, np.concatenate([view.crop_keys(keys, crop) for crop in crops]))
        _recoloured(images[rows], found[rows], ColourChanges(colour, draws), view)
    return found.to(dtype)


def _recoloured(images: Tensor, found: Tensor, changes: ColourChanges, view: View) -> None:
    """Change colours and normalise: [N, C, H, W] uint8 `images` into float32 `found`."""
    for rows in changes.parts(view.size, images.device):
        if rows[-1] - rows[0] == len(rows) - 1 and np.all(np.diff(rows) == 1):
            part = slice(rows[0], rows[-1] + 1)
            pixels = found[part].copy_(images[part])
            changes.apply(pixels, rows)
            _normalised(pixels, view.mean, view.std)
        else:
            pixels = torch.empty((len(rows), *found.shape[1:]), dtype=found.dtype)
            for place, row in enumerate(rows.tolist()):
                pixels[place].copy_(images[row])
            changes.apply(pixels, rows)
            _normalised(pixels, view.mean, view.std)
            for place, row in enumerate(rows.tolist()):
                found[row].copy_(pixels[place])
