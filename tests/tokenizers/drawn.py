"""Pictures and tokenizers made for a test: what is known of them beforehand can be asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.views import Request
from foreseen.tokenizers.looking import Cut
from foreseen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class DrawnPictures:
    """The pictures themselves, [N, 3, H, W] uint8, as if they had been read and cut."""

    images: Tensor
    place: str = "drawn"
    address: str = "drawn"
    split: str = "train"
    fingerprint: str = "of the drawn"
    labels_fingerprint: str | None = None
    source: str | None = None
    licence: str | None = None

    def __len__(self) -> int:
        return len(self.images)


class DrawnFeed:
    """Hands them out in their order, again and again."""

    order_name, notes = "drawn", ()

    def __init__(self, shards: DrawnPictures) -> None:
        self.shards, self.num_samples = shards, len(shards)

    def feed(self, layout: BatchLayout, rank: int, subset: NDArray[np.int64] | None) -> "DrawnFeed":
        self._size = layout.micro_size
        return self

    def example(self) -> Batch:
        raise NotImplementedError

    def batches(self, first_step: int, total_steps: int, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
        for step in range(first_step, total_steps):
            rows = torch.arange(step * self._size, (step + 1) * self._size) % len(self.shards)
            yield Batch(position=rows, key=rows, sample=rows, images={"image": self.shards.images[rows]}, draws={})


def cut_of_images(images: Tensor) -> Cut:
    """A cut that gives exactly these pictures."""
    feed = DrawnFeed(DrawnPictures(images))

    def cut(request: Request) -> DrawnFeed:
        return feed

    return cut


class GreyLevels(Tokenizer):
    """The code of a 4×4 patch is its brightness in steps of `step`, so that pictures can be made for any codes."""

    kind = "grey_levels"
    has_decoder = True

    def __init__(self, codebook_size: int = 256, step: int = 1) -> None:
        super().__init__()
        self.codebook_size, self.step = codebook_size, step
        self.input_size, self.stride = (8, 8), (4, 4)
        self.mean, self.std = (0.5,) * 3, (0.5,) * 3

    def arguments(self) -> dict[str, Any]:
        return {"codebook_size": self.codebook_size, "step": self.step}

    def encode(self, images: Tensor) -> Tensor:
        levels = torch.nn.functional.avg_pool2d((images * 0.5 + 0.5) * 255, 4).mean(1)
        return (levels.round() / self.step).long()

    def decode(self, codes: Tensor) -> Tensor:
        pixels = (codes * self.step / 255).float()[:, None].expand(-1, 3, -1, -1)
        return pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)


def grey_pictures(codes: Tensor) -> Tensor:
    """Pictures of patches of these grey levels, [B, h, w] -> [B, 3, 4h, 4w] uint8."""
    return codes.to(torch.uint8)[:, None].repeat(1, 3, 1, 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
