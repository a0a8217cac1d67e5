"""Finite scalar quantisation: each place gets a few bounded numbers, each is rounded to one of its levels.

Mentzer et al. 2023, Finite Scalar Quantization: VQ-VAE Made Simple, arXiv:2309.15505, appendix A.1. The codes are all
combinations of levels, so there is no codebook to learn or to collapse. Encoder, decoder and likelihood are those of
the discrete VAE (`dvae.py`); the paper's is another.

Letters: B images, d numbers per place, K = product of their levels, H and W pixels, h and w codes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from foreseen.config import Config, MethodOptions
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.tokenizers.dvae_networks import Decoder, Encoder, NetworkOptions
from foreseen.tokenizers.logit_laplace import MEAN, STD, negative_log_likelihood, pixels_of
from foreseen.tokenizers.reconstruction import ReconstructionObjective, mapped_view
from foreseen.tokenizers.tokenizer import Tokenizer

_MARGIN = 1e-3  # the paper's: the outermost levels are reached by finite numbers


class Levels(nn.Module):
    """The rounding, and the numbering of codes. It has no weights.

    Args:
        levels: of each number, at least 2 each; [8, 5, 5, 5] makes 1000 codes.

    Raises:
        BadInput: fewer.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2 or math.prod(levels) > 1 << 24:
            raise BadInput(
                f"method.levels {list(levels)}: each must be at least 2, and their product at most 16,777,216; "
                "[8, 5, 5, 5] makes 1000 codes"
            )
        self.levels = tuple(levels)
        self.codebook_size = math.prod(levels)
        half = [(level - 1) * (1 - _MARGIN) / 2 for level in levels]
        offset = [0.5 * (level % 2 == 0) for level in levels]
        # Buffers, though no weights: made at every step they would be sent to the device, which waits for that.
        made: dict[str, Sequence[float]] = {
            "_half": half,
            "_offset": offset,
            "_shift": [math.tan(o / h) for o, h in zip(offset, half, strict=True)],
            "_widths": [level // 2 for level in levels],
            "_counts": list(levels),
            "_bases": [math.prod(levels[:place]) for place in range(len(levels))],
        }
        for name, values in made.items():
            dtype = torch.int64 if isinstance(values[0], int) else torch.float64
            self.register_buffer(name, torch.tensor(values, dtype=dtype).view(-1, 1, 1), persistent=False)
        self._half: Tensor
        self._offset: Tensor
        self._shift: Tensor
        self._widths: Tensor
        self._counts: Tensor
        self._bases: Tensor

    def bound(self, z: Tensor) -> Tensor:
        """Squeeze numbers to where they round to their levels, [B, d, h, w] -> [B, d, h, w].

        An odd number of levels lies evenly about 0, from -(L-1)/2; an even one from -L/2 to L/2 - 1, so its tanh is
        shifted by half a level.
        """
        half, offset, shift = (one.to(z.dtype) for one in (self._half, self._offset, self._shift))
        return (z + shift).tanh() * half - offset

    def quantise(self, z: Tensor) -> Tensor:
        """Round numbers to their levels, as if rounding had the gradient 1; scaled to [-1, 1], [B, d, h, w]."""
        bounded = self.bound(z)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / self._widths.to(z.dtype)

    def codes(self, quantised: Tensor) -> Tensor:
        """The number of each place's combination, [B, d, h, w] -> [B, h, w] int64 in [0, K)."""
        digits = (quantised * self._widths.to(quantised.dtype)).round().long() + self._widths
        return (digits * self._bases).sum(dim=1)

    def combinations(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `codes`, [B, h, w] -> [B, d, h, w]."""
        digits = codes[:, None].div(self._bases, rounding_mode="floor") % self._counts
        return (digits - self._widths).to(dtype) / self._widths.to(dtype)


class FSQ(Tokenizer):
    """Encoder, rounding and decoder.

    Args:
        levels: of each of a place's numbers; the codebook has their product.
        input_size: (H, W) in pixels that it is trained at; any multiple of the stride is taken.
        network: sizes of encoder and decoder, as `NetworkOptions` has them.
        interpolation: how a picture is brought to its size.
    """

    kind = "fsq"
    mean, std = MEAN, STD
    has_decoder = True

    def __init__(
        self,
        levels: Sequence[int] = (8, 5, 5, 5),
        input_size: Sequence[int] = (128, 128),
        network: Mapping[str, Any] | None = None,
        interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic",
    ) -> None:
        super().__init__()
        self.network = NetworkOptions(**network or {})
        self.levels = Levels(levels)
        self.codebook_size = self.levels.codebook_size
        self.input_size = (input_size[0], input_size[1])
        self.stride = (self.network.stride, self.network.stride)
        self.interpolation = interpolation
        self.grid(self.input_size)
        self.encoder = Encoder(self.network, len(levels))
        self.decoder = Decoder(self.network, len(levels))

    def arguments(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {
            "levels": list(self.levels.levels),
            "input_size": list(self.input_size),
            "network": self.network.model_dump(),
            "interpolation": self.interpolation,
        }

    def quantised(self, images: Tensor) -> Tensor:
        """What the decoder gets of normalised images, [B, 3, H, W] -> [B, d, h, w] in float32 at least."""
        self.grid((images.shape[2], images.shape[3]))
        return self.levels.quantise(self.encoder(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See Tokenizer."""
        with torch.autocast(images.device.type, enabled=False):
            return self.levels.codes(self.quantised(images.to(self._dtype)))

    def decode(self, codes: Tensor) -> Tensor:
        """See Tokenizer."""
        return pixels_of(self.decoder(self.levels.combinations(codes, self._dtype)))

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype


class FSQOptions(MethodOptions):
    """Options of `method.name: fsq`."""

    has_backbone = False
    name: Literal["fsq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)
    """Of each number of a place. The paper's, by codes: [8, 6, 5] 240, [8, 8, 8] 512, [8, 5, 5, 5] 1000,
    [7, 5, 5, 5, 5] 4375, [8, 8, 8, 6, 5] 15,360."""
    network: NetworkOptions = NetworkOptions()

    @model_validator(mode="after")
    def _levels_are_some(self) -> "FSQOptions":
        Levels(self.levels)
        return self


class FSQObjective(ReconstructionObjective):
    """The likelihood of pixels given rounded numbers; nothing else is needed.

    Args:
        tokenizer: to train.
        view: what it sees of each picture.
    """

    tokenizer: FSQ

    @classmethod
    def build(cls, config: Config) -> "FSQObjective":
        """The objective that a recipe trains, with weights drawn from the global generator."""
        options = config.method
        assert isinstance(options, FSQOptions)
        tokenizer = FSQ(options.levels, config.views.size, options.network.model_dump(), config.views.interpolation)
        return cls(tokenizer, mapped_view(config, tokenizer))

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The mean negative log likelihood of a value."""
        images = batch.images["image"]
        quantised = self.tokenizer.quantised(images)
        self.counts.add(self.tokenizer.levels.codes(quantised.detach()))
        return {"loss": negative_log_likelihood(images, self.tokenizer.decoder(quantised)).mean()}
