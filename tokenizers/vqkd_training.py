"""Trains VQ-KD: encode, quantize, decode, and compare with what a frozen teacher sees at each place.

Peng et al. 2022, arXiv:2208.06366, section 2.2; microsoft/unilm at 768a3c8, beit2/modeling_vqkd.py.

Letters: B images, H and W pixels, h and w codes, L = h * w, D the teacher's width, K codes in the codebook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from foreseen.config import Config, MethodOptions, Section
from foreseen.data.batch import Batch
from foreseen.data.views import Request, View, configured_view
from foreseen.device_keys import subkey
from foreseen.engine.objective import ParameterRule, Progress
from foreseen.errors import BadInput
from foreseen.handoff.encoder import create_encoder, parents_of
from foreseen.models.drop_path import draw_drop_path
from foreseen.tokenizers.codebook_ema import CodebookEMA
from foreseen.tokenizers.pictures import strip
from foreseen.tokenizers.quantizer import Quantized
from foreseen.tokenizers.teacher import Teacher, load_teacher
from foreseen.tokenizers.training import TokenizerObjective
from foreseen.tokenizers.vqkd import HALF, VQKD, patch_tokens, task_layer

_PICTURES = 8
_UNDECAYED = ("cls_token", "pos_embed", "reg_token", "dist_token")


class DecoderOptions(Section):
    """The decoder over the map of codes, thrown away after training."""

    embed_dim: int | None = Field(None, ge=1)
    """Width; null takes the encoder's."""
    depth: int = Field(1, ge=1)
    """Blocks; the authors have 1 in most models and 3 in the one they recommend."""
    num_heads: int | None = Field(None, ge=1)
    """Null takes the encoder's."""


class VQKDOptions(MethodOptions):
    """Options of `method.name: vqkd`."""

    name: Literal["vqkd"] = "vqkd"
    teacher: str | None = None
    """Whose features are learnt: an encoder folder, or `timm:NAME` for public weights."""
    codebook_size: int = Field(8192, ge=2)
    """Codes in the vocabulary, K."""
    code_dim: int = Field(32, ge=2)
    """Width of a code."""
    commitment: float = Field(1.0, ge=0)
    """Weight of the distance between tokens and their codes."""
    codebook_decay: float = Field(0.99, ge=0, lt=1)
    """What a code keeps of itself in a step in which it was hit."""
    kmeans_iterations: int = Field(10, ge=0)
    """Iterations of k-means over the first global batch, which is where the codes begin; 0 leaves them random."""
    revive_after: int | None = Field(20, ge=1)
    """Every so many steps, codes that were not hit within as many are put on tokens of the batch; null never does."""
    decoder: DecoderOptions = DecoderOptions()


