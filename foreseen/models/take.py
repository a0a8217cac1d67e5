"""Some of the tokens of each image. Letters: B images, N tokens, T of them wanted, D `embed_dim`."""

from torch import Tensor

Places = Tensor | slice
"""Tokens of each image: their numbers [B, T], or a row of them that is in the same place in all images."""


def take(tokens: Tensor, places: Places) -> Tensor:
    """Pick tokens of each image: [B, N, D] -> [B, T, D]."""
    if isinstance(places, slice):
        return tokens[:, places]
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))
