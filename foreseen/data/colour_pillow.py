"""Jitter, grey, blur and solarise by the papers' own operations: Pillow's, on 8-bit pixels, one crop at a time.

What torchvision's v1 transforms do to a PIL image, as DINO (facebookresearch/dino at 7c446df, main_dino.py), BYOL's and
BEiT's reimplementations use them; only the random numbers are our keys'. Every operation rounds down to 8 bits.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from foreseen.config import Colour
from foreseen.data.colour_draws import BRIGHTNESS, CONTRAST, HUE, SATURATION, ColourDraws

_ENHANCERS = {
    BRIGHTNESS: ImageEnhance.Brightness,
    CONTRAST: ImageEnhance.Contrast,
    SATURATION: ImageEnhance.Color,
}


def papers_colours(pixels: NDArray[np.uint8], draws: ColourDraws, row: int, colour: Colour) -> NDArray[np.uint8]:
    """Change the colours of one crop.

    Args:
        pixels: [H, W, 3].
        draws: of the batch.
        row: whose of them apply.
        colour: as they were drawn for.
    """
    image = Image.fromarray(pixels)
    for operation in draws.order[row].tolist():
        factor = float(draws.factors[row, operation])
        if operation == HUE:
            image = _turn_hue(image, factor)
        elif operation in _ENHANCERS:
            image = _ENHANCERS[operation](image).enhance(factor)
    if draws.grey[row]:
        image = image.convert("L").convert("RGB")
    if (blur := colour.blur) is not None and (radius := float(draws.radius[row])) > 0:
        image = _blur(image, radius, blur.kernel_size)
    if (solarise := colour.solarise) is not None and draws.solarised[row]:
        image = ImageOps.solarize(image, solarise.threshold)
    return np.array(image)


def _turn_hue(image: Image.Image, share: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.asarray(hue) + np.uint8(int(share * 255) % 256)  # 8 bits that wrap
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def _blur(image: Image.Image, radius: float, kernel_size: int | None) -> Image.Image:
    if kernel_size is None:
        return image.filter(ImageFilter.GaussianBlur(radius))
    from torchvision.transforms.functional import gaussian_blur

    blurred: Image.Image = gaussian_blur(image, [kernel_size, kernel_size], [radius, radius])
    return blurred
