"""What iBOT and DINOv2 share: the student sees large crops with holes and predicts the teacher's patch tokens there.

Letters: B images, T large crops of each, N = T * B, L patches, M the most that a crop hides, D features, d of the
bottleneck, K prototypes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from foreseen.data.batch import Batch
from foreseen.data.views import Draw, Request, View, denormalise
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.models.backbone import patch_size
from foreseen.models.swin_tokens import is_swin, swin_stride
from foreseen.models.take import take
from foreseen.pretrain import small_machines
from foreseen.pretrain.crops import by_crop, crop_keys
from foreseen.pretrain.distillation_losses import (
    entropy,
    masked_places,
    place_weights,
    row_cross_entropy,
    rows_at_once,
    summed_in_chunks,
)
from foreseen.pretrain.distilled_network import Network, Parts, is_plain_vit
from foreseen.pretrain.feature_health import FeatureHealth
from foreseen.pretrain.self_distillation import ClassTargets, SelfDistillation
from foreseen.pretrain.self_distillation_options import Plan, SelfDistillationOptions
from foreseen.pretrain.small_machines import Size
from foreseen.pretrain.target_balance import Centre, row_sum, scaled_logits, sinkhorn_shift

_PICTURES = 8


class MaskedDistillationOptions(SelfDistillationOptions):
    """Options that iBOT and DINOv2 share."""

    patch_out_dim: int | None = Field(None, ge=2)
    """Prototypes of patch tokens, where they have a last layer of their own; null takes as many as `out_dim`."""
    teacher_patch_temp: float | None = Field(None, gt=0)
    """Temperature of the teacher's softmax for patch tokens; null takes `teacher_temp`."""
    warmup_teacher_patch_temp: float | None = Field(None, gt=0)
    """Temperature that its warm-up begins with; null takes `warmup_teacher_temp`."""
    patch_center_momentum: float = Field(0.9, ge=0, le=1)
    """What the running mean of patch logits keeps of itself at each step."""
    class_weight: float = Field(1.0, ge=0)
    """Of the class tokens' loss."""
    patch_weight: float = Field(1.0, ge=0)
    """Of the patch tokens' loss."""


class Masks(Protocol):
    """The function of a `Draw` that masks the large crops of an image."""

    @property
    def most(self) -> int:
        """The most patches that a crop hides, M."""

    def __call__(self, generator: np.random.Generator, position: int) -> NDArray[np.bool_]:
        """[T, L]."""


class PatchRows(NamedTuple):
    """What is kept of the teacher's patches of one micro-batch.

    Attributes:
        bottleneck: at the places that are compared, [N * M, d].
        weights: of these rows, [N * M].
        places: numbers of the patches, [N, M].
        sum: `row_sum` of what the centre is over.
    """

    bottleneck: Tensor
    weights: Tensor
    places: Tensor
    sum: Tensor


class PatchTargets(NamedTuple):
    """What the teacher says of the hidden patches of one micro-batch.

    Attributes:
        bottleneck: at the places that are compared, [N * M, d].
        weights: of these rows, [N * M, 1]; they add up to the number of crops that have a mask.
        places: numbers of the patches, [N, M].
        prototypes: [K, d].
        shift: that balances the logits, [K].
        temperature: of the softmax.
    """

    bottleneck: Tensor
    weights: Tensor
    places: Tensor
    prototypes: Tensor
    shift: Tensor
    temperature: float


@dataclass(frozen=True)
class Targets:
    """What the teacher says of one micro-batch.

    Attributes:
        classes: of class tokens.
        patches: of hidden patches.
        mask: True where the student's large crops are hidden, crop-major, [N, L].
    """

    classes: ClassTargets
    patches: PatchTargets
    mask: Tensor