class VQKDObjective(TokenizerObjective):
    """VQ-KD and what only its training needs: the decoder, the teacher, and how the codes move.

    Args:
        tokenizer: what is trained and kept.
        teacher: frozen.
        options: of the method.
        view: what it sees of each image.
        notes: to be said when the run starts.
    """

    tokenizer: VQKD
    _scale: Tensor
    _shift: Tensor

    def __init__(
        self, tokenizer: VQKD, teacher: Teacher, options: VQKDOptions, view: View, notes: Sequence[str] = ()
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokenizer = tokenizer
        self.options = options
        self.view = view
        self.notes = (*notes, teacher.note)
        self.grid = tokenizer.grid(view.size)
        self.decoder = _decoder(tokenizer, options.decoder, self.grid)
        self.decode_task_layer = task_layer(self.decoder.embed_dim, teacher.width)
        self.codebook_ema = CodebookEMA(
            options.codebook_size, decay=options.codebook_decay, kmeans_iterations=options.kmeans_iterations,
            revive_after=options.revive_after,
        )  # fmt: skip
        self.teacher = teacher
        # From the tokenizer's normalisation to the teacher's; made once, or every step would send them anew.
        own, wanted = ((torch.tensor(one.mean), torch.tensor(one.std)) for one in (view, teacher))
        self.register_buffer("_scale", (own[1] / wanted[1]).view(-1, 1, 1), persistent=False)
        self.register_buffer("_shift", ((own[0] - wanted[0]) / wanted[1]).view(-1, 1, 1), persistent=False)

    @classmethod
    def build(cls, config: Config) -> "VQKDObjective":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`."""
        options = config.method
        assert isinstance(options, VQKDOptions)
        encoder = create_encoder(config.model, img_size=config.views.size)
        begun = config.model.init_from is not None
        mean, std = (encoder.preprocessing.mean, encoder.preprocessing.std) if begun else (HALF, HALF)
        view = configured_view(config.views, mean, std)
        tokenizer = VQKD.around(
            encoder.model, input_size=config.views.size, codebook_size=options.codebook_size,
            code_dim=options.code_dim, mean=view.mean, std=view.std, interpolation=view.interpolation,
        )  # fmt: skip
        if not begun:
            rescale_residuals(tokenizer.encoder)
        teacher = load_teacher(options.teacher, grid=tokenizer.grid(view.size), crop=view.size)
        return cls(tokenizer, teacher, options, view, _warnings(config, options.codebook_size, tokenizer))

    @property
    def request(self) -> Request:
        """One random crop per image, and the same at the teacher's size where that is another."""
        if self._teacher_sees_the_view:
            return Request(views=(self.view,))
        teacher = replace(
            self.view, name="teacher", size=self.teacher.size, window_of=self.view.name, mean=self.teacher.mean,
            std=self.teacher.std,
        )  # fmt: skip
        return Request(views=(self.view, teacher))

    @property
    def _teacher_sees_the_view(self) -> bool:
        return self.teacher.size == self.view.size

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[None]:
        """Nothing for the forwards; what an interrupted step collected is forgotten."""
        self.codebook_ema.begin()
        return [None] * len(micro_batches)

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The teacher's features against the decoder's, and the tokens against their codes."""
        with draw_drop_path(self.tokenizer.encoder, subkey(batch.key, "drop_path")):
            loss, parts, quantized = self.learn(batch.images[self.view.name], self.targets(batch))
        self.codebook_ema.collect(quantized, batch.key, progress.step)
        return {"loss": loss, **parts}

    def learn(self, images: Tensor, target: Tensor) -> tuple[Tensor, dict[str, Tensor], Quantized]:
        """The loss for given targets.

        Args:
            images: normalised, [B, 3, H, W].
            target: features of the teacher, [B, L, D].

        Returns:
            The loss; its parts, "teacher" (1 - cosine) and "commitment"; and the quantized tokens.
        """
        tokens = self.tokenizer.tokens(images)
        with torch.autocast(images.device.type, enabled=False):
            quantized = self.tokenizer.codebook(tokens)
        prediction = self.decode(quantized.values)
        cosine = (F.normalize(prediction, dim=-1) * F.normalize(target.to(prediction.dtype), dim=-1)).sum(-1)
        parts = {"teacher": (1 - cosine).mean(), "commitment": self.options.commitment * quantized.commitment}
        return parts["teacher"] + parts["commitment"], parts, quantized

    def decode(self, values: Tensor) -> Tensor:
        """Features of the teacher from codes' vectors, [B, L, code_dim] -> [B, L, D], in float32 at least."""
        code_map = values.transpose(1, 2).reshape(len(values), -1, *self.grid)
        predicted = self.decode_task_layer(patch_tokens(self.decoder, code_map))
        return predicted.to(torch.promote_types(predicted.dtype, torch.float32))  # type: ignore[no-any-return]

    @torch.no_grad()
    def targets(self, batch: Batch) -> Tensor:
        """What the teacher sees in the same crop, normalised as it is used to, [B, L, D]."""
        if not self._teacher_sees_the_view:
            return self.teacher(batch.images["teacher"])  # type: ignore[no-any-return]
        images = batch.images[self.view.name]
        return self.teacher(images * self._scale + self._shift)  # type: ignore[no-any-return]

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """Move the codes."""
        self.codebook_ema.move(self.tokenizer.codebook, progress.step, finite)

    def parameter_rules(self, layer_decay: float | None) -> Mapping[str, ParameterRule]:
        """Matrices are decayed; vectors, tokens and position tables are not, as the authors have it."""
        return {
            name: replace(rule, decay=rule.decay and not name.endswith(_UNDECAYED))
            for name, rule in super().parameter_rules(layer_decay).items()
        }

    def health(self) -> dict[str, Tensor]:
        """How the codebook is used."""
        return self.codebook_ema.health()

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Each crop beside the map of its codes."""
        images = batch.images[self.view.name][:_PICTURES]
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.view.mean, self.view.std))
        codes = self.tokenizer.encode(images)
        return {"original, codes": strip(images * std + mean, codes, self.tokenizer.codebook_size)}

    def parents(self) -> Sequence[Mapping[str, Any]]:
        """The teacher, and what the encoder began from."""
        return [*parents_of(self.tokenizer.encoder), self.teacher.parent]

    def frozen_inputs(self) -> Mapping[str, str]:
        """The teacher's checksum."""
        return {"teacher": self.teacher.sha256}


def _decoder(tokenizer: VQKD, options: DecoderOptions, grid: tuple[int, int]) -> VisionTransformer:
    vit: Any = tokenizer.encoder
    width, heads = options.embed_dim or vit.embed_dim, options.num_heads or vit.blocks[0].attn.num_heads
    if width % heads:
        raise BadInput(f"method.decoder.num_heads {heads} does not divide method.decoder.embed_dim {width}")
    decoder = VisionTransformer(
        img_size=grid, patch_size=1, in_chans=tokenizer.code_dim, num_classes=0, embed_dim=width,
        depth=options.depth, num_heads=heads,
    )  # fmt: skip
    rescale_residuals(decoder)
    return decoder


def rescale_residuals(vit: VisionTransformer) -> None:
    """Divide what block l, counted from 1, adds to its tokens by sqrt(2 l), as BEiT's models begin."""
    block: Any
    with torch.no_grad():
        for number, block in enumerate(vit.blocks, start=1):
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_((2.0 * number) ** 0.5)


def _warnings(config: Config, codebook_size: int, tokenizer: VQKD) -> list[str]:
    rows, columns = tokenizer.grid(config.views.size)
    in_step = config.batch.global_size * rows * columns
    steps, epochs = config.run.steps or 0, config.run.epochs or 0.0
    in_data = round(steps * config.batch.global_size / epochs) * rows * columns if steps and epochs else None
    if in_data is not None and codebook_size > in_data:
        return [
            f"method.codebook_size {codebook_size} is more than the {in_data} patches of the data can fill; lower it"
        ]
    if codebook_size > in_step:
        return [
            f"method.codebook_size {codebook_size} is more than the {in_step} patches of a step, so some codes stay "
            "random at first; raise batch.global_size or lower it"
        ]
    return []
