"""What fine-tuning does to single images: RandAugment or 3-Augment in the worker, random erasing on the device.

Cubuk et al. 2020, arXiv:1909.13719, and Zhong et al. 2020, arXiv:1708.04896, both in the form of timm, with which the
papers' recipes were run; Touvron et al. 2022, arXiv:2204.07118.
"""

import math
import random
import re
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from timm.data.auto_augment import posterize, rand_augment_transform
from torch import Tensor
from torchvision.transforms import ColorJitter

from foreseen.device_keys import keyed_uniform
from foreseen.errors import BadInput

# timm passes over what it does not know; a misspelt part would be another recipe than the one written.
_NOTATION = re.compile(r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|t(weights|3aw?)))*")
_BLUR_RADIUS = (0.1, 2.0)  # pixels
_ERASE_ATTEMPTS = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 1 / 0.3)


class RandAugment:
    """timm's RandAugment on a crop; a `View.transform`, whose library generators the worker seeds from the key.

    Args:
        notation: timm's, such as `rand-m9-mstd0.5-inc1`.
        size: (H, W) of the crop in pixels; translations reach 45 % of the shorter side.
        mean: channel means in [0, 1]; what moves in from outside has this colour.
        interpolation: "bicubic" or "bilinear".

    Raises:
        BadInput: timm does not understand the notation.
    """

    def __init__(self, notation: str, size: tuple[int, int], mean: tuple[float, ...], interpolation: str) -> None:
        if not _NOTATION.fullmatch(notation):
            raise BadInput(f"views.rand_augment {notation!r} is not timm's notation, such as rand-m9-mstd0.5-inc1")
        options = {
            "translate_const": int(min(size) * 0.45),
            "img_mean": tuple(min(255, round(255 * channel)) for channel in mean),
            "interpolation": Image.Resampling[interpolation.upper()],
        }
        self._transform = rand_augment_transform(notation, options)
        for operation in self._transform.ops:
            if operation.aug_fn is posterize:
                operation.aug_fn = _posterize

    def __call__(self, crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Augment one crop: [H, W, 3] -> [H, W, 3]."""
        return np.array(self._transform(Image.fromarray(crop)), dtype=np.uint8)


class ThreeAugment:
    """DeiT III's 3-Augment on a crop; a `View.transform`, as RandAugment is.

    One of grey, solarise and Gaussian blur is always applied; then brightness, contrast and saturation are jittered.

    Args:
        jitter: the factors lie in [1 - this, 1 + this].

    Source: Touvron et al. 2022, section 3.2; facebookresearch/deit at 7e160fe, augment.py.
    """

    def __init__(self, jitter: float) -> None:
        self._jitter = ColorJitter(jitter, jitter, jitter)

    def __call__(self, crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Augment one crop: [H, W, 3] -> [H, W, 3]."""
        image = random.choice((_grey, ImageOps.solarize, _blur))(Image.fromarray(crop))
        return np.array(self._jitter(image), dtype=np.uint8)


def _grey(image: Image.Image) -> Image.Image:
    return image.convert("L").convert("RGB")


def _blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*_BLUR_RADIUS)))


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's, but black where the strongest magnitudes keep no bit: since Pillow 13 that is an error."""
    if bits < 1:
        return Image.new(image.mode, image.size)
    return posterize(image, bits, **options)  # type: ignore[no-any-return,no-untyped-call]


class EraseBox:
    """Draws the box that random erasing fills; the function of a `Draw`.

    Args:
        probability: share of the images that lose a box.
        size: (H, W) in pixels.
    """

    def __init__(self, probability: float, size: tuple[int, int]) -> None:
        self.probability = probability
        self.size = size

    def __call__(self, rng: np.random.Generator, position: int) -> NDArray[np.int64]:
        """One box as (top, bottom, left, right) in pixels, [4]; all 0 for none."""
        height, width = self.size
        if rng.random() < self.probability:
            for _ in range(_ERASE_ATTEMPTS):
                area = rng.uniform(*_ERASE_AREA) * height * width
                ratio = math.exp(rng.uniform(*np.log(_ERASE_RATIO)))
                h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
                if h < height and w < width:
                    top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
                    return np.array([top, top + h, left, left + w], dtype=np.int64)
        return np.zeros(4, dtype=np.int64)


def scale_boxes(boxes: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same boxes of images of another size, rounded to whole pixels.

    Args:
        boxes: (top, bottom, left, right) in pixels, [B, 4]; one that was empty stays so.
        old, new: (H, W) in pixels.
    """
    factors = torch.cat([boxes.new_full((2,), side, dtype=torch.float64) for side in _ratios(old, new)])
    return (boxes * factors).round()


def _ratios(old: tuple[int, int], new: tuple[int, int]) -> tuple[float, float]:
    return new[0] / old[0], new[1] / old[1]


def inside_boxes(boxes: Tensor, height: int, width: int) -> Tensor:
    """Where boxes (top, bottom, left, right) lie: [B, 4] -> boolean [B, 1, H, W]."""
    top, bottom, left, right = (side.view(-1, 1, 1, 1) for side in boxes.unbind(1))
    rows = torch.arange(height, device=boxes.device).view(1, 1, -1, 1)
    columns = torch.arange(width, device=boxes.device).view(1, 1, 1, -1)
    return (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)


def erase(images: Tensor, boxes: Tensor, key: Tensor) -> Tensor:
    """Fill a box of each image with normal noise, pixel by pixel.

    Args:
        images: normalised, [B, C, H, W].
        boxes: of `EraseBox`, [B, 4].
        key: of each image, [B] int64.

    Returns:
        [B, C, H, W].
    """
    _, channels, height, width = images.shape
    u = keyed_uniform(key, "erase", channels * height * width)
    # 2u - 1 moved to the middle of its step of 2**-23: never ±1, and exact in float32.
    noise = math.sqrt(2.0) * torch.erfinv(2.0 * u - (1.0 - 2.0**-24))
    return torch.where(inside_boxes(boxes, height, width), noise.view_as(images).to(images.dtype), images)