class MaskedDistillation(SelfDistillation):
    """Self-distillation of class tokens and of hidden patches.

    Args:
        student: over a plain ViT or a Swin, with a mask token.
        options: of the method.
        large: view of the crops that both networks see.
        small: views of the crops that the student alone sees.
        plan: the options' numbers in this run.
        masks: how crops are hidden.
        patch_prototypes: K of patch tokens.
    """

    centres_all_patches = True  # or those that are hidden

    def __init__(
        self,
        student: Network,
        options: MaskedDistillationOptions,
        large: View,
        small: tuple[View, ...],
        plan: Plan,
        masks: Masks,
        patch_prototypes: int,
    ) -> None:
        super().__init__(student, options, large, small, plan)
        self.patch_options = options
        self._most = masks.most
        if self._most < 1:
            raise BadInput("the masks hide no patch of any crop; raise method.mask_ratio or views.size")
        self._draw = Draw("mask", masks)
        self.patch_centre = None
        if options.centering == "centre":
            self.patch_centre = Centre(patch_prototypes, options.patch_center_momentum)

    @property
    def request(self) -> Request:
        """Large and small crops of each image, and masks of the large ones."""
        return replace(super().request, draws=(self._draw,))

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Targets]:
        """The teacher's bottlenecks, at class tokens and hidden patches, and what balances either."""
        self._check_batches(micro_batches)
        self._features = FeatureHealth()
        masks = [batch.draws["mask"].transpose(0, 1).flatten(0, 1) for batch in micro_batches]
        bottlenecks, rows = [], []
        for batch, mask in zip(micro_batches, masks, strict=True):
            places = self.hidden_places(mask)
            encoded = self._teach(batch, "all" if self._is_centre_over_all else places)
            bottlenecks.append(self.teacher.head(encoded.pooled))
            rows.append(self.patch_rows(_patches(encoded.patches), places, mask))
            del encoded  # before the next are made
        self._features.all_reduce()
        classes = self.class_targets(bottlenecks, progress)
        patches = self.patch_targets(rows, progress)
        return [Targets(*each) for each in zip(classes, patches, masks, strict=True)]

    @property
    def _is_centre_over_all(self) -> bool:
        """Whether the teacher's patches that the student sees count as well."""
        return self.patch_centre is not None and self.centres_all_patches

    def hidden_places(self, mask: Tensor) -> Tensor:
        """Numbers of hidden patches, and of others where there are fewer than M: [N, L] -> [N, M]."""
        return masked_places(mask, self._most)

    def patch_rows(self, tokens: Tensor, places: Tensor, mask: Tensor) -> PatchRows:
        """What targets need of the teacher's patches of a micro-batch.

        Args:
            tokens: of the patches at the places, [N, M, D]; of all, [N, L, D], where the centre is over all.
            places: numbers of hidden patches, [N, M].
            mask: True where hidden, [N, L].
        """
        weights = place_weights(mask, places, torch.promote_types(tokens.dtype, torch.float32)).flatten()
        if self._is_centre_over_all:
            everywhere = self.teacher.patch_bottleneck(tokens)
            rows, total = take(everywhere, places).flatten(0, 1), row_sum(everywhere.flatten(0, 1))
        else:
            rows = self.teacher.patch_bottleneck(tokens).flatten(0, 1)
            total = row_sum(rows, (weights > 0).to(rows.dtype))
        return PatchRows(rows, weights, places, total)

    def patch_targets(self, rows: Sequence[PatchRows], progress: Progress) -> list[PatchTargets]:
        """Targets at the hidden patches of each micro-batch."""
        temperature = self.teacher_patch_temperature(progress)
        prototypes = self.teacher.patch_prototypes()
        if self.patch_centre is None:
            bottlenecks = [each.bottleneck for each in rows]
            hidden = [(each.weights > 0).to(each.bottleneck.dtype) for each in rows]
            at_once = rows_at_once(self.options.logits_chunk, len(prototypes))
            shift = sinkhorn_shift(bottlenecks, prototypes, temperature, weights=hidden, at_once=at_once)
        else:
            self.patch_centre.observe([each.sum for each in rows], prototypes)
            shift = self.patch_centre.shift(temperature)
        return [
            PatchTargets(each.bottleneck, each.weights[:, None], each.places, prototypes, shift, temperature)
            for each in rows
        ]

    def teacher_patch_temperature(self, progress: Progress) -> float:
        """That of a step, for patch tokens."""
        options = self.patch_options
        start, end = options.warmup_teacher_patch_temp, options.teacher_patch_temp
        return self._warmed_up(
            options.warmup_teacher_temp if start is None else start,
            options.teacher_temp if end is None else end,
            progress,
        )

    def forward(self, batch: Batch, prepared: Targets, progress: Progress) -> dict[str, Tensor]:
        """The cross-entropy over pairs of crops and over hidden patches, and KoLeo."""
        large, *small = self.views
        pooled, hidden, _ = self.student.encode(
            batch.images[large.name], crop_keys(batch, large), prepared.mask, patches=prepared.patches.places
        )
        others = [self.student.encode(batch.images[view.name], crop_keys(batch, view)).pooled for view in small]
        classes = self.class_terms(self.student.head(torch.cat([pooled, *others])), prepared.classes)
        rows = self.student.patch_bottleneck(_patches(hidden)).flatten(0, 1)
        patches = self.patch_terms(rows, prepared.patches)
        options = self.patch_options
        loss = options.class_weight * classes["loss"] + options.patch_weight * patches["patch_loss"]
        terms = {"class_loss": classes["loss"], "teacher_entropy": classes["teacher_entropy"], "kl": classes["kl"]}
        return self.with_koleo({"loss": loss, **terms, **patches}, pooled)

    def patch_terms(self, bottleneck: Tensor, targets: PatchTargets) -> dict[str, Tensor]:
        """The loss of hidden patches: a mean over those of a crop, and over all crops, masked or not.

        Args:
            bottleneck: of the student, at the places that are compared, [N * M, d].
            targets: of the teacher.
        """
        function = partial(
            _patch_sums, student_temp=self.options.student_temp, teacher_temp=targets.temperature
        )  # fmt: skip
        fixed = (self.student.patch_prototypes(), targets.prototypes, targets.shift)
        rows = max(1, rows_at_once(self.options.logits_chunk, len(targets.prototypes)) // 2)
        tensors = (bottleneck, targets.bottleneck, targets.weights)
        sums = summed_in_chunks(function, tensors, rows, *fixed) / len(targets.places)
        return {"patch_loss": sums[0], "patch_teacher_entropy": sums[1].detach()}

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """The teacher and both centres move."""
        super().after_step(progress, finite)
        if self.patch_centre is not None:
            self.patch_centre.move(finite)

    def health(self) -> dict[str, Tensor]:
        """What `SelfDistillation` tells, and the length of the patches' centre."""
        found = super().health()
        if self.patch_centre is not None:
            found["patch_center_norm"] = self.patch_centre.center.norm()
        return found

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The crops of some images, the large ones with what the student does not see greyed out."""
        found = super().pictures(batch, progress)
        large = self.large
        images = by_crop(batch.images[large.name], large.count)[:, :_PICTURES]
        step = _hidden_at_once(self.student.backbone)
        grid = (large.size[0] // step[0], large.size[1] // step[1])
        mask = batch.draws["mask"][:_PICTURES].transpose(0, 1)
        mask = mask.reshape(*mask.shape[:2], *grid)
        mask = mask.repeat_interleave(step[0], 2).repeat_interleave(step[1], 3)[:, :, None]
        seen = torch.where(mask, torch.zeros_like(images), images)
        return found | {"global, masked": denormalise(torch.cat(list(seen), dim=3), large.mean, large.std)}


def _patches(tokens: Tensor | None) -> Tensor:
    assert tokens is not None, "check_masks lets only backbones with patch tokens pass"
    return tokens


def _hidden_at_once(backbone: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of what one entry of a mask hides."""
    if is_swin(backbone):
        return (swin_stride(backbone),) * 2
    step = patch_size(backbone)
    assert step is not None
    return step


def check_masks(parts: Parts) -> tuple[int, int]:
    """The grid of patches of a backbone that can be masked.

    Raises:
        BadInput: it has no patch tokens, or large crops do not fit the grid.
    """
    if not (is_plain_vit(parts.backbone) or is_swin(parts.backbone)):
        raise BadInput(
            f"model.name {parts.name} is no plain ViT and no Swin: without patch tokens that a mask token can replace "
            "there is nothing to predict; take one of timm's vit_*, deit_*, deit3_*, swin_* or swinv2_* models, or "
            "method.name=dino"
        )
    size, step = parts.large.size, _hidden_at_once(parts.backbone)
    if any(side % unit for side, unit in zip(size, step, strict=True)):
        near = [max(unit, round(side / unit) * unit) for side, unit in zip(size, step, strict=True)]
        raise BadInput(
            f"views.size {list(size)} is no multiple of {step[0]}, the pixels between places of the last map of "
            f"{parts.name}, which masks hide; views.size={near} fits"
        )
    return size[0] // step[0], size[1] // step[1]


def check_head(options: MaskedDistillationOptions) -> None:
    """Refuse what masks do not go with.

    Raises:
        BadInput: batch statistics, or a temperature above the student's.
    """
    if options.head_batch_norm:
        raise BadInput(
            "method.head_batch_norm is true: its statistics would be over hidden patches and empty places as well; set "
            "it to false, or take method.name=dino"
        )
    for key in ("teacher_patch_temp", "warmup_teacher_patch_temp"):
        value = getattr(options, key)
        if value is not None and value > options.student_temp:
            raise BadInput(
                f"method.{key} {value} is above method.student_temp {options.student_temp}: targets softer than "
                "predictions lead to a uniform collapse; the papers take 0.04 to 0.07 and 0.1"
            )


def count_patch_prototypes(options: MaskedDistillationOptions, plan: Plan, size: Size) -> tuple[int, tuple[str, ...]]:
    """K of patch tokens where they have a last layer of their own, and a sentence if it is many."""
    if options.patch_out_dim is None:
        return plan.prototypes, ()
    count, note = small_machines.prototypes(options.patch_out_dim, size, "method.patch_out_dim")
    return count, () if note is None else (note,)


def _patch_sums(
    rows: Tensor, teacher: Tensor, weights: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, shift: Tensor, *,
    student_temp: float, teacher_temp: float,
) -> Tensor:  # fmt: skip
    logits = scaled_logits(rows, prototypes, student_temp)
    with torch.no_grad():
        targets = (scaled_logits(teacher, teacher_prototypes, teacher_temp) + shift).softmax(dim=-1)
        certain = (weights[:, 0] * entropy(targets)).sum()
    return torch.stack([(weights[:, 0] * row_cross_entropy(logits, targets)).sum(), certain])
