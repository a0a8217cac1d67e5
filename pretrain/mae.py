"""MAE: hide most patches, encode the rest, predict the pixels of the hidden ones.

He et al. 2022, Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377; the authors' code is
facebookresearch/mae at efb2a80, whose numbers this file reproduces (tests/pretrain/test_mae.py).
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foreseen.config import Config, MethodOptions, Section
from foreseen.data.batch import Batch
from foreseen.data.views import Request, View, configured_view, denormalise
from foreseen.device_keys import keyed_permutation, subkey
from foreseen.engine.objective import Objective, Progress
from foreseen.errors import BadInput
from foreseen.handoff.encoder import create_encoder
from foreseen.models.backbone import architecture_of
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.masked_vit import (
    PatchDecoder,
    check_plain_vit,
    encode_visible,
    patchify,
    position_table,
    unpatchify,
)
from foreseen.models.sincos import sincos_table
from foreseen.models.take import take

_PICTURES = 8


class DecoderOptions(Section):
    """The decoder, thrown away after pretraining; the paper's is the same for every encoder."""

    embed_dim: int = Field(512, ge=4)
    depth: int = Field(8, ge=1)
    num_heads: int = Field(16, ge=1)


class MAEOptions(MethodOptions):
    """Options of `method.name: mae`."""

    name: Literal["mae"] = "mae"
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of patches hidden."""
    norm_pix_loss: bool = True
    """Predict pixels normalised within each patch."""
    decoder: DecoderOptions = DecoderOptions()


class MAE(Objective):
    """The masked autoencoder over any plain timm ViT.

    Args:
        vit: the encoder, with its final norm and without a head. Its position table is fixed.
        options: of the method.
        view: what it sees of each image; the size of the ViT's input.
    """

    def __init__(self, vit: VisionTransformer, options: MAEOptions, view: View) -> None:
        super().__init__()
        self.vit = vit
        self.options = options
        self.view = view
        self.patch_size: tuple[int, int] = vit.patch_embed.patch_size
        self.grid: tuple[int, int] = vit.patch_embed.grid_size
        self.num_patches = self.grid[0] * self.grid[1]
        self.num_visible = visible_count(self.num_patches, options.mask_ratio)
        decoder = options.decoder
        if decoder.embed_dim % decoder.num_heads:
            raise BadInput(
                f"method.decoder.num_heads {decoder.num_heads} does not divide method.decoder.embed_dim "
                f"{decoder.embed_dim}"
            )
        self.decoder = PatchDecoder(
            vit.embed_dim,
            self.patch_size[0] * self.patch_size[1] * vit.in_chans,
            self.grid,
            embed_dim=decoder.embed_dim,
            depth=decoder.depth,
            num_heads=decoder.num_heads,
        )
        position_table(vit).requires_grad_(False)

    @classmethod
    def build(cls, config: Config) -> "MAE":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`."""
        options = config.method
        assert isinstance(options, MAEOptions)
        encoder = create_encoder(config.model, img_size=config.views.size)
        view = configured_view(config.views, encoder.preprocessing.mean, encoder.preprocessing.std)
        objective = cls(check_plain_vit(encoder.model, architecture_of(encoder.model)[0]), options, view)
        initialise(objective.decoder)
        if config.model.init_from is None:
            initialise(objective.vit)
            fix_positions(objective.vit)
        return objective

    @property
    def request(self) -> Request:
        """One random crop per image."""
        return Request(views=(self.view,))

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The mean squared error over hidden patches."""
        order = keyed_permutation(batch.key, "mask", self.num_patches)
        with draw_drop_path(self.vit, subkey(batch.key, "drop_path")):
            loss, _ = self.reconstruct(batch.images["image"], order)
        return {"loss": loss}

    def reconstruct(self, images: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """Predict hidden patches and score them.

        Args:
            images: normalised, [B, C, H, W].
            order: a permutation of the patches per image, [B, L]; the first `num_visible` are seen.

        Returns:
            The mean over hidden patches of the mean squared error over their values, in float32 at least; and the
            predictions [B, M, ph * pw * C], in the order of the hidden patches.
        """
        visible, hidden = order[:, : self.num_visible], order[:, self.num_visible :]
        patches = patchify(images, self.patch_size)
        prediction = self.decoder(encode_visible(self.vit, patches, visible), visible, hidden)
        prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
        error = prediction - self._target(take(patches, hidden))
        return error.square().mean(), prediction

    def _target(self, patches: Tensor) -> Tensor:
        if not self.options.norm_pix_loss:
            return patches
        mean, std = _patch_statistics(patches)
        return (patches - mean) / std

    def encoder(self) -> nn.Module:
        """The ViT."""
        return self.vit

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Original, what the encoder sees, and the reconstruction, side by side.

        With normalised pixels the true mean and contrast of each hidden patch are lent to its prediction, since it
        predicts neither; the name says so.
        """
        images, key = batch.images["image"][:_PICTURES], batch.key[:_PICTURES]
        order = keyed_permutation(key, "mask", self.num_patches)
        hidden = order[:, self.num_visible :]
        patches = patchify(images, self.patch_size)
        _, prediction = self.reconstruct(images, order)
        if self.options.norm_pix_loss:
            mean, std = _patch_statistics(take(patches, hidden))
            prediction = prediction * std + mean
        index = hidden[..., None].expand(-1, -1, patches.shape[-1])
        seen = patches.scatter(1, index, 0.0)
        filled = patches.scatter(1, index, prediction.to(patches.dtype))
        rows = [images, *(unpatchify(p, self.patch_size, self.grid) for p in (seen, filled))]
        name = "original, visible, reconstruction" + (
            " (patch mean and contrast lent)" if self.options.norm_pix_loss else ""
        )
        return {name: torch.cat([denormalise(row, self.view.mean, self.view.std) for row in rows], dim=3)}


