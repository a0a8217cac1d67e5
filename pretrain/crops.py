"""The large and small crops that self-distillation compares."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from foreseen.config import Section
from foreseen.config import Views as ViewOptions
from foreseen.data.batch import Batch
from foreseen.data.views import View
from foreseen.device_keys import subkey


class SmallCrops(Section):
    """Crops of a small part of the image, which the student alone sees; `views` sets the large ones."""

    count: int = Field(8, ge=0)
    """Of each image; 0 for none."""
    size: tuple[int, int] = (96, 96)
    """(height, width) in pixels."""
    scale: tuple[float, float] = (0.05, 0.4)
    """Smallest and largest share of the image's area that one covers."""

    @field_validator("size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _ordered(self) -> "SmallCrops":
        if min(self.size) < 1:
            raise ValueError(f"method.local.size must be positive, got {self.size}")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"method.local.scale must be two rising shares in (0, 1], got {self.scale}")
        return self


def crop_views(
    options: ViewOptions, small: SmallCrops, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[View, ...], tuple[View, ...]]:
    """The views of two large crops, and of the small ones.

    Args:
        options: the config's `views`; its own mean and std win.
        small: of the method.
        mean, std: of the encoder.
    """
    common: dict[str, Any] = {
        "ratio": options.ratio, "interpolation": options.interpolation, "flip": options.flip,
        "mean": options.mean or mean, "std": options.std or std,
    }  # fmt: skip
    large = View("global", options.size, scale=options.scale, count=2, **common)
    if not small.count:
        return (large,), ()
    return (large,), (View("local", small.size, scale=small.scale, count=small.count, **common),)


def count_crops(views: Sequence[View]) -> int:
    """Crops of each image in some views."""
    return sum(view.count for view in views)


def crops_by_size(batch: Batch, views: Sequence[View]) -> list[tuple[Tensor, Tensor]]:
    """The crops of some views, those of one size that follow each other in one tensor, and a key for each crop.

    Returns:
        Pairs of images [n * B, C, H, W], crop-major, and keys [n * B].
    """
    pairs = []
    for _, same in groupby(views, key=lambda view: view.size):
        group = list(same)
        images = [batch.images[view.name] for view in group]
        keys = [subkey(batch.key, f"{view.name}/{crop}") for view in group for crop in range(view.count)]
        pairs.append((images[0] if len(images) == 1 else torch.cat(images), torch.cat(keys)))
    return pairs


def by_crop(rows: Tensor, crops: int) -> Tensor:
    """Rows that stand crop-major, apart by crop: [n * B, ...] -> [n, B, ...]."""
    return rows.reshape(crops, -1, *rows.shape[1:])
