"""The last feature map of a timm Swin, with places of it hidden behind a mask token.

Letters: B images, H and W pixels, h and w rows and columns of the last map, L = h * w, C channels of the patch
embedding, D of the last map.
"""

from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn


def is_swin(model: nn.Module) -> bool:
    """Whether a model is one of timm's swin_* and swinv2_*; swinv2_cr_* are others."""
    return isinstance(model, SwinTransformer | SwinTransformerV2)


def swin_stride(model: nn.Module) -> int:
    """Pixels between places of the last map: 32 for patches of 4 px and four stages."""
    described: Any = model
    return int(described.feature_info[-1]["reduction"])


def swin_tokens(
    model: nn.Module, images: Tensor, *, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Run a Swin.

    Args:
        model: see `is_swin`.
        images: normalised, [B, 3, H, W]; with a mask, sides are multiples of `swin_stride`.
        mask: places of the last map that are hidden, boolean [B, L]; the mask token replaces the embedding of every
            patch that lies in them. None for none.
        mask_token: [C], or with axes of length 1 in front.

    Returns:
        [B, h, w, D] after the final norm.

    Source: Zhou et al. 2022, arXiv:2111.07832; bytedance/ibot, models/swin_transformer.py, mask_model.
    """
    swin: Any = model
    x: Tensor = swin.patch_embed(images)
    if mask is not None:
        assert mask_token is not None
        stride = swin_stride(model)
        rows, columns = images.shape[2] // stride, images.shape[3] // stride
        hidden = mask.view(-1, rows, columns)
        hidden = hidden.repeat_interleave(x.shape[1] // rows, 1).repeat_interleave(x.shape[2] // columns, 2)
        x = torch.where(hidden[..., None], mask_token.to(x.dtype).reshape(1, 1, 1, -1), x)
    return swin.norm(swin.layers(x))  # type: ignore[no-any-return]
