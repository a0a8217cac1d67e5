"""The encoder and the decoder of DALL·E's discrete VAE, at any width, depth and number of groups.

Ramesh et al. 2021, arXiv:2102.12092, appendix A; names of weights, gains, pooling and initial weights are those of
openai/DALL-E at 5be4b23, dall_e/encoder.py and decoder.py, whose numbers these reproduce.

Letters: G groups, N blocks in each, F channels of the first group; group g has F·2^(g-1).
"""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreseen.config import Section
from foreseen.engine.objective import all_reduce_sum

_LATEST_SHARE = 0.1  # of a step in the running statistics
_EPS = 1e-5


class NetworkOptions(Section):
    """The size of encoder and decoder; the defaults are DALL·E's."""

    groups: int = Field(4, ge=2, le=7)
    """Groups of blocks; each but the last halves the sides, so a code stands for 2^(groups - 1) px: 4 for 8 px."""
    blocks: int = Field(2, ge=1, le=64)
    """Residual blocks in a group."""
    width: int = Field(256, ge=4, le=8192, multiple_of=4)
    """Channels of the encoder's first and the decoder's last group; they double from group to group."""
    decoder_input: int = Field(128, ge=1, le=65_536)
    """Channels that codes become before the decoder's first group."""
    residual_gain: float | None = Field(None, gt=0)
    """What each block's branch is multiplied by; null takes DALL·E's 1 / (groups · blocks)². Small networks that are
    trained for minutes need more."""

    standardise: bool = False
    """Bring the encoder's last features to mean 0 and variance 1 by running statistics. DALL·E has no such layer; small
    networks that are trained for minutes use few codes without it, since one direction (brightness) is the largest."""

    @property
    def stride(self) -> int:
        """Pixels that a code stands for, along each side."""
        return int(2 ** (self.groups - 1))

    @property
    def gain(self) -> float:
        """Of each block's branch."""
        return self.residual_gain or 1 / (self.groups * self.blocks) ** 2


class Conv(nn.Module):
    """A convolution that keeps the size, with DALL·E's names and initial weights: normal, std 1/sqrt(inputs).

    Args:
        inputs, outputs: channels.
        kernel: its side, odd.
        in_float32: compute so under autocast, too.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, *, in_float32: bool = False) -> None:
        super().__init__()
        self.in_float32 = in_float32
        self.w = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel**2) ** 0.5)
        self.b = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W]."""
        padding = self.w.shape[-1] // 2
        if not self.in_float32:
            return F.conv2d(x, self.w, self.b, padding=padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.to(self.w.dtype), self.w, self.b, padding=padding)


class Block(nn.Module):
    """A residual block: the identity, or a 1×1 convolution where channels change, and a branch of four convolutions.

    Args:
        inputs, outputs: channels; within the branch there are a quarter of `outputs`.
        kernels: sides of the four.
        gain: factor on the branch.
    """

    def __init__(self, inputs: int, outputs: int, kernels: tuple[int, int, int, int], gain: float) -> None:
        super().__init__()
        self.gain = gain
        self.id_path = nn.Identity() if inputs == outputs else Conv(inputs, outputs, 1)
        inner = outputs // 4
        layers: dict[str, nn.Module] = {}
        channels = [inputs, inner, inner, inner, outputs]
        for number, kernel in enumerate(kernels, 1):
            layers[f"relu_{number}"] = nn.ReLU()
            layers[f"conv_{number}"] = Conv(channels[number - 1], channels[number], kernel)
        self.res_path = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H, W]."""
        return self.id_path(x) + self.gain * self.res_path(x)  # type: ignore[no-any-return]


class Standardise(nn.Module):
    """Brings each channel to mean 0 and variance 1 by running statistics of the global batch.

    Unlike BatchNorm's, the statistics that training applies are those of the steps before, so that what comes out for
    an image does not depend on the images beside it. The owner calls `begin`, forwards, and `move`, once per step.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.mean: Tensor
        self.variance: Tensor
        self._sums: Tensor | None = None

    def begin(self) -> None:
        """Forget what came since the last step ended."""
        self._sums = None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w] in float32 at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.training:
            with torch.no_grad():
                places = x.new_full((1,), x.numel() / x.shape[1])  # not new_tensor: the device would wait for it
                sums = torch.cat([x.sum(dim=(0, 2, 3)), x.square().sum(dim=(0, 2, 3)), places])
                self._sums = sums if self._sums is None else self._sums + sums
        return (x - self.mean.view(-1, 1, 1)) * (self.variance + _EPS).rsqrt().view(-1, 1, 1)

    def move(self, step: int, finite: Tensor) -> None:
        """Move the running statistics towards those of the step, over all ranks.

        Args:
            step: from 0; the first ones count more.
            finite: boolean scalar on the device; where False nothing moves.
        """
        assert self._sums is not None
        sums, self._sums = all_reduce_sum(self._sums), None
        mean, square = (sums[:-1] / sums[-1]).chunk(2)
        share = max(_LATEST_SHARE, 1 / (1 + step))
        for old, new in ((self.mean, mean), (self.variance, (square - mean.square()).clamp(min=0))):
            old.copy_(torch.where(finite, old.lerp(new, share), old))


