"""Five methods in skeleton, built on the objective's contract alone, to prove that nothing is missing from it.

Each has the joints of its paper that strain a training loop (whole-batch statistics, teachers, uneven counts, pairs,
shared windows) on networks of two blocks, 48 wide, that see 32 pixels. The contract tests drive them.

Letters: B images, n crops, L patches, D width, K codes, prototypes or classes, G global batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foreseen.data.batch import Batch
from foreseen.data.views import Draw, Request, View
from foreseen.device_keys import keyed_permutation, keyed_uniform, subkey
from foreseen.engine.objective import Objective, ParameterRule, Progress, all_reduce_max, all_reduce_sum
from foreseen.models.backbone import create_backbone
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.position import resize_pos_embed

SIZE, PATCH, GRID, WIDTH = 32, 8, (4, 4), 48
PATCHES = GRID[0] * GRID[1]


def tiny_vit(num_classes: int = 0) -> VisionTransformer:
    args = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": 2, "num_heads": 3, "dynamic_img_size": True}
    return create_backbone(
        "vit_tiny_patch16_224", img_size=(SIZE, SIZE), num_classes=num_classes, drop_path_rate=0.3, args=args
    )


def encode(
    vit: VisionTransformer, images: Tensor, *, key: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Images [B, 3, H, W] -> tokens after the final norm [B, 1 + L, D], with mask tokens where `mask` [B, L]."""
    x = vit.patch_embed(images)
    positions = resize_pos_embed(vit.pos_embed, GRID, x.shape[1:3], 1)
    x = x.flatten(1, 2)
    if mask is not None:
        x = torch.where(mask[:, :, None], mask_token.to(x), x)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + positions
    with draw_drop_path(vit, key):
        return vit.norm(vit.blocks(x))


def in_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def crop_keys(batch: Batch, view: str, count: int) -> Tensor:
    """One key per crop of a view, crop-major like its images: [n * B]."""
    return torch.cat([subkey(batch.key, f"{view}/{crop}") for crop in range(count)])


def blockwise_mask(generator: np.random.Generator, position: int) -> NDArray[np.bool_]:
    """BEiT's loop, drawn in the worker since it is sequential: [L], at most half the patches, often fewer."""
    mask = np.zeros(GRID, dtype=bool)
    for _ in range(10):
        height, width = generator.integers(1, GRID)
        top, left = generator.integers(0, GRID[0] - height), generator.integers(0, GRID[1] - width)
        block = mask[top : top + height, left : left + width]
        if mask.sum() + (~block).sum() <= mask.size // 2:
            block[:] = True
            if generator.random() < 0.4:
                break
    return mask.ravel()


