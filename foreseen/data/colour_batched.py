"""Jitter, grey, blur and solarise for many crops at once, each with its own numbers, on the device that trains.

The same operations in the same order as `colour_pillow.py`, in float32 and without rounding in between; Pillow rounds
down after each of them, by half a level of 255 on average, and keeps a hue in 256 steps. How far apart the two are with
the same draws, in levels, over the pixels of photographs; tests/data/test_colour.py holds bounds for harder pictures:

    operation                                   mean    most    bound of the tests, mean and most
    brightness, contrast, saturation, each      0.5     1.2     0.6    1.3
    hue                                         0.4    10       1.3   20
    jitter of BEiT: the first three by 0.4      1.4     4       1.8    5
    grey; blur with a kernel size               0.25    0.5     0.3    0.6
    blur, Pillow's                              0.45    3       0.7    3.5
    solarise                                    0       0       0      0
    all of DINO's                               1.4    16       1.8   24

The hue turns as in HSV, exactly. Pillow's Gaussian is three box blurs, and so is ours, with the boxes' fractional width
(Gwosdek et al. 2011) and the edges repeated each time; torchvision's is a cut Gaussian with the edges mirrored.

Which crops an operation is for is known on the host, which therefore never waits for the device. On a CPU so few are
done at a time that they stay in its cache; nothing depends on how many.

Letters: N crops, H and W pixels.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from foreseen.config import Colour
from foreseen.data.colour_draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourDraws

_GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2, as Pillow's "L"
_BOXES = 3  # of Pillow's Gaussian
_CPU_BYTES, _DEVICE_BYTES = 1 << 20, 1 << 28  # of the crops that are changed at a time, as floats
_GROUPED_BYTES = 6 << 20  # of crops that it pays to sort on a CPU; below, there is more calling than computing

Operation = Callable[[Tensor, Tensor], Tensor | None]


class ColourChanges:
    """What is to be done to N crops.

    Args:
        colour: the settings.
        draws: of the crops, made by these settings.
    """

    def __init__(self, colour: Colour, draws: ColourDraws) -> None:
        self._draws = draws
        self._blur, self._solarise = colour.blur, colour.solarise
        if self._blur is not None:
            size = self._blur.kernel_size
            self._weights = _boxes(draws.radius) if size is None else _gaussians(draws.radius, size)

    def parts(self, size: tuple[int, int], device: torch.device) -> Iterator[NDArray[np.int64]]:
        """Which crops of a size are best changed at a time; every row once."""
        on_cpu = device.type == "cpu"
        crop_bytes = 12 * size[0] * size[1]
        most = max(1, (_CPU_BYTES if on_cpu else _DEVICE_BYTES) // crop_bytes)
        rows = np.arange(len(self._draws.order))
        groups = [rows]
        if on_cpu and most > 1 and len(rows) * crop_bytes > _GROUPED_BYTES:
            # Those with the same order of the jitter together: each operation then runs on the whole part.
            code = self._draws.order @ (5 ** np.arange(4))
            rows = np.argsort(code, kind="stable")
            groups = np.split(rows, np.flatnonzero(np.diff(code[rows])) + 1)
        return (group[start : start + most] for group in groups for start in range(0, len(group), most))

    def apply(self, pixels: Tensor, rows: NDArray[np.int64]) -> None:
        """Change some of the crops, in place.

        Args:
            pixels: [n, 3, H, W] float32, contiguous, in [0, 255].
            rows: which of the N crops they are, [n].
        """
        draws = self._draws[rows]
        for place in range(draws.order.shape[1]):
            for number in sorted({*draws.order[:, place].tolist()} & _JITTER.keys()):
                _change(pixels, draws.order[:, place] == number, _JITTER[number], draws.factors[:, number])
        _change(pixels, draws.grey, _lose_colour, draws.factors[:, 0])
        if self._blur is not None:
            filter_crops = _repeated_boxes if self._blur.kernel_size is None else _mirrored
            _change(pixels, draws.radius > 0, filter_crops, _shortened(self._weights[rows]))
        if self._solarise is not None:
            # Where 8 bits would round to the threshold.
            thresholds = np.full(len(pixels), self._solarise.threshold - 0.5, dtype=np.float32)
            _change(pixels, draws.solarised, _fold if self._solarise.threshold == 128 else _solarise, thresholds)


def _change(pixels: Tensor, chosen: NDArray[np.bool_], operation: Operation, numbers: NDArray[np.float32]) -> None:
    """Run an operation, which may work in place, on the chosen crops, each with its row of `numbers`."""
    rows = np.flatnonzero(chosen)
    if len(rows) == len(pixels):
        changed = operation(pixels, _per_crop(numbers, pixels.device))
        if changed is not None:
            pixels.copy_(changed)
    elif len(rows):
        places = torch.from_numpy(rows).to(pixels.device, non_blocking=True)
        some = pixels.index_select(0, places)
        changed = operation(some, _per_crop(numbers[rows], pixels.device))
        pixels.index_copy_(0, places, some if changed is None else changed)


def _per_crop(numbers: NDArray[np.float32], device: torch.device) -> Tensor:
    """[N] -> [N, 1, 1, 1]; [N, n] -> [n, N, 1, 1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(numbers.T)).to(device, non_blocking=True)[..., None, None, None]


