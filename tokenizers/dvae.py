"""DALL·E's discrete VAE: an encoder's logits choose a code for each place, a decoder makes the picture of them.

Ramesh et al. 2021, Zero-Shot Text-to-Image Generation, arXiv:2102.12092, section 2.1 and appendix A; this is the
tokenizer of BEiT (Bao et al. 2021, arXiv:2106.08254), which shows it 112 px for 14×14 codes. The authors published the
networks (openai/DALL-E at 5be4b23) and not their training, which follows the paper.

The choice is relaxed: in training, the codes are weighted by a softmax of logits plus Gumbel noise, whose temperature
falls, while the weight of the KL divergence to the uniform distribution rises. Both are functions of the step.

Letters: B images, K codes, H and W pixels, h and w codes.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from foreseen.config import Config, MethodOptions
from foreseen.data.batch import Batch
from foreseen.data.views import View
from foreseen.device_keys import keyed_uniform
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.handoff.weight_files import open_weights
from foreseen.tokenizers.build import build_for
from foreseen.tokenizers.dvae_networks import Decoder, Encoder, NetworkOptions
from foreseen.tokenizers.logit_laplace import MEAN, STD, negative_log_likelihood, pixels_of
from foreseen.tokenizers.reconstruction import ReconstructionObjective, mapped_view
from foreseen.tokenizers.tokenizer import Tokenizer

_LEAST_UNIFORM = 2.0**-25  # half a step of `keyed_uniform`: log of 0 is not finite


class DVAE(Tokenizer):
    """Encoder, decoder, and codes by the largest logit.

    Args:
        codebook_size: K.
        input_size: (H, W) in pixels that it is trained or used at; any multiple of the stride is taken.
        network: sizes of encoder and decoder, as `NetworkOptions` has them.
        interpolation: how a picture is brought to its size; BEiT shows DALL·E's Lanczos.
    """

    kind = "dvae"
    mean, std = MEAN, STD
    has_decoder = True

    def __init__(
        self,
        codebook_size: int = 8192,
        input_size: Sequence[int] = (112, 112),
        network: Mapping[str, Any] | None = None,
        interpolation: Literal["bicubic", "bilinear", "lanczos"] = "lanczos",
    ) -> None:
        super().__init__()
        if codebook_size < 2:
            raise BadInput(f"a codebook has at least 2 codes, not {codebook_size}: change method.codebook_size")
        self.network = NetworkOptions(**network or {})
        self.codebook_size = codebook_size
        self.input_size = (input_size[0], input_size[1])
        self.stride = (self.network.stride, self.network.stride)
        self.interpolation = interpolation
        self.grid(self.input_size)
        self.encoder = Encoder(self.network, codebook_size)
        self.decoder = Decoder(self.network, codebook_size)

    def arguments(self) -> dict[str, Any]:
        """See Tokenizer."""
        return {
            "codebook_size": self.codebook_size,
            "input_size": list(self.input_size),
            "network": self.network.model_dump(),
            "interpolation": self.interpolation,
        }

    def logits(self, images: Tensor) -> Tensor:
        """Of each code at each place, [B, 3, H, W] -> [B, K, h, w] in float32 at least."""
        self.grid((images.shape[2], images.shape[3]))
        return self.encoder(images)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """See Tokenizer."""
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(images.to(self.encoder.last_bias.dtype)).argmax(dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """See Tokenizer."""
        layers = self.decoder.blocks
        first = layers.input
        # A row of the matrix for each code, in the place of a product with a [B, K, h, w] tensor of zeros and a one.
        x = F.embedding(codes, first.w[:, :, 0, 0].mT).movedim(3, 1) + first.b.view(-1, 1, 1)  # type: ignore[union-attr,index,operator]
        return pixels_of(layers[1:](x))


def from_official(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], input_size: Sequence[int] = (112, 112)
) -> DVAE:
    """The tokenizer of the authors' weights; its size is read off them.

    Args:
        encoder, decoder: state dicts of their modules.
        input_size: (H, W) in pixels that it will be shown; BEiT's by default.

    Raises:
        BadInput: a weight is missing, left over, or of another shape.
    """
    try:
        groups = len({name.split(".")[1] for name in encoder if name.startswith("blocks.group_")})
        blocks = len({name.split(".")[2] for name in encoder if name.startswith("blocks.group_1.block_")})
        network = {
            "groups": groups, "blocks": blocks, "width": len(encoder["blocks.input.b"]),
            "decoder_input": len(decoder["blocks.input.b"]),
        }  # fmt: skip
        state = {f"encoder.{name}": value for name, value in encoder.items()}
        state |= {f"decoder.{name}": value for name, value in decoder.items()}
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        codes = len(encoder["blocks.output.conv.b"])
        tokenizer = build_for(shapes, DVAE, {"codebook_size": codes, "input_size": input_size, "network": network})
        tokenizer.load_state_dict(state)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"these are no weights of DALL·E's encoder and decoder: {error}") from error
    return tokenizer.eval().requires_grad_(False)


def dalle_from_official(encoder: str | Path, decoder: str | Path) -> DVAE:
    """The tokenizer of the published files encoder.pkl and decoder.pkl, which are pickled modules; nothing is run.

    Raises:
        BadInput: a file is not there, or is another.
    """
    return from_official(open_weights(encoder).state, open_weights(decoder).state)


class DVAEOptions(MethodOptions):
    """Options of `method.name: dvae`; the defaults are the paper's."""

    has_backbone = False
    name: Literal["dvae"] = "dvae"
    codebook_size: int = Field(8192, ge=2)
    """Codes, K."""
    network: NetworkOptions = NetworkOptions()
    temperature: tuple[float, float] = (1.0, 1 / 16)
    """Of the relaxed choice, at the start and at the end of its fall."""
    temperature_steps: int | None = Field(None, ge=1)
    """Steps in which it falls, by a cosine; the paper's 150,000. Null takes three quarters of the run."""
    kl_weight: float = Field(6.6, ge=0)
    """Weight of the KL divergence of each place's codes to the uniform distribution, in the evidence bound of a whole
    picture. The loss is that bound divided by the values of the picture, so with a code for each 8×8 px the mean
    divergence of a place has the weight 6.6 / 192."""
    kl_steps: int | None = Field(None, ge=1)
    """Steps in which that weight rises from 0, by a cosine; the paper's 5,000. Null takes a tenth of the run."""
    balance_rate: float = Field(0.0, ge=0)
    """Move the bias of each code's logit by so much at each step, up where it is rarer than the mean code, down where
    it is more frequent, instead of training it; falls to 0 over the run. Small networks that are trained for minutes
    use few codes without it. 0 trains it, as the paper does."""
    hard: bool = False
    """Give the decoder the one code chosen, with the gradient of the relaxed choice; the paper's is relaxed."""

    @model_validator(mode="after")
    def _temperatures_are_positive(self) -> "DVAEOptions":
        if min(self.temperature) <= 0:
            raise ValueError(f"method.temperature must be two positive numbers, got {list(self.temperature)}")
        return self


