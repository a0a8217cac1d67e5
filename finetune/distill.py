"""Distillation: supervised fine-tuning with a frozen classifier that says besides what it makes of each crop.

Touvron et al. 2021, Training data-efficient image transformers & distillation through attention, arXiv:2012.12877. A
student with a distillation token (timm's `deit_*_distilled_*`) learns the labels with one head and the teacher with the
other, and averages both heads' logits when it is used; any other timm classifier learns both with its one head.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from pydantic import Field
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from foreseen.config import Config
from foreseen.data.batch import Batch
from foreseen.data.views import Request, View
from foreseen.device_keys import subkey
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.finetune.augment import erase, scale_boxes
from foreseen.finetune.distillation_loss import Mean, hard_distillation, soft_distillation
from foreseen.finetune.mixing import mix, scale_mixing
from foreseen.finetune.supervised import Supervised, SupervisedOptions, create_classifier, training_view
from foreseen.handoff.encoder import PUBLIC
from foreseen.handoff.frozen import FrozenClassifier, frozen_classifier
from foreseen.handoff.same_crop import SameCrop
from foreseen.models.backbone import Pool
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.frozen import Frozen
from foreseen.models.precision import in_float32


class DistillOptions(SupervisedOptions):
    """Options of `method.name: distill`: those of `supervised`, and the teacher's."""

    name: Literal["distill"] = "distill"  # type: ignore[assignment]
    teacher: str
    """A classifier of the same classes: the encoder folder of a fine-tuned run, or `timm:NAME` for public weights."""
    pool: Pool | None = None
    distillation: Literal["hard", "soft"] = "hard"
    """Learn the class that the teacher decides for, or its probabilities."""
    weight: float = Field(0.5, ge=0, le=1)
    """Of the teacher's loss, λ in the paper; the labels' loss has the rest."""
    tau: float = Field(1.0, gt=0)
    """Temperature of soft distillation; the paper takes 3, with a weight of 0.1."""
    soft_mean: Mean = "images"
    """Soft distillation is a mean over the "images", as the paper writes it; "logits" divides by the classes as well,
    as the authors' code does."""

    def control(self) -> tuple[SupervisedOptions, str]:
        """The same training on labels alone, and the teacher."""
        shared = {key: getattr(self, key) for key in SupervisedOptions.model_fields if key != "name"}
        return SupervisedOptions(**shared), self.teacher


class Shown(NamedTuple):
    """Of a micro-batch: the student's images as `augment` gives them [B, 3, H, W], and the teacher's logits [B, K]."""

    images: Tensor
    logits: Tensor


