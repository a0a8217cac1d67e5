"""What a visual tokenizer is: images to codes, and codes to images where there is a decoder.

Masked image modelling asks for nothing else: BEiT takes whatever is a Tokenizer.

Letters: B images, H and W pixels, h and w codes, K codes in the codebook.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from foreseen.data.views import View
from foreseen.errors import BadInput


class Tokenizer(nn.Module, ABC):
    """Base of every tokenizer; `foreseen.tokenizers.kinds` lists them.

    Attributes:
        kind: its name in `kinds` and in a folder's config.json.
        codebook_size: codes are in [0, K).
        input_size: (H, W) in pixels that it was made at.
        stride: (height, width) in pixels of what one code stands for.
        mean, std: per channel, what its images are normalised by, for pixels in [0, 1].
        interpolation: how a picture is brought to its size.
        has_decoder: whether `decode` makes pixels of codes.
    """

    kind: ClassVar[str]
    codebook_size: int
    input_size: tuple[int, int]
    stride: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic"
    has_decoder: bool = False

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Plain values that make it again, but for its weights: `type(self)(**arguments)`."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Codes of normalised images, [B, 3, H, W] -> [B, h, w] int64; in float32 at least, without gradient."""

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels of codes, [B, h, w] -> [B, 3, H, W] in [0, 1]."""
        raise TypeError(f"a tokenizer of kind {self.kind} has no decoder")

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes of an input of `size` pixels.

        Raises:
            BadInput: the stride does not divide it.
        """
        if size[0] % self.stride[0] or size[1] % self.stride[1]:
            code = f"{self.stride[0]}×{self.stride[1]}"
            raise BadInput(
                f"a tokenizer with a code for each {code} px takes no {size[0]}×{size[1]} px: no multiple of that"
            )
        return size[0] // self.stride[0], size[1] // self.stride[1]

    def input_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The input (H, W) in pixels that has such a grid of codes.

        Raises:
            BadInput: there is none; a tokenizer that is tied to its input size overrides this.
        """
        return grid[0] * self.stride[0], grid[1] * self.stride[1]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1] as `encode` wants them, [B, 3, H, W] -> [B, 3, H, W]."""
        mean, std = (pixels.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def centre_view(self, size: tuple[int, int] | None = None) -> View:
        """The middle of a picture, named "image", as the tokenizer wants it, for measuring it."""
        return View(
            name="image", size=size or self.input_size, crop="centre", flip=0.0, mean=self.mean, std=self.std,
            interpolation=self.interpolation,
        )  # fmt: skip


def usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """How a codebook is used, from how often each code came, [K] -> (share of codes used, perplexity).

    The perplexity is exp of the entropy: the number of equally frequent codes that would be as hard to guess.
    """
    share = counts / counts.sum().clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum()
    return (counts > 0).to(share.dtype).mean(), entropy.exp()
