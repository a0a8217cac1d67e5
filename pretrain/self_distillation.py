"""What DINO, iBOT and DINOv2 share: a student that predicts, from other crops, what its own slow copy says of an image.

Letters: B images, S crops of each for the student, T of them large and for the teacher as well, L patches, D features,
d of the bottleneck, K prototypes.
"""

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foreseen.config import Config, MethodOptions
from foreseen.data.batch import Batch
from foreseen.data.multicrop import MultiCrop, multicrop_views
from foreseen.data.views import Request, View, denormalise
from foreseen.device_keys import subkey
from foreseen.engine.layer_decay import lr_scales
from foreseen.engine.objective import Objective, ParameterRule, Progress, all_reduce_sum
from foreseen.engine.schedule import cosine, linear
from foreseen.engine.teacher import move_teacher
from foreseen.errors import BadInput
from foreseen.handoff.encoder import create_encoder
from foreseen.models.accepted_sizes import check_size
from foreseen.models.backbone import architecture_of
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.masked_vit import check_plain_vit
from foreseen.models.position import PositionResize
from foreseen.models.projection_head import ProjectionHead
from foreseen.models.vit_tokens import vit_tokens
from foreseen.pretrain import small_machines
from foreseen.pretrain.collapse import CollapseAlarm
from foreseen.pretrain.crops import by_crop, crop_keys
from foreseen.pretrain.distillation_losses import crop_cross_entropy, entropy, rows_at_once, summed_in_chunks
from foreseen.pretrain.feature_health import FeatureMoments, patch_diversity
from foreseen.pretrain.small_machines import Size
from foreseen.pretrain.target_balance import Centre, scaled_logits, sinkhorn_shift

_PICTURES = 8


class SelfDistillationOptions(MethodOptions):
    """Options that DINO, iBOT and DINOv2 share."""

    out_dim: int | None = Field(65_536, ge=2)
    """Prototypes, K; null fits them to the data and the batch (`pretrain/small_machines.py`)."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the head's MLP."""
    bottleneck_dim: int = Field(256, ge=1)
    """Length of the unit vector that is compared with the prototypes."""
    head_layers: int = Field(3, ge=1)
    """Layers of the head's MLP."""
    head_batch_norm: bool = False
    norm_last_layer: bool = True
    """Hold the prototypes at unit length; else each has a gain that is trained. True is the stabler."""
    student_temp: float = Field(0.1, gt=0)
    teacher_temp: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax after its warm-up."""
    warmup_teacher_temp: float = Field(0.04, gt=0)
    """Temperature that the warm-up begins with."""
    warmup_teacher_temp_epochs: float | None = Field(None, ge=0)
    """Linear warm-up of the teacher's temperature; null takes 30 % of the run, at most 37,500 steps."""
    teacher_temp_per: Literal["epoch", "step"] = "epoch"
    """Whether the temperature moves once an epoch, as in DINO and iBOT, or at every step, as in DINOv2."""
    teacher_momentum: float | None = Field(0.996, ge=0, lt=1)
    """What the teacher keeps of itself at the first step; half a cosine leads to 1. Null fits it to batch and run."""
    centering: Literal["centre", "sinkhorn"] = "centre"
    """How targets are balanced: by a running mean of the teacher's logits, or by Sinkhorn-Knopp over each batch."""
    center_momentum: float = Field(0.9, ge=0, le=1)
    """What that running mean keeps of itself at each step."""
    freeze_last_layer_epochs: float = Field(1.0, ge=0)
    """The prototypes are not trained for so long."""
    head_warmup_steps: int = Field(0, ge=0)
    """For so many first steps the heads alone are trained, for a backbone that begins from `model.init_from`."""
    patch_embed_lr_scale: float = Field(1.0, gt=0)
    """Factor on the lr of a ViT's patch embedding, on top of `optim.layer_decay`."""
    position_resize: PositionResize = "offset"
    """How a ViT's positions are interpolated for small crops: "offset" as in DINO, iBOT and DINOv2; "antialias" as in
    timm."""
    logits_chunk: int | None = Field(None, ge=1)
    """Rows of logits held at once, of student and teacher together; more are made in turn, and again in the backward
    pass. Null takes as many as have 2^25 logits (128 MiB). Results differ by rounding alone."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What happens when the numbers show that the run has collapsed."""
    crops: MultiCrop = MultiCrop()
    """The large and small crops; their colours."""

    @model_validator(mode="after")
    def _teacher_is_sharper(self) -> Self:
        for key in ("teacher_temp", "warmup_teacher_temp"):
            if getattr(self, key) > self.student_temp:
                raise ValueError(
                    f"method.{key} {getattr(self, key)} is above method.student_temp {self.student_temp}: targets "
                    "softer than predictions lead to a uniform collapse; the papers take 0.04 to 0.07 and 0.1"
                )
        return self