class DVAEObjective(ReconstructionObjective):
    """The evidence bound of a relaxed choice of codes.

    Args:
        tokenizer: to train.
        options: of the method.
        view: what it sees of each picture.
    """

    tokenizer: DVAE

    def __init__(self, tokenizer: DVAE, options: DVAEOptions, view: View) -> None:
        super().__init__(tokenizer, view)
        self.options = options
        if options.balance_rate:
            tokenizer.encoder.last_bias.requires_grad_(False)

    @classmethod
    def build(cls, config: Config) -> "DVAEObjective":
        """The objective that a recipe trains, with weights drawn from the global generator."""
        options = config.method
        assert isinstance(options, DVAEOptions)
        size, interpolation = config.views.size, config.views.interpolation
        tokenizer = DVAE(options.codebook_size, size, options.network.model_dump(), interpolation)
        return cls(tokenizer, options, mapped_view(config, tokenizer))

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The negative evidence bound, divided by the values of a picture."""
        images = batch.images["image"]
        logits = self.tokenizer.logits(images)
        self.counts.add(logits.argmax(dim=1))
        codes = self.relaxed(logits, batch.key, progress)
        reconstruction = negative_log_likelihood(images, self.tokenizer.decoder(codes)).mean()
        divergence = divergence_to_uniform(logits).mean()
        loss = reconstruction + self.kl_weight(progress) * divergence_share(self.tokenizer.stride) * divergence
        return {"loss": loss, "reconstruction": reconstruction, "kl": divergence}

    def relaxed(self, logits: Tensor, key: Tensor, progress: Progress) -> Tensor:
        """Weights of codes, drawn from the Gumbel-softmax distribution, [B, K, h, w] -> [B, K, h, w].

        Args:
            logits: of the encoder.
            key: one integer per image, [B]; the noise is a function of it and nothing else.
            progress: gives the temperature.

        Source: Jang et al. 2017, arXiv:1611.01144; Maddison et al. 2017, arXiv:1611.00712.
        """
        noise = keyed_uniform(key, "gumbel", logits[0].numel()).clamp(min=_LEAST_UNIFORM)
        noise = -(-noise.view(logits.shape).to(logits.dtype).log()).log()
        soft = ((logits + noise) / self.temperature(progress)).softmax(dim=1)
        return straight_through(soft) if self.options.hard else soft

    def temperature(self, progress: Progress) -> float:
        """Of the step being made."""
        steps = self.options.temperature_steps or max(1, round(0.75 * progress.total_steps))
        return cosine(progress.step, steps, *self.options.temperature)

    def kl_weight(self, progress: Progress) -> float:
        """Of the step being made, in the units of `method.kl_weight`."""
        steps = self.options.kl_steps or max(1, round(0.1 * progress.total_steps))
        return cosine(progress.step, steps, 0.0, self.options.kl_weight)

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """End the count of codes, and move the biases of their logits, if they are balanced.

        Source: Wang et al. 2024, arXiv:2408.15664, where the choice is among experts.
        """
        super().after_step(progress, finite)
        if self.options.balance_rate:
            counts, bias = self.counts.last, self.tokenizer.encoder.last_bias
            way = self.options.balance_rate * (1 - progress.fraction) * (counts.mean() - counts).sign()
            bias.add_(torch.where(finite, way.to(bias.dtype), 0.0))


def divergence_to_uniform(logits: Tensor) -> Tensor:
    """KL(q || uniform) = log K - entropy of the codes of each place, in nats, [B, K, h, w] -> [B, h, w].

    BEiT's own small dVAE sums it over batch and places where it means to average (`batchmean` of a tensor whose first
    dimension is 1), so that its weight grows with the batch; here it is of each place, and the caller averages.
    """
    log_q = logits.log_softmax(dim=1)
    return math.log(logits.shape[1]) + (log_q.exp() * log_q).sum(dim=1)


def divergence_share(stride: tuple[int, int]) -> float:
    """Places in a picture, divided by its values: what a mean over places is multiplied by in a loss per value."""
    return 1 / (3 * stride[0] * stride[1])


def straight_through(soft: Tensor) -> Tensor:
    """The largest of each place as a one among zeros, with the gradient of `soft`, [B, K, h, w] -> [B, K, h, w]."""
    hard = torch.zeros_like(soft).scatter_(1, soft.argmax(dim=1, keepdim=True), 1.0)
    return hard + (soft - soft.detach())


def cosine(step: int, steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `steps` and ever after, along half a cosine."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