class BEiT(Objective):
    """Codes of a frozen tokenizer at masked patches: another size of the same window, and uneven counts."""

    codes, most_masked = 64, PATCHES // 2
    request = Request(
        views=(
            View("input", (SIZE, SIZE)),
            View("tokenizer", (16, 16), window_of="input", mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
        draws=(Draw("mask", blockwise_mask),),
    )

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.head = tiny_vit(), nn.Linear(WIDTH, self.codes)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.tokenizer = nn.Conv2d(3, self.codes, 4, stride=4).requires_grad_(False)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[tuple[Tensor, Tensor]]:
        count = all_reduce_sum(torch.stack([batch.draws["mask"].sum() for batch in micro_batches]).sum())
        with torch.autocast(count.device.type, enabled=False):  # a code must not flip with the precision of a run
            codes = [self.tokenizer(batch.images["tokenizer"]).flatten(2).argmax(1) for batch in micro_batches]
        return [(each, count.clamp(min=1)) for each in codes]

    def forward(self, batch: Batch, prepared: tuple[Tensor, Tensor], progress: Progress) -> dict[str, Tensor]:
        codes, count = prepared
        mask = batch.draws["mask"]
        x = encode(self.vit, batch.images["input"], mask=mask, mask_token=self.mask_token, key=batch.key)[:, 1:]
        # As many places for each image as any mask can fill: nothing asks the device how many there are.
        chosen = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.most_masked]
        logits = in_float32(self.head(x.gather(1, chosen[:, :, None].expand(-1, -1, WIDTH))))
        losses = F.cross_entropy(logits.flatten(0, 1), codes.gather(1, chosen).flatten(), reduction="none")
        return {"loss": self.mean_over_masked(losses, mask.gather(1, chosen).flatten(), count, progress)}

    def mean_over_masked(self, losses: Tensor, masked: Tensor, count: Tensor, progress: Progress) -> Tensor:
        return (losses * masked).sum() * progress.shares / count


class Head(nn.Module):
    """Tokens [..., D] -> bottleneck [..., 16] of unit length; `prototypes` -> logits [..., K]."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, 16))
        self.last_layer = nn.Parameter(torch.randn(prototypes, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(in_float32(self.mlp(tokens)), dim=-1)

    def logits(self, bottleneck: Tensor) -> Tensor:
        return bottleneck @ F.normalize(in_float32(self.last_layer), dim=-1).mT


def sinkhorn(logits: Sequence[Tensor], weights: Sequence[Tensor], iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp over the rows of all micro-batches and ranks, as the [K] vector `log_u`.

    The balanced targets of a row are softmax(logits + log_u), so nothing larger than [K] is kept or sent.

    Args:
        logits: teacher logits / temperature, [rows, K] per micro-batch.
        weights: 1 for rows that count, 0 for others, [rows] per micro-batch.
    """
    peak = all_reduce_max(torch.stack([x.amax() for x in logits]).amax())
    columns = sum(w @ (x - peak).exp() for x, w in zip(logits, weights, strict=True))
    log_u = -all_reduce_sum(columns).log()
    for _ in range(iterations - 1):
        columns = sum(w @ (x + log_u).softmax(dim=-1) for x, w in zip(logits, weights, strict=True))
        log_u = log_u - all_reduce_sum(columns).log()
    return log_u


def koleo(features: Tensor, group: int) -> Tensor:
    """Spread features [B, D] out: -log distance to the nearest of the same group of consecutive positions."""
    z = F.normalize(in_float32(features).unflatten(0, (-1, group)), dim=-1)
    similarity = (z @ z.mT).detach().masked_fill(torch.eye(group, dtype=torch.bool, device=z.device), -2.0)
    nearest = z.gather(1, similarity.argmax(-1, keepdim=True).expand_as(z))
    return -((z - nearest).norm(dim=-1) + 1e-8).log().mean()


class Targets(NamedTuple):
    """What a teacher says of one micro-batch: bottleneck features, and [K] vectors that balance them."""

    mask: Tensor
    cls: Tensor
    patches: Tensor
    cls_shift: Tensor
    patch_shift: Tensor


class IBOT(Objective):
    """EMA teacher, two global and two local crops, whole-batch balance of targets, stratified masks, KoLeo."""

    prototypes, num_local, temperature, momentum, frozen_steps = 32, 2, 0.07, 0.9, 2
    group = 4
    request = Request(
        views=(
            View("global", (SIZE, SIZE), scale=(0.25, 1.0), count=2),
            View("local", (16, 16), scale=(0.05, 0.25), count=num_local),
        )
    )

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.ModuleDict({"vit": tiny_vit(), "head": Head(self.prototypes)})
        self.teacher = nn.ModuleDict({"vit": tiny_vit(), "head": Head(self.prototypes)}).requires_grad_(False)
        self.teacher.load_state_dict(self.student.state_dict())
        self.mask_token = nn.Parameter(torch.zeros(1, 1, WIDTH))

    def parameter_rules(self, layer_decay: float | None) -> Mapping[str, ParameterRule]:
        rules = dict(super().parameter_rules(layer_decay))
        last = "student.head.last_layer"
        return rules | {last: replace(rules[last], frozen_steps=self.frozen_steps)}

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Targets]:
        masks = [self.stratified_mask(batch, progress) for batch in micro_batches]
        heads = [
            self.teacher["head"](encode(self.teacher["vit"], b.images["global"], key=b.key)) for b in micro_batches
        ]
        cls, patches = [x[:, 0] for x in heads], [x[:, 1:] for x in heads]
        cls_shift, patch_shift = self.shifts(cls, patches, masks)
        return [Targets(m, c, p, cls_shift, patch_shift) for m, c, p in zip(masks, cls, patches, strict=True)]

    def stratified_mask(self, batch: Batch, progress: Progress) -> Tensor:
        """Half of the global batch's 2G crops are masked, their ratios one from each of G slices of [0.1, 0.5]."""
        size = progress.shares * len(batch)
        place = batch.position % size  # of a step that may have been passed over, so not by its number
        slots = keyed_permutation(progress.key(place.device), "mask ratio", 2 * size)[0]
        slot = slots[torch.cat([place, size + place])]
        keys = crop_keys(batch, "mask", 2)
        ratio = 0.1 + 0.4 * (slot + keyed_uniform(keys, "ratio", 1)[:, 0]) / size
        count = torch.where(slot < size, (ratio * PATCHES).long(), 0)
        return keyed_permutation(keys, "mask", PATCHES) < count[:, None]

    def shifts(self, cls: list[Tensor], patches: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The [K] vectors to add to logits / temperature, from the global batch."""
        weights = [torch.ones_like(x[:, 0]) for x in cls]
        return (
            sinkhorn([self.teacher_logits(x) for x in cls], weights),
            sinkhorn(
                [self.teacher_logits(x).flatten(0, 1) for x in patches], [m.flatten().to(weights[0]) for m in masks]
            ),
        )

    def teacher_logits(self, bottleneck: Tensor) -> Tensor:
        return self.teacher["head"].logits(bottleneck) / self.temperature

    def forward(self, batch: Batch, prepared: Targets, progress: Progress) -> dict[str, Tensor]:
        vit, head, mask = self.student["vit"], self.student["head"], prepared.mask
        large = encode(
            vit, batch.images["global"], mask=mask, mask_token=self.mask_token, key=crop_keys(batch, "global", 2)
        )
        small = encode(vit, batch.images["local"], key=crop_keys(batch, "local", self.num_local))[:, 0]
        log_p = (
            (head.logits(head(torch.cat([large[:, 0], small]))) / 0.1).log_softmax(-1).unflatten(0, (-1, len(batch)))
        )
        targets = (self.teacher_logits(prepared.cls) + prepared.cls_shift).softmax(-1).unflatten(0, (2, -1))
        pairs = [(t, s) for t in range(2) for s in range(len(log_p)) if s != t]
        cls_loss = -sum((targets[t] * log_p[s]).sum(-1).mean() for t, s in pairs) / len(pairs)

        patch_targets = (self.teacher_logits(prepared.patches) + prepared.patch_shift).softmax(-1)
        patch_losses = -(patch_targets * (head.logits(head(large[:, 1:])) / 0.1).log_softmax(-1)).sum(-1)
        patch_loss = ((patch_losses * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        spread = sum(self.koleo(crop) for crop in large[:, 0].chunk(2))
        return {"loss": cls_loss + patch_loss + 0.1 * spread, "cls": cls_loss, "patch": patch_loss, "koleo": spread}

    def koleo(self, features: Tensor) -> Tensor:
        return koleo(features, self.group)

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        share = 0.1 * 0.5 * (1 + math.cos(math.pi * progress.fraction))
        for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            old.lerp_(new, share * finite.to(old.dtype))


class CentredIBOT(IBOT):
    """The same with running centres in place of Sinkhorn-Knopp: state that moves after the step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(2, self.prototypes))

    def shifts(self, cls: list[Tensor], patches: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor]:
        self.new_centres = torch.stack([self.mean_logits(cls), self.mean_logits(patches)])
        return -self.centres[0], -self.centres[1]

    def mean_logits(self, bottlenecks: list[Tensor]) -> Tensor:
        rows = [self.teacher_logits(x).flatten(0, -2) for x in bottlenecks]
        total = torch.cat([sum(x.sum(0) for x in rows), rows[0].new_tensor([sum(map(len, rows))])])
        total = all_reduce_sum(total)
        return total[:-1] / total[-1]

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        super().after_step(progress, finite)
        moved = self.centres.lerp(self.new_centres, 1 - self.momentum)
        self.centres.copy_(torch.where(finite, moved, self.centres))