@dataclass(frozen=True)
class Plan:
    """What options come to in a run of some size.

    Attributes:
        prototypes: K.
        momentum: of the teacher at the first step.
        temperature_steps: of the temperature's warm-up, if no epochs are stated for it.
        frozen_steps: of the last layer.
        grace_steps: before collapse is looked for.
        notes: sentences about it.
    """

    prototypes: int
    momentum: float
    temperature_steps: int
    frozen_steps: int
    grace_steps: int
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Config) -> "Plan":
        """That of a config with its length resolved."""
        options = config.method
        assert isinstance(options, SelfDistillationOptions)
        size = Size.of(config)
        prototypes, of_prototypes = small_machines.prototypes(options.out_dim, size, "method.out_dim")
        momentum, of_momentum = small_machines.teacher_momentum(options.teacher_momentum, size)
        epochs = options.warmup_teacher_temp_epochs
        if epochs is None:
            temperature_steps, of_temperature = small_machines.temperature_warmup(size)
            of_warmup = of_temperature if options.teacher_temp != options.warmup_teacher_temp else None
        else:
            temperature_steps, of_warmup = round(epochs * size.steps_per_epoch), None
        return cls(
            prototypes=prototypes,
            momentum=momentum,
            temperature_steps=temperature_steps,
            frozen_steps=round(options.freeze_last_layer_epochs * size.steps_per_epoch),
            grace_steps=(config.optim.warmup_steps or 0) + options.head_warmup_steps,
            notes=tuple(note for note in (of_prototypes, of_momentum, of_warmup) if note is not None),
        )


class Network(nn.Module):
    """A backbone and the heads that go on from its features; the student has a mask token besides, where it needs one.

    Args:
        backbone: a timm model without classes.
        head: of its pooled features.
        patch_head: of its patch tokens; None where `head` serves them, or nobody does.
        resize: of a plain ViT's positions.
        masks: whether patches can be hidden.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ProjectionHead,
        patch_head: ProjectionHead | None = None,
        *,
        resize: PositionResize,
        masks: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head
        described: Any = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, described.num_features)) if masks else None
        self._resize: PositionResize = resize

    def patch_bottleneck(self, tokens: Tensor) -> Tensor:
        """Patch tokens [N, M, D] -> [N, M, d]."""
        head = self.head if self.patch_head is None else self.patch_head
        rows: Tensor = head(tokens.flatten(0, 1))
        return rows.view(*tokens.shape[:2], -1)

    def patch_prototypes(self) -> Tensor:
        """Of patch tokens, [K, d]."""
        return self.head.patch_prototypes() if self.patch_head is None else self.patch_head.prototypes()

    def encode(
        self, images: Tensor, key: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the backbone.

        Args:
            images: normalised, [N, C, H, W].
            key: for drop path, [N]; None where none is drawn, in evaluation.
            mask: patches hidden, [N, L]; for plain ViTs.

        Returns:
            Features pooled as the backbone's own head would, [N, D]; and patch tokens [N, L, D] of a plain ViT.
        """
        backbone: Any = self.backbone
        with nullcontext() if key is None else draw_drop_path(backbone, subkey(key, "drop_path")):
            if not is_plain_vit(backbone):
                return backbone(images), None
            tokens = vit_tokens(backbone, images, mask=mask, mask_token=self.mask_token, resize=self._resize)
        return backbone.forward_head(tokens, pre_logits=True), tokens[:, backbone.num_prefix_tokens :]


def is_plain_vit(model: nn.Module) -> bool:
    """Whether a backbone's patches can be hidden, and its positions be interpolated, here."""
    if not isinstance(model, VisionTransformer):
        return False
    try:
        check_plain_vit(model, "")
    except BadInput:
        return False
    return True