def visible_count(num_patches: int, mask_ratio: float) -> int:
    """Patches that stay: the authors' truncation of L * (1 - ratio), floating point included."""
    count = int(num_patches * (1 - mask_ratio))
    if not 0 < count < num_patches:
        raise BadInput(
            f"method.mask_ratio {mask_ratio} leaves {count} of {num_patches} patches visible; at least one must be "
            "visible and one hidden"
        )
    return count


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch, over all its values together; the variance is the unbiased one."""
    patches = patches.to(torch.promote_types(patches.dtype, torch.float32))
    return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()


def initialise(module: nn.Module) -> None:
    """Draw weights as the authors do.

    Linear layers are Xavier-uniform with zero bias (the fused qkv as one matrix), the patch convolution like a linear
    layer on its flattened patch, tokens normal with standard deviation 0.02.
    """
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Conv2d):
            part.reset_parameters()
            nn.init.xavier_uniform_(part.weight.view(part.weight.shape[0], -1))
    for name, parameter in module.named_parameters():
        if name.endswith(("cls_token", "mask_token", "reg_token", "dist_token")):
            nn.init.normal_(parameter, std=0.02)


def fix_positions(vit: VisionTransformer) -> None:
    """Set the position table to sine-cosine; rows of prefix tokens, where the table has them, are zero."""
    table = position_table(vit)
    prefix_rows = table.shape[1] - vit.patch_embed.num_patches
    with torch.no_grad():
        table.copy_(sincos_table(vit.patch_embed.grid_size, vit.embed_dim, prefix_rows=prefix_rows)[None])


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' keys (`model` of a `_full` or training checkpoint) to this objective's.

    Source: facebookresearch/mae at efb2a80, models_mae.py.
    """
    renamed = {}
    for name, tensor in state.items():
        if name == "mask_token":
            renamed["decoder.mask_token"] = tensor
        elif name == "decoder_pos_embed":
            renamed["decoder.pos_embed"] = tensor[0, 1:]  # the row of the CLS token is zero
        elif name.startswith("decoder_"):
            renamed[f"decoder.{name.removeprefix('decoder_')}"] = tensor
        else:
            renamed[f"vit.{name}"] = tensor
    return renamed