class SimMIM(Objective):
    """Pixels at masked units, on a Swin that meets its mask token after the patch embedding."""

    unit = 8  # pixels, the stride of the last stage
    request = Request(views=(View("input", (SIZE, SIZE), scale=(0.67, 1.0), interpolation="bilinear"),))

    def __init__(self) -> None:
        super().__init__()
        self.swin = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=SIZE, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2),
            num_heads=(2, 4), drop_path_rate=0.0, num_classes=0,
        )  # fmt: skip
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 1, 24))
        self.decoder = nn.Sequential(nn.Conv2d(WIDTH, 3 * self.unit**2, 1), nn.PixelShuffle(self.unit))

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        images = batch.images["input"]
        units = SIZE // self.unit
        mask = keyed_permutation(batch.key, "mask", units**2).view(-1, 1, units, units) < math.ceil(0.6 * units**2)
        x = self.swin.patch_embed(images)
        on_patches = F.interpolate(mask.to(x), size=x.shape[1:3]).movedim(1, 3).bool()
        x = torch.where(on_patches, self.mask_token.to(x), x)
        predicted = self.decoder(self.swin.norm(self.swin.layers(x)).movedim(3, 1))
        on_pixels = F.interpolate(mask.to(images), size=(SIZE, SIZE))
        errors = (in_float32(predicted) - images).abs() * on_pixels
        return {"loss": errors.sum() / (3 * on_pixels.sum())}  # every image hides as many, so this is its own mean