def _group(widths: list[int], kernels: tuple[int, int, int, int], gain: float, **end: nn.Module) -> nn.Sequential:
    blocks = {f"block_{number}": Block(*pair, kernels, gain) for number, pair in enumerate(pairwise(widths), 1)}
    return nn.Sequential(OrderedDict[str, nn.Module](**blocks, **end))


class Encoder(nn.Module):
    """Images to features of each code's place, [B, 3, H, W] -> [B, outputs, h, w] in float32 at least.

    Args:
        options: its size.
        outputs: channels that come out: logits of codes, or the numbers that FSQ rounds.
    """

    def __init__(self, options: NetworkOptions, outputs: int) -> None:
        super().__init__()
        width = options.width
        layers: dict[str, Any] = {"input": Conv(3, width, 7)}
        before = width
        for number in range(1, options.groups + 1):
            pool = {"pool": nn.MaxPool2d(2)} if number < options.groups else {}
            widths = [before, *[width] * options.blocks]
            layers[f"group_{number}"] = _group(widths, (3, 3, 3, 1), options.gain, **pool)
            before, width = width, 2 * width
        standard = {"standardise": Standardise(before)} if options.standardise else {}
        last = Conv(before, outputs, 1, in_float32=True)
        layers["output"] = nn.Sequential(OrderedDict[str, nn.Module](relu=nn.ReLU(), **standard, conv=last))
        self.blocks = nn.Sequential(OrderedDict(layers))

    @property
    def last_bias(self) -> nn.Parameter:
        """Of what comes out, [outputs]."""
        return self.blocks.output.conv.b  # type: ignore[union-attr,return-value]

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images, [B, 3, H, W] -> [B, outputs, h, w]."""
        # Channels last: twice as fast on a CPU. It passes from layer to layer.
        return self.blocks(images.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Codes, hard or soft, to what the likelihood takes, [B, inputs, h, w] -> [B, 6, H, W].

    Args:
        options: its size.
        inputs: channels that go in: weights of codes, or the numbers that FSQ rounded.
    """

    def __init__(self, options: NetworkOptions, inputs: int) -> None:
        super().__init__()
        width = options.width * 2 ** (options.groups - 1)
        layers: dict[str, Any] = {"input": Conv(inputs, options.decoder_input, 1, in_float32=True)}
        before = options.decoder_input
        for number in range(1, options.groups + 1):
            up = {"upsample": nn.Upsample(scale_factor=2, mode="nearest")} if number < options.groups else {}
            widths = [before, *[width] * options.blocks]
            layers[f"group_{number}"] = _group(widths, (1, 3, 3, 3), options.gain, **up)
            before, width = width, width // 2
        layers["output"] = nn.Sequential(OrderedDict([("relu", nn.ReLU()), ("conv", Conv(before, 6, 1))]))
        self.blocks = nn.Sequential(OrderedDict(layers))

    def forward(self, codes: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, 6, H, W]."""
        return self.blocks(codes.contiguous(memory_format=torch.channels_last))  # type: ignore[no-any-return]
