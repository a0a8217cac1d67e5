"""BEiT: hide blocks of patches, and predict which visual token a frozen tokenizer gives each of them.

Bao et al. 2021, BEiT: BERT Pre-Training of Image Transformers, arXiv:2106.08254; Peng et al. 2022, BEiT v2, arXiv:
2208.06366, which hides an exact number of patches and adds patch aggregation; the authors' code is microsoft/unilm at
768a3c8, whose numbers this file reproduces (tests/pretrain/test_beit.py).

Letters: B images, C channels, H and W pixels, L patches, M the most that are hidden, P prefix tokens, D `embed_dim`, K
codes of the tokenizer. Its codes are what the papers call visual tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from foreseen.config import Config, Section
from foreseen.data.batch import Batch
from foreseen.data.block_mask import BlockMask
from foreseen.data.views import Draw, Request, View, configured_view, denormalise
from foreseen.device_keys import subkey
from foreseen.engine.objective import Objective, ParameterRule, Progress, all_reduce_sum
from foreseen.errors import BadInput
from foreseen.handoff.encoder import create_encoder
from foreseen.models.backbone import architecture_of, patch_grid, patch_size
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.frozen import Frozen
from foreseen.models.last_block import run_last_block
from foreseen.models.mask_tokens import (
    MaskableViT,
    block_arguments,
    check_maskable,
    embed_masked,
    run_blocks,
)
from foreseen.models.precision import in_float32
from foreseen.pretrain.beit_aggregation import AggregateOptions, PatchAggregation
from foreseen.pretrain.beit_baselines import NearestVisible, PositionCounts
from foreseen.pretrain.beit_initial import draw, draw_normal, initialise
from foreseen.pretrain.tokenizer_choice import TokenizedOptions, chosen_tokenizer
from foreseen.tokenizers.pictures import code_map
from foreseen.tokenizers.tokenizer import Tokenizer

_PICTURES = 8
_TRIES = 100  # masks that are drawn before it is believed that none of them hides anything
_SPARED = ("vit.cls_token", "vit.pos_embed", "vit.reg_token", "vit.dist_token")
_PAPERS_MASKED, _PAPERS_BLOCK = 75 / 196, 16 / 196


class MaskOptions(Section):
    """Which patches are hidden: blocks of them, until there are enough."""

    num_masked: int | None = Field(None, ge=1)
    """Patches hidden, at most or exactly; null takes `ratio` of them."""
    ratio: float = Field(_PAPERS_MASKED, gt=0, lt=1)
    """Share of the patches hidden where `num_masked` is null: 75 of 196."""
    min_block: int | None = Field(None, ge=1)
    """Smallest area that a block is drawn with, in patches; null takes 16 of every 196."""
    min_aspect: float = Field(0.3, gt=0, le=1)
    """Smallest height over width of a block; the largest is its inverse."""
    exact: bool = False
    """Hide single patches besides until there are exactly so many, as BEiT v2 does."""


class BEiTOptions(TokenizedOptions):
    """Options of `method.name: beit`; the defaults are BEiT v1's."""

    name: Literal["beit"] = "beit"
    mask: MaskOptions = MaskOptions()
    aggregate: AggregateOptions | None = None
    """BEiT v2's patch aggregation; null for none."""


class Prepared(NamedTuple):
    """What a micro-batch is to predict: codes of its patches [B, L], and the patches hidden in the global batch."""

    codes: Tensor
    num_hidden: Tensor


