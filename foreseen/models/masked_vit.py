"""A timm ViT that computes only the patches it is shown, and the decoder that fills in the others.

Letters: B images, C channels, H and W pixels, L patches, V of them visible and M hidden, P prefix tokens (CLS,
distillation, registers), D `embed_dim`. A patch is a vector of ph * pw * C pixel values in the order (row, column,
channel).
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.models.last_block import run_last_block
from foreseen.models.sincos import sincos_table
from foreseen.models.take import take


def patchify(images: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches: [B, C, H, W] -> [B, L, ph * pw * C], row-major."""
    b, c, h, w = images.shape
    ph, pw = patch_size
    patches = images.reshape(b, c, h // ph, ph, w // pw, pw).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(b, (h // ph) * (w // pw), ph * pw * c)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Put patches back together: [B, L, ph * pw * C] -> [B, C, H, W]."""
    b, (ph, pw), (rows, columns) = len(patches), patch_size, grid
    images = patches.reshape(b, rows, columns, ph, pw, -1).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(b, -1, rows * ph, columns * pw)


def check_plain_vit(model: nn.Module, name: str, *, stem: bool = False) -> VisionTransformer:
    """The model itself, if its patches can be hidden.

    Args:
        model: a backbone.
        name: its name in timm, for the sentence.
        stem: patches may be embedded by a convolutional stem (timm's `vit_*_r*_s*`). What is hidden behind a stem is
            the token, while its neighbours have seen some of its pixels.

    Raises:
        BadInput: it is no plain ViT, or has no position table of its own.
    """
    embeddings = (PatchEmbed, HybridEmbed) if stem else (PatchEmbed,)
    plain = isinstance(model, VisionTransformer) and type(model.patch_embed) in embeddings
    pooled = getattr(model, "attn_pool", None) is not None  # would be handed on untrained
    if not isinstance(model, VisionTransformer) or not plain or model.pos_embed is None or pooled:
        raise BadInput(
            f"model.name {name} is no plain ViT with a position table and without attention pooling, whose patches can "
            "be left out; take one of timm's vit_*, deit_* or deit3_* models without a convolutional stem"
        )
    return model


def position_table(vit: VisionTransformer) -> nn.Parameter:
    """The position table of a plain ViT, [1, L or P + L, D]."""
    table = vit.pos_embed
    assert isinstance(table, nn.Parameter), "check_plain_vit lets no ViT without a table pass"
    return table


def encode_visible(vit: VisionTransformer, patches: Tensor, visible: Tensor) -> Tensor:
    """Run a ViT on some patches of each image; the others cost nothing.

    Args:
        vit: a plain ViT.
        patches: all patches, [B, L, ph * pw * C].
        visible: numbers of the patches to see, [B, V].

    Returns:
        [B, P + V, D] after the final norm: prefix tokens, then patches in the order of `visible`.
    """
    projection = vit.patch_embed.proj
    weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # to the pixel order of a patch
    x = vit.patch_embed.norm(F.linear(take(patches, visible), weight, projection.bias))
    x = vit.norm_pre(add_positions(vit, x, visible))
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)  # type: ignore[no-any-return]


def add_positions(vit: VisionTransformer, x: Tensor, places: Tensor | None = None) -> Tensor:
    """Give embedded patches their positions and put the prefix tokens in front.

    Args:
        vit: a plain ViT.
        x: embedded patches, [B, V, D].
        places: which patches they are, [B, V]; None for all of them in order.

    Returns:
        [B, P + V, D].
    """
    prefix = [t for t in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if t is not None]
    num_prefix = sum(token.shape[1] for token in prefix)
    positions = position_table(vit)[0]
    if not vit.no_embed_class:
        prefix = [torch.cat(prefix, dim=1) + positions[:num_prefix]] if prefix else []
        positions = positions[num_prefix:]
    x = x + (positions if places is None else positions[places])
    return torch.cat([*(token.expand(len(x), -1, -1) for token in prefix), x], dim=1)


class PatchDecoder(nn.Module):
    """A small ViT that predicts the pixels of hidden patches from the tokens of visible ones.

    Args:
        encoder_dim: width of the tokens that come in.
        patch_dim: values of a patch, ph * pw * C.
        grid: rows and columns of patches.
        embed_dim, depth, num_heads: of the decoder's blocks.

    Source: He et al. 2022, arXiv:2111.06377, section 3; facebookresearch/mae at efb2a80, models_mae.py.
    """

    pos_embed: Tensor

    def __init__(
        self, encoder_dim: int, patch_dim: int, grid: tuple[int, int], *, embed_dim: int, depth: int, num_heads: int
    ) -> None:  # fmt: skip
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(encoder_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_table(grid, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=norm) for _ in range(depth)
        )
        self.norm = norm(embed_dim)
        self.pred = nn.Linear(embed_dim, patch_dim)

    def forward(self, latent: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predict the pixels of hidden patches.

        Attention does not care for the order of tokens that carry their positions, so they stay in the order prefix,
        visible, hidden and are never sorted back.

        Args:
            latent: the encoder's tokens, [B, P + V, D].
            visible, hidden: numbers of the patches, [B, V] and [B, M].

        Returns:
            [B, M, ph * pw * C], in the order of `hidden`.
        """
        x = self.embed(latent)
        num_visible, num_hidden = visible.shape[1], hidden.shape[1]
        prefix, seen = x[:, : x.shape[1] - num_visible], x[:, x.shape[1] - num_visible :]
        seen = seen + self.pos_embed[visible]
        unseen = self.mask_token + self.pos_embed[hidden]
        x = torch.cat([prefix, seen, unseen.to(seen.dtype)], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = run_last_block(self.blocks[-1], x, slice(x.shape[1] - num_hidden, None))
        return self.pred(self.norm(x))  # type: ignore[no-any-return]
