"""Mixup and CutMix of neighbours in the stream: positions 2k and 2k + 1 are mixed with each other.

Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899; the choice between them and the box are
timm's (`timm.data.mixup`, mode "pair"). Which images meet does not depend on how a batch is split.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from foreseen.finetune.augment import inside_boxes, scale_boxes


class PairMix:
    """Draws how a pair is mixed; the function of a `Draw` with `group=2`.

    Args:
        mixup: alpha of mixup's Beta distribution; 0 switches it off.
        cutmix: alpha of CutMix's; 0 switches it off.
        probability: share of the pairs that are mixed at all.
        switch: share of those that get CutMix, if both are on.
        size: (H, W) in pixels.
    """

    def __init__(
        self, *, mixup: float, cutmix: float, probability: float, switch: float, size: tuple[int, int]
    ) -> None:
        self.mixup = mixup
        self.cutmix = cutmix
        self.probability = probability
        self.switch = switch if mixup > 0 and cutmix > 0 else float(cutmix > 0)
        self.size = size

    def __call__(self, rng: np.random.Generator, position: int) -> NDArray[np.float64]:
        """The share of an image's own label, and the box (top, bottom, left, right) that its partner fills, [5].

        The box is empty for mixup, whose pixels are mixed by that share.
        """
        if rng.random() >= self.probability:
            return np.array([1.0, 0, 0, 0, 0])
        if rng.random() >= self.switch:
            return np.array([rng.beta(self.mixup, self.mixup), 0, 0, 0, 0])
        box = self._box(rng, rng.beta(self.cutmix, self.cutmix))
        top, bottom, left, right = box
        share = 1.0 - (bottom - top) * (right - left) / (self.size[0] * self.size[1])
        return np.array([share, *box])

    def _box(self, rng: np.random.Generator, share: float) -> tuple[int, int, int, int]:
        # Centred anywhere and cut off at the border, which is why the share is corrected.
        (height, width), side = self.size, math.sqrt(1.0 - share)
        h, w = int(height * side), int(width * side)
        y, x = int(rng.integers(height)), int(rng.integers(width))
        return (
            max(0, y - h // 2), min(height, y + (h + 1) // 2),
            max(0, x - w // 2), min(width, x + (w + 1) // 2),
        )  # fmt: skip


def partner(rows: Tensor) -> Tensor:
    """The other one of each pair: [B, ...] -> [B, ...], B even."""
    return rows.view(-1, 2, *rows.shape[1:]).flip(1).view(rows.shape)


def mix(images: Tensor, draws: Tensor) -> Tensor:
    """Mix each image with its partner.

    Args:
        images: [B, C, H, W], B even.
        draws: of `PairMix`, [B, 5], equal within a pair.

    Returns:
        [B, C, H, W].
    """
    share, boxes = draws[:, 0].view(-1, 1, 1, 1), draws[:, 1:]
    is_cut = (boxes[:, 1] > boxes[:, 0]).view(-1, 1, 1, 1) & (boxes[:, 3] > boxes[:, 2]).view(-1, 1, 1, 1)
    outside = ~inside_boxes(boxes, *images.shape[-2:])
    own = torch.where(is_cut, outside.to(share.dtype), share).to(images.dtype)
    return torch.lerp(partner(images), images, own)


def scale_mixing(draws: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """The same draws for images of another size, (H, W) in pixels: [B, 5] -> [B, 5]. The share stays the labels'."""
    return torch.cat([draws[:, :1], scale_boxes(draws[:, 1:], old, new)], dim=1)


def soft_targets(labels: Tensor, draws: Tensor | None, num_classes: int, smoothing: float) -> Tensor:
    """The class probabilities that an image should get.

    Args:
        labels: [B] int64.
        draws: of `PairMix`, [B, 5]; None where nothing is mixed.
        num_classes: K.
        smoothing: s; an unmixed label is 1 - s + s / K, the others s / K.

    Returns:
        [B, K] in float64, rows of sum 1.
    """
    hard = F.one_hot(labels, num_classes).to(torch.float64)
    smooth = hard * (1.0 - smoothing) + smoothing / num_classes
    if draws is None:
        return smooth
    return torch.lerp(partner(smooth), smooth, draws[:, :1].to(torch.float64))
