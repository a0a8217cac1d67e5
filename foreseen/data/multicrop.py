"""Multi-crop: a few large crops and many small ones of each picture (Caron et al. 2020, arXiv:2006.09882, section 3.2).

The large, global, crops are those of the config's `views` section, so a size stands in one place; what `MultiCrop` adds
is how many there are, the small, local, ones, and the colours of both. The batch holds the crops of one size in one
tensor, crop-major, so that a network sees them in one forward: "global" [G * B, 3, H, W] and "local" [L * B, 3, h, w].
"""

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from foreseen.config import Blur, Colour, Jitter, Section, Solarise, Views
from foreseen.data.views import View
from foreseen.errors import BadInput

GLOBAL, LOCAL = "global", "local"


class MultiCrop(Section):
    """Crops of self-distillation; the defaults are DINO's."""

    global_count: int = Field(2, ge=1)
    """Crops of `views.size` and `views.scale`, G; the teacher sees these alone."""
    local_count: int = Field(8, ge=0)
    """Small crops, L; 0 for none, with which DINO takes a `views.scale` of [0.14, 1]."""
    local_size: tuple[int, int] = (96, 96)
    """(height, width) of the small crops, in pixels."""
    local_scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest share of the image's area that a small crop covers."""
    colours: Literal["dino", "dinov2", "byol"] | None = "dino"
    """Whose jitter, grey, blur and solarise; null takes `views.colour` for every crop. Only the blur differs."""
    exact: bool = False
    """Run these colours' own operations on 8-bit pixels in the loader processes; see `views.colour.exact`."""

    @field_validator("local_size", mode="before")
    @classmethod
    def _square(cls, value: object) -> object:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if min(self.local_size) < 1:
            raise ValueError(f"method.crops.local_size must be positive, got {self.local_size}")
        if not 0 < self.local_scale[0] <= self.local_scale[1] <= 1:
            raise ValueError(f"method.crops.local_scale must be two rising shares in (0, 1], got {self.local_scale}")
        return self


def multicrop_views(
    options: MultiCrop, views: Views, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[View, ...]:  # fmt: skip
    """The views "global" and, if there are small crops, "local".

    Args:
        options: the crops.
        views: the config's section, for the large crops and for what all share: ratio, interpolation, flip; its own
            mean and std win.
        mean, std: of the encoder, where the section leaves them out.

    Raises:
        BadInput: the colours are given twice, a blur does not fit a crop, or the section asks for another crop.
    """
    if views.simple_crop:
        raise BadInput("views.simple_crop true is not done by the crops of self-distillation; set it to false")
    if options.colours is not None and views.colour is not None:
        raise BadInput(
            f"views.colour is given besides the colours of {options.colours} for the crops; set "
            "method.crops.colours=null to use it, or views.colour=null"
        )
    global_colours: tuple[Colour | None, ...] = (views.colour,) * options.global_count
    local_colour = views.colour
    if options.colours is not None:
        global_colours, local_colour = papers_crop_colours(options.colours, options.global_count, exact=options.exact)
    large = View(
        name=GLOBAL, size=views.size, scale=views.scale, ratio=views.ratio, interpolation=views.interpolation,
        flip=views.flip, count=options.global_count, colour=global_colours,
        mean=views.mean or mean, std=views.std or std,
    )  # fmt: skip
    if options.local_count == 0:
        return (large,)
    small = View(
        name=LOCAL, size=options.local_size, scale=options.local_scale, ratio=views.ratio,
        interpolation=views.interpolation, flip=views.flip, count=options.local_count, colour=local_colour,
        mean=large.mean, std=large.std,
    )  # fmt: skip
    return (large, small)


def papers_crop_colours(
    paper: Literal["dino", "dinov2", "byol"], global_count: int, *, exact: bool = False
) -> tuple[tuple[Colour, ...], Colour]:
    """The colours of each large crop, and of the small ones.

    In DINO and BYOL the first large crop is always blurred and the others seldom. DINOv2's code asks for the same, but
    hands torchvision's RandomApply the probability that a crop is left alone: as it runs, the first is never blurred
    and the others nearly always. That is what is done here. In all three the others may be solarised.

    Source: facebookresearch/dino at 7c446df, main_dino.py (Pillow's blur); facebookresearch/dinov2 at
        05c66df, dinov2/data/augmentations.py and transforms.py (a kernel of 9); Grill et al. 2020, arXiv:2006.07733,
        appendix B (a kernel of 23).
    """
    kernel_size, first, others = {"dino": (None, 1.0, 0.1), "dinov2": (9, 0.0, 0.9), "byol": (23, 1.0, 0.1)}[paper]

    def colours(blur: float, solarise: float) -> Colour:
        return Colour(
            jitter=Jitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, probability=0.8),
            grey=0.2,
            blur=Blur(probability=blur, radius=(0.1, 2.0), kernel_size=kernel_size),
            solarise=Solarise(probability=solarise) if solarise else None,
            exact=exact,
        )

    return (colours(first, 0.0), *[colours(others, 0.2)] * (global_count - 1)), colours(0.5, 0.0)
