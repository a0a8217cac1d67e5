"""Transformers that see a mask token in the place of a hidden patch: timm's BEiT, and any plain ViT.

Letters: B images, C channels, H and W pixels, L patches, P prefix tokens (CLS, distillation, registers), D `embed_dim`.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.models.masked_vit import add_positions, check_plain_vit

MaskableViT = Beit | VisionTransformer


def check_maskable(model: nn.Module, name: str) -> MaskableViT:
    """The model itself, if mask tokens can take the place of its patches.

    Raises:
        BadInput: it is neither a BEiT nor a plain ViT.
    """
    if isinstance(model, Beit):
        return model
    if isinstance(model, Eva):
        raise BadInput(
            f"model.name {name} is an EVA, which takes no mask tokens here; take one of timm's beit*, beitv2* or "
            "vit_* models"
        )
    if not isinstance(model, VisionTransformer) or type(model.patch_embed) is not PatchEmbed:
        raise BadInput(
            f"model.name {name} is neither a BEiT nor a plain ViT, so mask tokens cannot stand for its patches; "
            "take one of timm's beit*, beitv2*, vit_* or deit3_* models"
        )
    return check_plain_vit(model, name)


def embed_masked(model: MaskableViT, images: Tensor, mask: Tensor, mask_token: Tensor) -> Tensor:
    """What goes into the first block: patches or mask tokens, with their positions, behind the prefix tokens.

    Args:
        model: of `check_maskable`.
        images: normalised, [B, C, H, W].
        mask: True where a patch is hidden, [B, L].
        mask_token: [1, 1, D].

    Returns:
        [B, P + L, D].
    """
    x = model.patch_embed(images)
    x = x.flatten(1, 2) if x.ndim == 4 else x
    x = torch.where(mask[:, :, None], mask_token, x)
    if isinstance(model, VisionTransformer):
        return model.norm_pre(add_positions(model, x))  # type: ignore[no-any-return]
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], dim=1)
    return x if model.pos_embed is None else x + model.pos_embed


def block_arguments(model: MaskableViT) -> dict[str, Any]:
    """What each block of a model takes besides tokens: the bias that all blocks of a BEiT may share."""
    shared = model.rel_pos_bias if isinstance(model, Beit) else None
    return {} if shared is None else {"shared_rel_pos_bias": shared()}


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, arguments: dict[str, Any]) -> Iterator[Tensor]:
    """The tokens after each of some blocks in turn, [B, P + L, D] each."""
    for block in blocks:
        x = block(x, **arguments)
        yield x