def _brightness(pixels: Tensor, factor: Tensor) -> None:
    pixels.mul_(factor).clamp_(max=255)


def _contrast(pixels: Tensor, factor: Tensor) -> None:
    # Along one axis after the other, or the sum of a crop would depend on how many there are.
    red, green, blue = (pixels.sum(dim=3).sum(dim=2) / (pixels.shape[2] * pixels.shape[3])).unbind(dim=1)
    mean = (red * _GREY[0] + green * _GREY[1] + blue * _GREY[2]).view(-1, 1, 1, 1)
    pixels.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 255)


def _saturation(pixels: Tensor, factor: Tensor) -> None:
    grey = _grey(pixels)
    pixels.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 255)


def _grey(pixels: Tensor) -> Tensor:
    """[N, 3, H, W] -> [N, 1, H, W]."""
    red, green, blue = pixels.unsqueeze(2).unbind(dim=1)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2])


def _lose_colour(pixels: Tensor, _: Tensor) -> None:
    pixels.copy_(_grey(pixels))


def _hue(pixels: Tensor, share: Tensor) -> None:
    """Turn the hue: the largest and the smallest of the three channels stay what they are.

    On the circle of hues, red at 0 and six sextants long, a colour stands at ±(1 + (g + b - r - least) / chroma), on
    the side of the larger of green and blue: of the three channels one is the least, one the most, and only the third
    moves within a sextant.
    """
    red, green, blue = pixels.unbind(dim=1)
    most = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = most - least
    sextant = (green + blue).sub_(red).sub_(least)
    sextant.div_(chroma.clamp_min(1e-6)).add_(1.0)  # greys have no hue, and any will do
    sextant.copysign_(green - blue).add_(share[:, 0] * 6.0)
    sextant.add_((sextant / 6.0).floor_(), alpha=-6.0)
    torch.addcmul(least, chroma, _ramp(sextant, 3.0), out=red)
    torch.addcmul(most, chroma, _ramp(sextant, 2.0), value=-1.0, out=green)
    torch.addcmul(most, chroma, _ramp(sextant, 4.0), value=-1.0, out=blue)


def _ramp(sextant: Tensor, centre: float) -> Tensor:
    """0 within one sextant of the centre, 1 from two sextants on."""
    return (sextant - centre).abs_().sub_(1.0).clamp_(0.0, 1.0)


def _solarise(pixels: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(pixels >= threshold, 255.0 - pixels, pixels)


def _fold(pixels: Tensor, _: Tensor) -> Tensor:
    """Solarise in the middle of the values, where it needs no comparison."""
    return torch.minimum(pixels, 255.0 - pixels)


def _boxes(radius: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights of the box of each of Pillow's three blurs, from the centre outwards, [N] -> [N, n].

    Source: Pillow 13, src/libImaging/BoxBlur.c, after Gwosdek et al. 2011, equations 7, 11 and 14.
    """
    variance = radius.astype(np.float64) ** 2 / _BOXES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    whole, part = whole[:, None], part[:, None]
    places = np.arange(int(whole.max()) + 2)
    weights = np.where(places <= whole, 1.0, np.where(places == whole + 1, part, 0.0))
    weights /= 2 * (whole + part) + 1
    return np.asarray(weights, dtype=np.float32)


def _gaussians(radius: NDArray[np.float32], kernel_size: int) -> NDArray[np.float32]:
    """Weights of torchvision's kernel, from the centre outwards, [N] -> [N, n]."""
    places = np.arange(kernel_size // 2 + 1)
    weights = np.exp(-0.5 * (places / np.maximum(radius, 1e-3)[:, None].astype(np.float64)) ** 2)
    return np.asarray(weights / (2 * weights.sum(axis=1, keepdims=True) - 1), dtype=np.float32)


def _shortened(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Without the outermost places that no crop has a weight for."""
    used = np.flatnonzero((weights > 0).any(axis=0))
    return weights[:, : int(used[-1]) + 1]


def _repeated_boxes(pixels: Tensor, weights: Tensor) -> Tensor:
    for dim in (3, 2):
        for _ in range(_BOXES):
            pixels = _filter(pixels, weights, dim, "replicate")
    return pixels


def _mirrored(pixels: Tensor, weights: Tensor) -> Tensor:
    return _filter(_filter(pixels, weights, 3, "reflect"), weights, 2, "reflect")


def _filter(pixels: Tensor, weights: Tensor, dim: int, edges: str) -> Tensor:
    """Filter along one axis with symmetric kernels, by adding shifted crops: on a CPU faster than a convolution.

    Args:
        pixels: [N, 3, H, W].
        weights: from the centre outwards, [n, N, 1, 1, 1].
        dim: 2 or 3.
        edges: how `F.pad` goes on beyond them.
    """
    reach, length = len(weights) - 1, pixels.shape[dim]
    wide = F.pad(pixels, (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach), mode=edges)
    found = pixels * weights[0]
    for place in range(1, reach + 1):
        pair = wide.narrow(dim, reach - place, length) + wide.narrow(dim, reach + place, length)
        found.addcmul_(pair, weights[place])
    return found


_JITTER = {BRIGHTNESS: _brightness, CONTRAST: _contrast, SATURATION: _saturation, HUE: _hue}