class BEiT(Objective):
    """Masked image modelling of any timm BEiT or plain ViT on the codes of a frozen tokenizer.

    Args:
        vit: the encoder, with its final norm and without a head.
        tokenizer: the visual vocabulary; stays as it is, and is in no checkpoint.
        options: of the method.
        view: what the encoder sees of each image; the size of its input.
        tokenizer_sha256: names the tokenizer's weights; a run goes on only with the same.

    Raises:
        BadInput: the tokenizer has no input with as many codes as there are patches, or the mask hides none or all.
    """

    tokens_scale: Tensor
    tokens_shift: Tensor

    def __init__(
        self,
        vit: MaskableViT,
        tokenizer: Tokenizer,
        options: BEiTOptions,
        view: View,
        tokenizer_sha256: str | None = None,
    ) -> None:
        super().__init__()
        self.vit = vit
        self.options = options
        self.view = view
        self.grid = patch_grid(vit)
        self.num_patches = self.grid[0] * self.grid[1]
        self.mask_draw = _block_mask(options.mask, self.grid)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, vit.embed_dim))
        self.head = nn.Linear(vit.embed_dim, tokenizer.codebook_size)
        self.aggregation = (
            None
            if options.aggregate is None
            else PatchAggregation(vit, tokenizer.codebook_size, options.aggregate)
        )  # fmt: skip
        self.tokenizer = Frozen(tokenizer)
        self.tokenizer_sha256 = tokenizer_sha256
        self.tokens_view = _tokens_view(tokenizer, vit, view)
        # From the encoder's normalisation to the tokenizer's, for images that are not cut twice.
        mean, std, its_mean, its_std = (
            torch.tensor(values).view(-1, 1, 1) for values in (view.mean, view.std, tokenizer.mean, tokenizer.std)
        )
        self.register_buffer("tokens_scale", std / its_std, persistent=False)
        self.register_buffer("tokens_shift", (mean - its_mean) / its_std, persistent=False)
        self.position_counts = PositionCounts(self.num_patches, tokenizer.codebook_size)
        self.nearest_visible = NearestVisible(self.grid)
        draw_normal(self.mask_token)
        draw(self.head)

    @classmethod
    def build(cls, config: Config) -> "BEiT":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`."""
        options = config.method
        assert isinstance(options, BEiTOptions)
        found = chosen_tokenizer(config)
        encoder = create_encoder(config.model, img_size=config.views.size)
        vit = check_maskable(encoder.model, architecture_of(encoder.model)[0])
        if config.model.init_from is None:
            initialise(vit)
        view = configured_view(config.views, encoder.preprocessing.mean, encoder.preprocessing.std)
        return cls(vit, found.tokenizer, options, view, found.sha256)

    @property
    def request(self) -> Request:
        """One random crop, at two sizes where the tokenizer wants its own, and which patches are hidden."""
        views = (self.view,) if self.tokens_view is None else (self.view, self.tokens_view)
        return Request(views=views, draws=(Draw("mask", self.mask_draw),))

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Prepared]:
        """The codes to predict, and how many patches are hidden in the global batch."""
        count = all_reduce_sum(torch.stack([batch.draws["mask"].sum() for batch in micro_batches]).sum())
        codes = [self.codes(batch) for batch in micro_batches]
        self.position_counts.collect(codes, progress.step)
        return [Prepared(each, count.clamp(min=1)) for each in codes]

    def codes(self, batch: Batch) -> Tensor:
        """The tokenizer's codes of a batch, [B, L] int64; in float32 at least, or the precision would change some."""
        tokenizer = self.tokenizer.network
        if self.tokens_view is None:
            images = batch.images[self.view.name] * self.tokens_scale + self.tokens_shift
        else:
            images = batch.images[self.tokens_view.name]
        images = in_float32(images)
        with torch.autocast(images.device.type, enabled=False):
            return tokenizer.encode(images).flatten(1)

    def forward(self, batch: Batch, prepared: Prepared, progress: Progress) -> dict[str, Tensor]:
        """The mean cross-entropy over the hidden patches of the global batch, and how many codes are right.

        "accuracy" stands beside what two guesses without a network reach on the same patches: the code that is most
        frequent there, and that of the nearest visible patch.
        """
        mask, codes = batch.draws["mask"], prepared.codes
        chosen = self.hidden_places(mask)
        with draw_drop_path(self, subkey(batch.key, "drop_path")):
            predictions = self.predict(batch.images[self.view.name], mask, chosen)
        targets, hidden = codes.gather(1, chosen), mask.gather(1, chosen)

        def mean(values: Tensor) -> Tensor:
            # Over the hidden patches of the global batch, once the shares of all micro-batches are averaged.
            return (values * hidden).sum() * progress.shares / prepared.num_hidden

        losses = [mean(_cross_entropy(logits, targets)) for logits in predictions]
        with torch.no_grad():
            guesses = {
                "accuracy": predictions[0].argmax(-1),
                "baseline_position": self.position_counts.frequent[chosen],
                "baseline_neighbour": codes.gather(1, self.nearest_visible(mask, chosen)),
            }
            shown = {name: mean((guess == targets).to(losses[0].dtype)) for name, guess in guesses.items()}
        if len(losses) == 1:
            return {"loss": losses[0], **shown}
        return {"loss": losses[0] + losses[1], "loss_main": losses[0], "loss_aggregated": losses[1], **shown}

    def hidden_places(self, mask: Tensor) -> Tensor:
        """The hidden patches of each image in order, [B, L] -> [B, M]; where fewer are hidden, visible ones follow."""
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        return order[:, : self.mask_draw.target]

    def predict(self, images: Tensor, mask: Tensor, places: Tensor) -> list[Tensor]:
        """Logits over the codebook at some patches, of the encoder and, in BEiT v2, of the aggregated tokens.

        Args:
            images: normalised, [B, C, H, W].
            mask: True where a patch is hidden, [B, L].
            places: numbers of the patches, [B, M].

        Returns:
            One or two times [B, M, K], in float32 at least.
        """
        vit, arguments, prefix = self.vit, block_arguments(self.vit), self.vit.num_prefix_tokens
        *others, last = vit.blocks
        embedded = embed_masked(vit, images, mask, self.mask_token)
        outputs = [embedded, *run_blocks(others, embedded, arguments)]  # by how many blocks they have passed
        first = torch.arange(prefix, device=places.device).expand(len(places), -1)
        tokens = run_last_block(last, outputs[-1], torch.cat([first, prefix + places], dim=1), arguments)
        predictions = [self.head(vit.norm(tokens[:, prefix:]))]
        if self.aggregation is not None:
            early = outputs[self.aggregation.from_block]
            mixed = torch.cat([tokens[:, :prefix], early[:, prefix:]], dim=1)
            aggregated = self.aggregation(mixed, prefix + places, arguments)
            predictions.append((self.aggregation.head or self.head)((self.aggregation.norm or vit.norm)(aggregated)))
        return [in_float32(logits) for logits in predictions]

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """Count the codes of each place."""
        self.position_counts.move(finite)

    def encoder(self) -> nn.Module:
        """The backbone; mask token, head and extra blocks are left behind."""
        return self.vit

    def parameter_rules(self, layer_decay: float | None) -> Mapping[str, ParameterRule]:
        """The authors' weight decay: on mask token and relative positions, not on class token and `pos_embed`."""
        rules = super().parameter_rules(layer_decay)
        return {name: replace(rule, decay=rule.decay and name not in _SPARED) for name, rule in rules.items()}

    def frozen_inputs(self) -> Mapping[str, str]:
        """The tokenizer."""
        return {} if self.tokenizer_sha256 is None else {"tokenizer": self.tokenizer_sha256}

    def health(self) -> dict[str, Tensor]:
        """The share of the vocabulary that was met so far."""
        return {"codes_used": self.position_counts.used()}

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Original, what the encoder sees, target codes, and codes with the predicted ones in the hidden places.

        With a tokenizer that can decode, both kinds of codes are shown as pixels, too.
        """
        batch = _first(batch, _PICTURES)
        images, mask, codes = batch.images[self.view.name], batch.draws["mask"], self.codes(batch)
        places = torch.arange(self.num_patches, device=mask.device).expand(len(mask), -1)
        predicted = torch.where(mask, self.predict(images, mask, places)[0].argmax(-1), codes)
        original = denormalise(images, self.view.mean, self.view.std)
        size = (images.shape[-2], images.shape[-1])
        squares = F.interpolate(mask.view(-1, 1, *self.grid).float(), size=size, mode="nearest")
        maps = [each.view(-1, *self.grid) for each in (codes, predicted)]
        tokenizer = self.tokenizer.network
        row = [original, torch.where(squares > 0, 128, original).to(torch.uint8)]
        row += [code_map(each, tokenizer.codebook_size, size) for each in maps]
        name = "original, masked, codes, predicted codes"
        if tokenizer.has_decoder:
            row += [_as_pixels(tokenizer.decode(each), size) for each in maps]
            name += ", decoded codes, decoded prediction"
        return {name: torch.cat(row, dim=3)}


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """[B, M, K] and [B, M] -> [B, M]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _block_mask(options: MaskOptions, grid: tuple[int, int]) -> BlockMask:
    """The mask that the options ask for on a grid of patches.

    Raises:
        BadInput: it hides no patch, or all of them, or no block fits in.
    """
    patches = grid[0] * grid[1]
    target = options.num_masked or round(options.ratio * patches)
    if not 0 < target < patches:
        key = "ratio" if options.num_masked is None else "num_masked"
        raise BadInput(
            f"method.mask.{key} {getattr(options, key)} hides {target} of {grid[0]}×{grid[1]} patches; at least one "
            "must be hidden and one visible"
        )
    min_block = options.min_block or max(1, round(_PAPERS_BLOCK * patches))
    mask = BlockMask(grid, target, min_block=min_block, min_aspect=options.min_aspect, exact=options.exact)
    if not any(mask(np.random.default_rng(number), number).any() for number in range(_TRIES)):
        raise BadInput(
            f"a grid of {grid[0]}×{grid[1]} patches has no block of method.mask.min_block {min_block} or more that is "
            "smaller on both sides, so nothing would be hidden; set a smaller one or method.mask.exact=true, or change "
            "views.size"
        )
    return mask


def _tokens_view(tokenizer: Tokenizer, vit: MaskableViT, view: View) -> View | None:
    """The same windows at the size that the tokenizer needs for a code a patch; None where it is the encoder's.

    Raises:
        BadInput: the tokenizer has no such size.
    """
    grid, patch = patch_grid(vit), patch_size(vit)
    assert patch is not None, "a model with a grid has patches"
    try:
        size = tokenizer.input_for(grid)
        found = tokenizer.grid(size)
        reason = f"at {size[0]}×{size[1]} px it has {found[0]}×{found[1]} codes"
    except BadInput as error:
        found, reason = None, str(error)
    if found != grid:
        native, own = tokenizer.input_size, tokenizer.grid(tokenizer.input_size)
        raise BadInput(
            f"views.size {list(view.size)} is a grid of {grid[0]}×{grid[1]} patches of {patch[0]}×{patch[1]} px, and "
            f"the tokenizer has no input with a code for each ({reason}); its own {native[0]}×{native[1]} px has "
            f"{own[0]}×{own[1]} codes, which fits views.size={[own[0] * patch[0], own[1] * patch[1]]}"
        )
    if size == view.size and tokenizer.interpolation == view.interpolation:
        return None
    return replace(
        view,
        name="tokens",
        size=size,
        interpolation=tokenizer.interpolation,
        window_of=view.name,
        mean=tokenizer.mean,
        std=tokenizer.std,
    )


def _first(batch: Batch, count: int) -> Batch:
    """The first samples of a batch."""
    return replace(
        batch,
        position=batch.position[:count],
        key=batch.key[:count],
        sample=batch.sample[:count],
        images={name: images[:count] for name, images in batch.images.items()},
        draws={name: values[:count] for name, values in batch.draws.items()},
    )


def _as_pixels(decoded: Tensor, size: tuple[int, int]) -> Tensor:
    """Decoded pixels in [0, 1] as a picture of a size, uint8."""
    resized = F.interpolate(decoded.float(), size=size, mode="bilinear", antialias=True)
    return (resized * 255).round().clamp(0, 255).to(torch.uint8)
