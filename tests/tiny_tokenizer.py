"""A tokenizer of a few numbers for tests of what asks a tokenizer: codes are signs of random projections of a patch."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foreseen.tokenizers.folder import save_tokenizer
from foreseen.tokenizers.kinds import KINDS
from foreseen.tokenizers.tokenizer import Tokenizer


class TinyTokenizer(Tokenizer):
    """Each patch has a code of 4 bits, the signs of four random directions."""

    kind = "tiny"
    codebook_size = 16
    has_decoder = True

    def __init__(
        self,
        stride: int = 4,
        size: tuple[int, int] = (16, 16),
        mean: float = 0.5,
        interpolation: Any = "bicubic",
        fixed: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._arguments = {
            "stride": stride, "size": list(size), "mean": mean, "interpolation": interpolation, "fixed": fixed,
            "seed": seed,
        }  # fmt: skip
        self.stride, self.input_size, self.interpolation = (stride, stride), (size[0], size[1]), interpolation
        self.mean, self.std = (mean,) * 3, (0.5,) * 3
        self.fixed = fixed
        directions = torch.randn(4, 3, stride, stride, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        self.directions: Tensor
        self.register_buffer("directions", directions)

    def arguments(self) -> dict[str, Any]:
        return self._arguments

    def input_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        return self.input_size if self.fixed else super().input_for(grid)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        bits = F.conv2d(images, self.directions.to(images.dtype), stride=self.stride) > 0
        return (bits * torch.tensor([1, 2, 4, 8], device=images.device).view(-1, 1, 1)).sum(1)

    def decode(self, codes: Tensor) -> Tensor:
        grey = codes[:, None] / (self.codebook_size - 1)
        return F.interpolate(grey, scale_factor=self.stride[0]).expand(-1, 3, -1, -1)


KINDS.setdefault(TinyTokenizer.kind, TinyTokenizer)


def tiny_tokenizer(folder: Path, **arguments: Any) -> Path:
    """A folder that holds a tiny tokenizer."""
    save_tokenizer(TinyTokenizer(**arguments), folder, lineage={})
    return folder