def draw_lambda(generator: np.random.Generator, position: int) -> NDArray[np.float32]:
    return np.float32(generator.beta(0.8, 0.8))


def mix_pairs(x: Tensor, share: Tensor) -> Tensor:
    """Blend positions 2k and 2k + 1, each keeping `share` [B] of itself."""
    share = share.to(x).view(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


class Supervised(Objective):
    """Classification with mixup of keyed pairs, label smoothing and drop path."""

    classes, group = 4, 2
    request = Request(views=(View("input", (SIZE, SIZE)),), draws=(Draw("lambda", draw_lambda, group=2),), labels=True)

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(self.classes)

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        logits, targets = self.logits_and_targets(batch)
        return {"loss": F.cross_entropy(in_float32(logits), targets, label_smoothing=0.1)}

    def logits_and_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = mix_pairs(batch.images["input"], batch.draws["lambda"])
        logits = self.vit.head(encode(self.vit, images, key=batch.key)[:, 0])
        targets = F.one_hot(batch.label, self.classes).to(in_float32(logits).dtype)
        return logits, mix_pairs(targets, batch.draws["lambda"])


class Distillation(Supervised):
    """A frozen teacher with batch norm sees the same mixed crop at its own size and normalisation."""

    request = replace(
        Supervised.request,
        views=(
            *Supervised.request.views,
            View("teacher", (24, 24), window_of="input", mean=(0.5,) * 3, std=(0.5,) * 3),
        ),
    )

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Conv2d(3, 16, 8, stride=8), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(144, self.classes)
        self.teacher = nn.Sequential(*layers).requires_grad_(False)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Tensor]:
        return [self.teacher(mix_pairs(b.images["teacher"], b.draws["lambda"])).argmax(1) for b in micro_batches]

    def forward(self, batch: Batch, prepared: Tensor, progress: Progress) -> dict[str, Tensor]:
        logits, targets = self.logits_and_targets(batch)
        losses = [F.cross_entropy(in_float32(logits), each) for each in (targets, prepared)]
        return {"loss": (losses[0] + losses[1]) / 2, "labels": losses[0], "teacher": losses[1]}


SKELETONS: dict[str, type[Objective]] = {
    skeleton.__name__: skeleton for skeleton in (BEiT, IBOT, CentredIBOT, SimMIM, Supervised, Distillation)
}