class Distill(Supervised):
    """A student, and a teacher that sees the same crops, mixed and erased alike.

    Args:
        model: a timm model with K classes; one with a distillation token gives both heads' logits in training.
        options: of the method.
        view: what the student is trained on.
        teacher: a classifier of the same K classes.
        crop: how it sees the view.
        erase: probability of random erasing.
    """

    options: DistillOptions

    def __init__(
        self, model: nn.Module, options: DistillOptions, view: View, teacher: FrozenClassifier, crop: SameCrop, *,
        erase: float,
    ) -> None:  # fmt: skip
        super().__init__(model, options, view, erase=erase)
        if isinstance(model, VisionTransformerDistilled):
            model.set_distilled_training()
        self.teacher = Frozen(teacher.model)
        self.teacher_sha256 = teacher.sha256
        self._teachers = (teacher.parent,)
        self.crop = crop
        self.notes = (crop.note(options.teacher), *_believed(teacher, options.teacher))

    @classmethod
    def build(cls, config: Config, num_classes: int, class_names: Sequence[str] | None = None) -> "Distill":
        """As of `Supervised`.

        Raises:
            BadInput: the teacher cannot be had, or has other classes.
        """
        options = config.method
        assert isinstance(options, DistillOptions)
        teacher = load_teacher(options.teacher, num_classes, class_names)
        student = create_classifier(config, options, num_classes)
        own = config.views.model_copy(update={"size": teacher.preprocessing.size})
        transform = training_view(own, teacher.preprocessing).transform
        crop = SameCrop(student.view, teacher.preprocessing, transform=transform)
        objective = cls(student.model, options, student.view, teacher, crop, erase=config.views.erase)
        objective.notes = (*objective.notes, *student.notes)
        return objective

    @property
    def request(self) -> Request:
        """One augmented crop per image and its label; at the teacher's size, too, where that is another."""
        return replace(super().request, views=self.crop.views)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Shown]:
        """What the student will see, erased and mixed once for both, and what the teacher makes of it."""
        found = []
        for batch in micro_batches:
            images = self.augment(batch)
            found.append(Shown(images, in_float32(self.teacher.network(self.teacher_images(batch, images)))))
        return found

    def forward(self, batch: Batch, prepared: Shown, progress: Progress) -> dict[str, Tensor]:
        """The weighted sum of the labels' and the teacher's loss."""
        with draw_drop_path(self.model, subkey(batch.key, "drop_path")):
            found = self.model(prepared.images)
        for_labels, for_teacher = map(in_float32, found if isinstance(found, tuple) else (found, found))
        labels = self.label_loss(for_labels, batch)
        teacher = self.teacher_loss(for_teacher, prepared.logits)
        weight = self.options.weight
        loss = (1 - weight) * labels + weight * teacher
        parts = {"loss": loss, "labels": labels, "teacher": teacher} | self.accuracy(for_labels, batch)
        if "top1" in parts:
            parts["teacher_top1"] = self.accuracy(prepared.logits, batch)["top1"]
        return parts

    def teacher_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """The loss of logits [B, K] against the teacher's [B, K]."""
        options = self.options
        if options.distillation == "hard":
            return hard_distillation(logits, teacher)
        return soft_distillation(logits, teacher, tau=options.tau, mean=options.soft_mean)

    def teacher_images(self, batch: Batch, augmented: Tensor) -> Tensor:
        """What the teacher is shown: what `augment` gave, at the teacher's size and normalisation."""
        if self.crop.view is None:
            return self.crop.normalised(augmented)
        images, scale = self.crop.images(batch), (self.view.size, self.crop.size)
        if "erase" in batch.draws:
            images = erase(images, scale_boxes(batch.draws["erase"], *scale), batch.key)
        if "mix" in batch.draws:
            images = mix(images, scale_mixing(batch.draws["mix"], *scale))
        return images

    def frozen_inputs(self) -> dict[str, str]:
        """The teacher's weights."""
        return {"teacher": self.teacher_sha256}

    def teachers(self) -> Sequence[Mapping[str, Any]]:
        """The one, with its terms and its own lineage."""
        return self._teachers


def load_teacher(source: str, num_classes: int, class_names: Sequence[str] | None) -> FrozenClassifier:
    """Load a teacher of the classes of the data.

    Args:
        source: an encoder folder with a head, or `timm:NAME`, which may download.
        num_classes, class_names: of the data; its names are compared where both have some.

    Raises:
        BadInput: it cannot be had, or has other classes; says which.
    """
    try:
        teacher = frozen_classifier(source)
    except BadInput as error:
        raise BadInput(
            f"method.teacher {source}: {error}. A teacher is the encoder folder of a run of `foreseen finetune` on the "
            f"same classes, or {PUBLIC}NAME"
        ) from error
    if teacher.num_classes != num_classes:
        raise BadInput(
            f"method.teacher {source} tells {teacher.num_classes} classes apart and the data has {num_classes}; "
            "fine-tune it on the classes of the data first"
        )
    if teacher.class_names is not None and class_names is not None and teacher.class_names != tuple(class_names):
        raise BadInput(f"method.teacher {source} has other classes: {_difference(teacher.class_names, class_names)}")
    return teacher


def _difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    missing, more = (sorted(set(a) - set(b)) for a, b in ((ours, theirs), (theirs, ours)))
    if missing or more:
        return f"it lacks {_few(missing)} and has {_few(more)} instead"
    number = next(number for number, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
    return (
        f"the names are the same in another order; class {number} is {theirs[number]!r} there and {ours[number]!r} here"
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _believed(teacher: FrozenClassifier, source: str) -> tuple[str, ...]:
    if teacher.class_names is not None:
        return ()
    return (f"teacher {source} does not name its classes; it is believed to have the data's, in the same order",)


def from_official(state: dict[str, Any]) -> dict[str, Tensor]:
    """The authors' distilled ViT (`model` of a checkpoint) by the names of timm's, which are the same.

    Source: facebookresearch/deit at 7e160fe, models.py; timm's `VisionTransformerDistilled` has their layout.
    """
    return {f"model.{name}": value for name, value in state.items()}
