"""Patch aggregation: BEiT v2's way to make the class token carry the image.

The patches of an early block are put beside the last block's class token, and two extra blocks must predict the codes
from them: what the early patches lack has to come through the class token. Extra blocks are left behind after training.

Peng et al. 2022, arXiv:2208.06366, section 2.4; microsoft/unilm at 768a3c8, beit2/modeling_pretrain.py.
"""

import copy
from typing import Any

from pydantic import Field
from torch import Tensor, nn

from foreseen.config import Section
from foreseen.errors import BadInput
from foreseen.models.last_block import run_last_block
from foreseen.models.mask_tokens import MaskableViT, run_blocks
from foreseen.pretrain.beit_initial import begin_anew, draw, shrink


class AggregateOptions(Section):
    """BEiT v2's patch aggregation."""

    from_block: int = Field(9, ge=1)
    """Patches are taken after so many blocks: 9 of 12, 21 of 24."""
    depth: int = Field(2, ge=1)
    """Extra blocks."""
    shared_head: bool = True
    """Whether the final norm and the head are those of the encoder."""


class PatchAggregation(nn.Module):
    """The extra blocks, and a norm and head of their own where they share none.

    Args:
        vit: the encoder, whose blocks the extra ones are like; they go on with its drop path rates.
        codebook_size: K.
        options: of the method.

    Raises:
        BadInput: the encoder has not so many blocks.
    """

    def __init__(self, vit: MaskableViT, codebook_size: int, options: AggregateOptions) -> None:
        super().__init__()
        depth = len(vit.blocks)
        if options.from_block >= depth:
            raise BadInput(
                f"method.aggregate.from_block {options.from_block} is not before the last of the encoder's {depth} "
                f"blocks; take one in [1, {depth - 1}]"
            )
        self.from_block = options.from_block
        numbers = range(options.from_block, options.from_block + options.depth)
        self.blocks = nn.ModuleList(copy.deepcopy(vit.blocks[min(number, depth - 1)]) for number in numbers)
        for block in self.blocks:
            begin_anew(block)
        shrink(self.blocks, first=options.from_block + 1)
        self.norm = self.head = None
        if not options.shared_head:
            self.norm = copy.deepcopy(vit.norm)
            begin_anew(self.norm)
            self.head = nn.Linear(vit.embed_dim, codebook_size)
            draw(self.head)

    def forward(self, tokens: Tensor, places: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Run the extra blocks, [B, P + L, D] -> [B, T, D].

        Args:
            tokens: the last block's prefix tokens and an early block's patches.
            places: numbers of the tokens wanted, [B, T].
            arguments: what each block takes besides; see `block_arguments`.
        """
        *others, last = self.blocks
        *_, tokens = tokens, *run_blocks(others, tokens, arguments)
        return run_last_block(last, tokens, places, arguments)
