"""What DINO, iBOT and DINOv2 share: a student that predicts, from other crops, what its own slow copy says of an image.

Letters: B images, S crops of each for the student, T of them large and for the teacher as well, L patches, D features,
d of the bottleneck, K prototypes.
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from foreseen.data.batch import Batch
from foreseen.data.views import Request, View, denormalise
from foreseen.engine.layer_decay import lr_scales
from foreseen.engine.objective import Objective, ParameterRule, Progress, all_reduce_sum
from foreseen.engine.schedule import cosine, linear
from foreseen.engine.teacher import move_teacher
from foreseen.errors import BadInput
from foreseen.models.vit_tokens import Patches
from foreseen.pretrain.collapse import CollapseAlarm
from foreseen.pretrain.crops import by_crop, crop_keys
from foreseen.pretrain.distillation_losses import crop_cross_entropy, entropy, koleo, rows_at_once, summed_in_chunks
from foreseen.pretrain.distilled_network import Encoded, Network
from foreseen.pretrain.feature_health import FeatureHealth
from foreseen.pretrain.self_distillation_options import Plan, SelfDistillationOptions
from foreseen.pretrain.target_balance import Centre, row_sum, scaled_logits, sinkhorn_shift

_PICTURES = 8


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
        self.group = options.koleo_group if options.koleo_weight else 1
        self._batch_norms = [m for m in self.teacher.modules() if isinstance(m, _BatchNorm)]
        self._alarm = CollapseAlarm(
            plan.prototypes, grace_steps=plan.grace_steps, stop=options.on_collapse == "stop"
        )  # fmt: skip
        self._mean_target: Tensor | None = None
        self._mean_entropy: Tensor | None = None
        self._features = FeatureHealth()

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
        self._features = FeatureHealth()
        bottlenecks = [self.teacher.head(self._teach(batch).pooled) for batch in micro_batches]
        self._features.all_reduce()
        return self.class_targets(bottlenecks, progress)

    def _teach(self, batch: Batch, patches: Patches = "none") -> Encoded:
        """The teacher's features of a micro-batch, which nobody shall keep: they are as large as the images."""
        encoded = self.teacher.encode(batch.images[self.large.name], patches=patches)
        self._features.add(encoded.pooled, encoded.seen)
        return encoded

    def class_targets(self, bottlenecks: Sequence[Tensor], progress: Progress) -> list[ClassTargets]:
        """Targets for the class tokens of each micro-batch, from the teacher's bottlenecks [T * B, d], crop-major."""
        temperature = self.teacher_temperature(progress)
        prototypes = self.teacher.head.prototypes()
        at_once = rows_at_once(self.options.logits_chunk, len(prototypes))
        if self.centre is not None:
            self.centre.observe([row_sum(each) for each in bottlenecks], prototypes)
            shift = self.centre.shift(temperature)
        else:
            shift = sinkhorn_shift(bottlenecks, prototypes, temperature, at_once=at_once)
        used = partial(_target_sum, temperature=temperature)
        total = torch.stack([summed_in_chunks(used, (each,), at_once, prototypes, shift) for each in bottlenecks])
        total = all_reduce_sum(total.sum(0))
        self._mean_target, self._mean_entropy = (total / total[:-1].sum()).tensor_split((-1,))
        return [ClassTargets(by_crop(each, self.num_large), prototypes, shift, temperature) for each in bottlenecks]

    def _check_batches(self, micro_batches: Sequence[Batch]) -> None:
        if self._batch_norms and min(map(len, micro_batches)) < 2:
            raise BadInput(
                "a micro-batch of one picture has no batch statistics, which BatchNorm needs: set batch.micro_size to "
                "2 or more, or method.head_batch_norm=false with a backbone that has no BatchNorm"
            )

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The cross-entropy of student and teacher over all pairs of different crops, and KoLeo."""
        large, *small = [
            self.student.encode(batch.images[view.name], crop_keys(batch, view)).pooled for view in self.views
        ]
        return self.with_koleo(self.class_terms(self.student.head(torch.cat([large, *small])), prepared), large)

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

    def with_koleo(self, terms: dict[str, Tensor], pooled: Tensor) -> dict[str, Tensor]:
        """Terms whose loss holds KoLeo, if it is wanted: of each large crop, added up, so that crops of one image are
        never neighbours.

        Args:
            terms: of the loss, "loss" among them.
            pooled: the student's features of its large crops, [T * B, D], crop-major.
        """
        weight = self.options.koleo_weight
        if not weight:
            return terms
        crops = pooled.chunk(self.num_large)
        spread = torch.stack([koleo(crop, self.options.koleo_group) for crop in crops]).sum()
        return {**terms, "loss": terms["loss"] + weight * spread, "koleo": spread}

    def group_advice(self, micro_size: int) -> str:
        """Groups that fit, and how to go without."""
        divisors = [str(size) for size in range(2, micro_size + 1) if micro_size % size == 0]
        now = self.options.koleo_group
        groups = f"method.koleo_group (now {now}) to {', '.join(divisors[-6:])}, or " if divisors else ""
        return f"{groups}method.koleo_weight=0, without KoLeo"

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
            scale, frozen, ramp, drops = 1.0, 0, 0, False
            if part == "backbone":
                scale, frozen = scales.get(rest, 1.0), self.plan.head_steps
                ramp = frozen
                scale *= self.options.patch_embed_lr_scale if rest.startswith("patch_embed.") else 1.0
            elif part == "mask_token":
                part, scale = "backbone", lowest
            elif rest.startswith("last_layer"):
                frozen, drops = self.plan.frozen_steps, self.drops_gradient
            rules[f"student.{name}"] = ParameterRule(
                decay=parameter.ndim > 1 and not name.endswith(".bias"),
                lr_scale=scale,
                frozen_steps=frozen,
                ramp_steps=ramp,
                drops_gradient=drops,
                clip_group=part,
            )
        return rules

    def health(self) -> dict[str, Tensor]:
        """What the last step's targets were like, and how varied features.

        `prototypes_used` is the exponential of the mean target's entropy. That entropy less the mean of the targets'
        own is `target_information`: what a target says of its picture, in nats; 0 where all have the same, and at most
        ln 2 where they tell two kinds of pictures apart. `center_norm` is the length of the centre.
        """
        found: dict[str, Tensor] = {}
        if self._mean_target is not None and self._mean_entropy is not None:
            of_all = entropy(self._mean_target)
            found["prototypes_used"] = of_all.exp()
            found["target_information"] = (of_all - self._mean_entropy.squeeze()).clamp(min=0.0)
        found |= self._features.numbers()
        if self.centre is not None:
            found["center_norm"] = self.centre.center.norm()
        return found

    def alarm(self, step: int, numbers: Mapping[str, float]) -> str | None:
        """A sentence when the run has collapsed; see `foreseen.pretrain.collapse`."""
        return self._alarm.look(step, numbers)

    def alarm_state(self) -> dict[str, Any]:
        """What the alarm has seen so far."""
        return self._alarm.state()

    def load_alarm_state(self, state: Mapping[str, Any] | None) -> None:
        """Take back what it had seen."""
        self._alarm.load_state(state)

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The crops of some images, one row an image for each view."""
        found = {}
        for view in self.views:
            crops = by_crop(batch.images[view.name], view.count)[:, :_PICTURES]
            found[view.name] = denormalise(torch.cat(list(crops), dim=3), view.mean, view.std)
        return found


def _target_sum(rows: Tensor, prototypes: Tensor, shift: Tensor, *, temperature: float) -> Tensor:
    """The sum of targets, and behind it that of their entropies, [K + 1]."""
    logs = (scaled_logits(rows, prototypes, temperature) + shift).log_softmax(dim=-1)
    targets = logs.exp()
    return torch.cat([targets.sum(0), -(targets * logs).sum()[None]])


def _class_sums(
    crops: Tensor, teacher: Tensor, prototypes: Tensor, teacher_prototypes: Tensor, shift: Tensor, *,
    student_temp: float, teacher_temp: float,
) -> Tensor:  # fmt: skip
    logits = scaled_logits(crops, prototypes, student_temp)
    with torch.no_grad():
        targets = (scaled_logits(teacher, teacher_prototypes, teacher_temp) + shift).softmax(dim=-1)
        certain = entropy(targets).mean(0).sum()
    return torch.stack([crop_cross_entropy(logits, targets).sum(), certain])
