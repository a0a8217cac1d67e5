"""The last block of a transformer, for some of its tokens: nothing looks at the others behind it.

They are only attended to. Computing them as well would be a fiftieth of MAE's arithmetic, a thirtieth of BEiT's, and a
twelfth of DINO's with a ViT of twelve blocks, where the class token alone is pooled. The block's own forward is not
called, so it is neither compiled nor recomputed where the others are.

Letters: B images, N tokens, T of them wanted, D `embed_dim`, h heads of width d.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.beit import Block as BeitBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from foreseen.models.take import Places, take


def run_last_block(block: Any, x: Tensor, places: Places, arguments: dict[str, Any] | None = None) -> Tensor:
    """What a block makes of some of its tokens.

    Args:
        block: of any timm ViT or BEiT; those of another kind compute all tokens.
        x: all tokens, [B, N, D].
        places: tokens that are wanted.
        arguments: what the block takes besides.

    Returns:
        [B, T, D].
    """
    arguments = arguments or {}
    if not isinstance(block, BeitBlock | Block):
        return take(block(x, **arguments), places)
    y, wanted = block.norm1(x), take(x, places)
    attended = _attended(block.attn, y, places, arguments)
    wanted = wanted + block.drop_path1(_scaled(block, 1, attended))
    return wanted + block.drop_path2(_scaled(block, 2, block.mlp(block.norm2(wanted))))  # type: ignore[no-any-return]


def _scaled(block: Any, branch: int, y: Tensor) -> Tensor:
    """What a branch of a block adds to its tokens, layer scale applied; branch 1 is the attention, 2 the MLP."""
    if not isinstance(block, BeitBlock):
        return getattr(block, f"ls{branch}")(y)  # type: ignore[no-any-return]
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


def _attended(attention: Any, y: Tensor, places: Places, arguments: dict[str, Any]) -> Tensor:
    """What attention makes of some tokens, [B, N, D] -> [B, T, D], with queries of these alone where that is known."""
    simple = type(attention) is Attention and attention.gate is None and not arguments
    if not simple:
        return take(attention(y, **arguments), places)
    queries, width = take(y, places), attention.head_dim
    normed = not (isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity))
    few = 2 * queries.shape[1] <= width and not normed
    mixed = (_mix_tokens if few else _mix_values)(attention, queries, y)
    return attention.proj(attention.norm(mixed))  # type: ignore[no-any-return]


def _mix_values(attention: Any, queries: Tensor, y: Tensor) -> Tensor:
    """Attention as usual: keys and values of all tokens. [B, T, D] and [B, N, D] -> [B, T, h * d]."""
    inner, heads, width = attention.attn_dim, attention.num_heads, attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    of_queries, of_others = (None, None) if bias is None else (bias[:inner], bias[inner:])
    (b, t), n = queries.shape[:2], y.shape[1]
    q = F.linear(queries, weight[:inner], of_queries).view(b, t, heads, width).transpose(1, 2)
    k, v = F.linear(y, weight[inner:], of_others).view(b, n, 2, heads, width).permute(2, 0, 3, 1, 4)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if attention.fused_attn:
        mixed = F.scaled_dot_product_attention(q, k, v)
    else:
        mixed = ((q * attention.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return mixed.transpose(1, 2).flatten(2)


def _mix_tokens(attention: Any, queries: Tensor, y: Tensor) -> Tensor:
    """Attention of a few queries, without keys and values. [B, T, D] and [B, N, D] -> [B, T, h * d].

    A query times a key is the query, taken back through the weights of keys, times the token; the bias of keys is the
    same for all tokens and goes out in the softmax. Values are taken of the mixed tokens, whose weights sum to 1.
    """
    inner, heads, width = attention.attn_dim, attention.num_heads, attention.head_dim
    weight, bias = attention.qkv.weight, attention.qkv.bias
    of_queries, of_keys, of_values = weight.view(3, heads, width, -1).unbind(0)  # [h, d, D] each
    b, t = queries.shape[:2]
    q = F.linear(queries, of_queries.flatten(0, 1), None if bias is None else bias[:inner]) * attention.scale
    sought = torch.einsum("bthd,hdc->bhtc", q.view(b, t, heads, width), of_keys).flatten(1, 2)  # [B, h * T, D]
    mixed = ((sought @ y.transpose(1, 2)).softmax(dim=-1) @ y).view(b, heads, t, -1)
    values = torch.einsum("bhtc,hdc->bthd", mixed, of_values).reshape(b, t, inner)
    return values if bias is None else values + bias[2 * inner :]