class ClassTargets(NamedTuple):
    """What the teacher says of one micro-batch's images.

    Attributes:
        bottleneck: [T, B, d].
        prototypes: [K, d].
        shift: that balances the logits, [K].
        temperature: of the softmax.
    """

    bottleneck: Tensor
    prototypes: Tensor
    shift: Tensor
    temperature: float


class SelfDistillation(Objective):
    """A student and its EMA teacher, and the class tokens' part of the loss; see `DINO`.

    Args:
        student: with its weights.
        options: of the method.
        large: view of the crops that both networks see.
        small: views of the crops that the student alone sees.
        plan: the options' numbers in this run.
    """

    drops_gradient = True  # of a frozen last layer

    def __init__(
        self,
        student: Network,
        options: SelfDistillationOptions,
        large: View,
        small: tuple[View, ...],
        plan: Plan,
    ) -> None:
        super().__init__()
        self.student = student
        teacher = copy.deepcopy(student)
        teacher.mask_token = None  # the teacher sees whole images
        self.teacher = teacher.requires_grad_(False)
        self.options = options
        self.plan = plan
        self.notes = plan.notes
        self.large, self.views = large, (large, *small)
        self.num_large, self.num_crops = large.count, sum(view.count for view in self.views)
        self.centre = Centre(plan.prototypes, options.center_momentum) if options.centering == "centre" else None
        self._batch_norms = [m for m in self.teacher.modules() if isinstance(m, _BatchNorm)]
        self._alarm = CollapseAlarm(
            plan.prototypes, grace_steps=plan.grace_steps, stop=options.on_collapse == "stop"
        )  # fmt: skip
        self._mean_target: Tensor | None = None
        self._moments: FeatureMoments | None = None
        self._diversity: Tensor | None = None

    @property
    def request(self) -> Request:
        """Large and small crops of each image."""
        return Request(views=self.views)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; BatchNorm of the teacher uses and counts its own batches, as in the papers' code.

        So the statistics that are handed on are those of the teacher's own features.
        """
        super().train(mode)
        for norm in self._batch_norms:
            norm.train(mode)
        return self

    def encoder(self) -> nn.Module:
        """The teacher's backbone, which is the better one."""
        return self.teacher.backbone

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> Sequence[Any]:
        """The teacher's bottlenecks of each micro-batch, and what balances them over the global batch."""
        self._check_batches(micro_batches)
        encoded = [self._teach(batch) for batch in micro_batches]
        bottlenecks = [self.teacher.head(pooled) for pooled, _ in encoded]
        self._look(encoded)
        return self.class_targets(bottlenecks, progress)

    def _teach(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return self.teacher.encode(batch.images[self.large.name])

    def class_targets(self, bottlenecks: Sequence[Tensor], progress: Progress) -> list[ClassTargets]:
        """Targets for the class tokens of each micro-batch, from the teacher's bottlenecks [T * B, d], crop-major."""
        temperature = self.teacher_temperature(progress)
        prototypes = self.teacher.head.prototypes()
        at_once = rows_at_once(self.options.logits_chunk, len(prototypes))
        if self.centre is not None:
            self.centre.observe(bottlenecks, prototypes)
            shift = self.centre.shift(temperature)
        else:
            shift = sinkhorn_shift(bottlenecks, prototypes, temperature, at_once=at_once)
        used = partial(_target_sum, temperature=temperature)
        total = torch.stack([summed_in_chunks(used, (each,), at_once, prototypes, shift) for each in bottlenecks])
        total = all_reduce_sum(total.sum(0))
        self._mean_target = total / total.sum()
        return [ClassTargets(by_crop(each, self.num_large), prototypes, shift, temperature) for each in bottlenecks]

    def _look(self, encoded: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        self._moments = FeatureMoments([pooled for pooled, _ in encoded])
        patches = [tokens for _, tokens in encoded if tokens is not None]
        self._diversity = patch_diversity(patches) if patches else None

    def _check_batches(self, micro_batches: Sequence[Batch]) -> None:
        if self._batch_norms and min(map(len, micro_batches)) < 2:
            raise BadInput(
                "a micro-batch of one picture has no batch statistics, which BatchNorm needs: set batch.micro_size to "
                "2 or more, or method.head_batch_norm=false with a backbone that has no BatchNorm"
            )

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The cross-entropy of student and teacher over all pairs of different crops."""
        pooled = torch.cat(
            [self.student.encode(batch.images[view.name], crop_keys(batch, view))[0] for view in self.views]
        )
        return self.class_terms(self.student.head(pooled), prepared)

    def class_terms(self, bottleneck: Tensor, targets: ClassTargets) -> dict[str, Tensor]:
        """The loss of the class tokens, and its two parts: the targets' entropy and what is left, the divergence.

        Args:
            bottleneck: of the student, [S * B, d], crop-major.
            targets: of the teacher.
        """
        crops = by_crop(bottleneck, self.num_crops)
        function = partial(_class_sums, student_temp=self.options.student_temp, teacher_temp=targets.temperature)
        fixed = (self.student.head.prototypes(), targets.prototypes, targets.shift)
        rows = rows_at_once(self.options.logits_chunk, len(targets.prototypes))
        images = max(1, rows // (self.num_crops + self.num_large))
        sums = summed_in_chunks(function, (crops, targets.bottleneck), images, *fixed) / crops.shape[1]
        return {"loss": sums[0], "teacher_entropy": sums[1].detach(), "kl": (sums[0] - sums[1]).detach()}

    def after_step(self, progress: Progress, finite: Tensor) -> None:
        """The teacher and the centre move."""
        momentum = cosine(progress.step, start=self.plan.momentum, end=1.0, total_steps=progress.total_steps)
        move_teacher(self.teacher, self.student, momentum, finite)
        if self.centre is not None:
            self.centre.move(finite)

    def teacher_temperature(self, progress: Progress) -> float:
        """That of a step."""
        return self._warmed_up(self.options.warmup_teacher_temp, self.options.teacher_temp, progress)

    def _warmed_up(self, start: float, end: float, progress: Progress) -> float:
        epochs = self.options.warmup_teacher_temp_epochs
        if epochs is None or self.options.teacher_temp_per == "step":
            return linear(progress.step, start=start, end=end, count=self.plan.temperature_steps)
        return linear(int(progress.epoch), start=start, end=end, count=round(epochs))

    def parameter_rules(self, layer_decay: float | None) -> Mapping[str, ParameterRule]:
        """All but vectors decay, position tables and tokens too, as in the papers; layer decay acts on the backbone."""
        scales = lr_scales(self.student.backbone, layer_decay)
        lowest = min(scales.values(), default=1.0)
        rules = {}
        for name, parameter in self.student.named_parameters():
            if not parameter.requires_grad:
                continue
            part, _, rest = name.partition(".")
            scale, frozen, drops = 1.0, 0, False
            if part == "backbone":
                scale, frozen = scales.get(rest, 1.0), self.options.head_warmup_steps
                scale *= self.options.patch_embed_lr_scale if rest.startswith("patch_embed.") else 1.0
            elif part == "mask_token":
                part, scale = "backbone", lowest
            elif rest.startswith("last_layer"):
                frozen, drops = self.plan.frozen_steps, self.drops_gradient
            rules[f"student.{name}"] = ParameterRule(
                decay=parameter.ndim > 1 and not name.endswith(".bias"),
                lr_scale=scale,
                frozen_steps=frozen,
                drops_gradient=drops,
                clip_group=part,
            )
        return rules

    def health(self) -> dict[str, Tensor]:
        """The effective number of prototypes that the last step's targets used, and how varied features were.

        Usage is the exponential of the mean target's entropy; `center_norm` the length of the centre.
        """
        found: dict[str, Tensor] = {}
        if self._mean_target is not None:
            found["prototypes_used"] = entropy(self._mean_target).exp()
        if self._moments is not None:
            found |= self._moments.numbers()
        if self._diversity is not None:
            found["patch_diversity"] = self._diversity
        if self.centre is not None:
            found["center_norm"] = self.centre.center.norm()
        return found

    def alarm(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """A sentence when the run has collapsed; see `foreseen.pretrain.collapse`."""
        return self._alarm.look(step, numbers)

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The crops of some images, one row an image for each view."""
        found = {}
        for view in self.views:
            crops = by_crop(batch.images[view.name], view.count)[:, :_PICTURES]
            found[view.name] = denormalise(torch.cat(list(crops), dim=3), view.mean, view.std)
        return found


def _target_sum(rows: Tensor, prototypes: Tensor, shift: Tensor, *, temperature: float) -> Tensor:
    return (scaled_logits(rows, prototypes, temperature) + shift).softmax(dim=-1).sum(0)


def _class_sums(
    crops: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, shift: Tensor, *,
    student_temp: float, teacher_temp: float,
) -> Tensor:  # fmt: skip
    logits = scaled_logits(crops, prototypes, student_temp)
    with torch.no_grad():
        targets = (scaled_logits(teacher, teacher_prototypes, teacher_temp) + shift).softmax(dim=-1)
        certain = entropy(targets).mean(0).sum()
    return torch.stack([crop_cross_entropy(logits, targets).sum(), certain])


@dataclass(frozen=True)
class Parts:
    """What a config makes for any self-distilled method.

    Attributes:
        backbone: with fresh weights, or those of `init_from`.
        large, small: views.
        plan: the options' numbers.
    """

    backbone: nn.Module
    large: View
    small: tuple[View, ...]
    plan: Plan

    @classmethod
    def of(cls, config: Config) -> "Parts":
        """Build them; weights come from the global generator."""
        options = config.method
        assert isinstance(options, SelfDistillationOptions)
        encoder = create_encoder(config.model, img_size=config.views.size, any_size=True)
        preprocessing = encoder.preprocessing
        large, *small = multicrop_views(options.crops, config.views, preprocessing.mean, preprocessing.std)
        if config.model.init_from is None:
            draw_tokens(encoder.model)
        for view in small:
            check_size(encoder.model, view.size, "method.crops.local_size", config.views.size)
        if options.head_warmup_steps and config.model.init_from is None:
            raise BadInput(
                f"method.head_warmup_steps is {options.head_warmup_steps} and model.init_from null: a backbone that "
                "begins from nothing has nothing to keep; set method.head_warmup_steps=0"
            )
        return cls(encoder.model, large, tuple(small), Plan.of(config))

    @property
    def num_features(self) -> int:
        """D."""
        described: Any = self.backbone
        features: int = described.num_features
        return features

    @property
    def name(self) -> str:
        """Of the backbone, in timm's words."""
        return architecture_of(self.backbone)[0]


def draw_tokens(backbone: nn.Module, std: float = 0.02) -> None:
    """Draw the class token of a ViT as DINO and iBOT do; timm draws all else of it as they do."""
    token = getattr(backbone, "cls_token", None)
    if isinstance(token, nn.Parameter):
        nn.init.trunc_normal_(token, std=std)


def projection_head(options: SelfDistillationOptions, in_dim: int, prototypes: int, **more: Any) -> ProjectionHead:
    """The head that a method's options ask for; `more` wins over them."""
    asked: dict[str, Any] = {
        "hidden_dim": options.hidden_dim, "bottleneck_dim": options.bottleneck_dim, "num_layers": options.head_layers,
        "batch_norm": options.head_batch_norm, "trains_gain": not options.norm_last_layer,
    }  # fmt: skip
    return ProjectionHead(in_dim, prototypes, **asked | more)


def official_networks(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of an authors' training checkpoint to a self-distilled objective's.

    Args:
        state: with "student" and "teacher" (either may be missing), and the loss under "dino_loss" or "ibot_loss".

    Source: facebookresearch/dino at 7c446df, main_dino.py; bytedance/ibot, main_ibot.py.
    """
    renamed: dict[str, Tensor] = {}
    for network in ("student", "teacher"):
        for name, tensor in state.get(network, {}).items():
            ours = name.removeprefix("module.").replace("last_layer.parametrizations.weight.original0", _G).replace(
                "last_layer.parametrizations.weight.original1", _V
            )  # fmt: skip
            if ours == "backbone.masked_embed":
                ours = "mask_token"
                if network == "teacher":
                    continue
            renamed[f"{network}.{ours}"] = tensor
    loss = state.get("dino_loss", state.get("ibot_loss", {}))
    if "center" in loss:
        renamed["centre.center"] = loss["center"].flatten()
    if "center2" in loss:
        renamed["patch_centre.center"] = loss["center2"].flatten()
    return renamed


_G, _V = "last_layer.weight_g", "last_layer.weight_v"
