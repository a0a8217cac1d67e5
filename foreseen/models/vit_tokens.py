"""The tokens of a plain timm ViT, for images of any size, with patches hidden behind a mask token.

Letters: B images, C channels, H and W pixels, h and w rows and columns of patches, L = h * w, M of them wanted, P
prefix tokens (CLS, distillation, registers), D `embed_dim`.
"""

from typing import Literal, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from foreseen.models.last_block import run_last_block
from foreseen.models.masked_vit import position_table
from foreseen.models.position import PositionResize, resample_pos_embed
from foreseen.models.take import Places

Patches = Tensor | Literal["none", "all"]
"""Patches whose tokens are wanted: numbers [B, M], or what the words say."""


class Tokens(NamedTuple):
    """What a ViT makes of images.

    Attributes:
        wanted: prefix tokens and then patches, after the final norm, [B, P + M, D].
        seen: all patches as the last block sees them, [B, L, D].
    """

    wanted: Tensor
    seen: Tensor


def vit_tokens(
    vit: VisionTransformer,
    images: Tensor,
    *,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    patches: Patches = "all",
    resize: PositionResize = "antialias",
) -> Tokens:
    """Run a plain ViT; its last block computes what is wanted alone.

    Args:
        vit: see `check_plain_vit`.
        images: normalised, [B, C, H, W].
        mask: patches whose embedding the mask token replaces before positions are added, boolean [B, L]; None for none.
        mask_token: [D], or with axes of length 1 in front.
        patches: that are wanted.
        resize: how positions are interpolated where the images are not of the ViT's own size.

    Source: Zhou et al. 2022, arXiv:2111.07832; bytedance/ibot, models/vision_transformer.py, prepare_tokens.
    """
    x = vit.patch_embed(images)
    grid = (x.shape[1], x.shape[2]) if x.ndim == 4 else vit.patch_embed.grid_size
    x = x.flatten(1, 2) if x.ndim == 4 else x
    if mask is not None:
        assert mask_token is not None
        x = torch.where(mask[:, :, None], mask_token.to(x.dtype).reshape(1, 1, -1), x)
    prefix = [t for t in (vit.cls_token, getattr(vit, "dist_token", None), vit.reg_token) if t is not None]
    num_prefix = 0 if vit.no_embed_class else sum(token.shape[1] for token in prefix)
    own = vit.patch_embed.grid_size
    positions = resample_pos_embed(position_table(vit), (own[0], own[1]), (grid[0], grid[1]), num_prefix, resize)
    if vit.no_embed_class:
        x = x + positions
    x = torch.cat([*(token.expand(len(x), -1, -1).to(x.dtype) for token in prefix), x], dim=1)
    if not vit.no_embed_class:
        x = x + positions
    *blocks, last = vit.blocks
    for block in (vit.norm_pre, *blocks):
        x = block(x)
    wanted = last(x) if patches == "all" else run_last_block(last, x, _behind(vit.num_prefix_tokens, patches, x))
    return Tokens(vit.norm(wanted), x[:, vit.num_prefix_tokens :])


def _behind(num_prefix: int, patches: Patches, x: Tensor) -> Places:
    """Prefix tokens, and patches where there are some, as places among the tokens x."""
    if not isinstance(patches, Tensor):
        return slice(num_prefix)
    first = torch.arange(num_prefix, device=x.device).expand(len(x), -1)
    return torch.cat([first, num_prefix + patches], dim=1)
