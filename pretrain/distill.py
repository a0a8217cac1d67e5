"""Feature distillation: a student learns a frozen network's features from pictures without labels.

What comes out of a pretrained teacher, pooled and at each place, is what a smaller or different network learns to give
from the same crops, through a linear projector to the teacher's width that is thrown away afterwards. In this form:
Wei et al. 2022, Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation,
arXiv:2205.14141, whose targets are normalised without weights and learned with smooth L1; with cosine similarity as in
Ranzinger et al. 2024, AM-RADIO, arXiv:2312.06709, equations 2 and 3.

Letters: B images, D the student's channels, T the teacher's, h and w the student's places.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from foreseen.config import Config, MethodOptions
from foreseen.data.batch import Batch
from foreseen.data.views import Request, View, configured_view, denormalise
from foreseen.device_keys import subkey
from foreseen.engine.objective import Objective, Progress
from foreseen.errors import BadInput
from foreseen.handoff.encoder import PUBLIC, create_encoder
from foreseen.handoff.frozen import FrozenEncoder, frozen_encoder
from foreseen.handoff.same_crop import SameCrop
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.features import feature_map
from foreseen.models.frozen import Frozen
from foreseen.models.precision import in_float32

_PICTURES = 8


class FeatureDistillOptions(MethodOptions):
    """Options of `method.name: feature_distill`."""

    name: Literal["feature_distill"] = "feature_distill"
    teacher: str
    """An encoder folder, or `timm:NAME` for public weights."""
    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """"smooth_l1" learns features normalised over their channels, "cosine" only their direction."""
    pooled_weight: float = Field(1.0, ge=0)
    """Of the loss of the pooled features; 0 leaves it out."""
    patch_weight: float = Field(1.0, ge=0)
    """Of the loss of the features of places; 0 leaves it out."""

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if self.pooled_weight == self.patch_weight == 0:
            raise ValueError("method.pooled_weight and method.patch_weight are both 0; give one of them")
        return self


class Features(NamedTuple):
    """What a network gives for B images: pooled [B, D], and by place [B, D, h, w]; None for what is not asked for."""

    pooled: Tensor | None
    places: Tensor | None


class FeatureDistill(Objective):
    """A student of any architecture, its projectors, and a teacher that sees the same crops.

    Args:
        model: the student, a timm model without a classifier.
        options: of the method.
        view: what the student is trained on.
        teacher: as it was saved.

    Raises:
        BadInput: a loss of places is asked for, and one of the two gives no features of places.
    """

    def __init__(
        self, model: nn.Module, options: FeatureDistillOptions, view: View, teacher: FrozenEncoder
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.options = options
        self.view = view
        self.crop = SameCrop(view, teacher.preprocessing)
        self.teacher = Frozen(teacher.model)
        self.teacher_sha256 = teacher.sha256
        self._teachers = (teacher.parent,)
        theirs = self._example(self.teacher.network, self.crop.size, "method.teacher")
        ours = self._example(model, view.size, "model.name")
        self.grid = (0, 0) if ours.places is None else (ours.places.shape[2], ours.places.shape[3])
        self.projectors = nn.ModuleDict()
        self.notes: Sequence[str] = [self.crop.note(options.teacher)]
        if ours.pooled is not None and theirs.pooled is not None:
            self.projectors["pooled"] = nn.Linear(ours.pooled.shape[1], theirs.pooled.shape[1])
        if ours.places is not None and theirs.places is not None:
            self.projectors["places"] = nn.Conv2d(ours.places.shape[1], theirs.places.shape[1], 1)
            old, new = ("×".join(map(str, places.shape[2:])) for places in (theirs.places, ours.places))
            if old != new:
                self.notes = [*self.notes, f"the teacher's {old} features are interpolated to the student's {new}"]

    @classmethod
    def build(cls, config: Config) -> "FeatureDistill":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`.

        Raises:
            BadInput: the teacher cannot be had.
        """
        options = config.method
        assert isinstance(options, FeatureDistillOptions)
        try:
            teacher = frozen_encoder(options.teacher)
        except BadInput as error:
            raise BadInput(
                f"method.teacher {options.teacher}: {error}. A teacher is the encoder folder of a run, or {PUBLIC}NAME"
            ) from error
        encoder = create_encoder(config.model, img_size=config.views.size)
        view = configured_view(config.views, encoder.preprocessing.mean, encoder.preprocessing.std)
        objective = cls(encoder.model, options, view, teacher)
        if encoder.initialised is not None:
            objective.notes = [*objective.notes, *encoder.initialised.notes]
        return objective

    @property
    def request(self) -> Request:
        """One random crop per image; at the teacher's size, too, where that is another."""
        return Request(views=self.crop.views)

    def prepare(self, micro_batches: Sequence[Batch], progress: Progress) -> list[Features]:
        """The teacher's features, at the student's places and as the loss wants them."""
        return [self.targets(batch) for batch in micro_batches]

    def targets(self, batch: Batch) -> Features:
        """The teacher's features [B, T] and [B, T, h, w], in float32 at least, normalised over their channels."""
        pooled, places = self._features(self.teacher.network, self.crop.images(batch))
        if places is not None:
            places = _normalised(_at_places(in_float32(places), self.grid))
        return Features(None if pooled is None else _normalised(in_float32(pooled)), places)

    def forward(self, batch: Batch, prepared: Features, progress: Progress) -> dict[str, Tensor]:
        """The weighted sum of both losses."""
        with draw_drop_path(self.model, subkey(batch.key, "drop_path")):
            found = self._features(self.model, batch.images[self.view.name])
        options, parts = self.options, {}
        weights = {"pooled": options.pooled_weight, "places": options.patch_weight}
        for name, ours, theirs in zip(Features._fields, found, prepared, strict=True):
            if ours is not None and theirs is not None:
                parts[name] = self._distance(in_float32(self.projectors[name](ours)), theirs)
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return {"loss": loss} | parts

    def encoder(self) -> nn.Module:
        """The student."""
        return self.model

    def frozen_inputs(self) -> dict[str, str]:
        """The teacher's weights."""
        return {"teacher": self.teacher_sha256}

    def teachers(self) -> Sequence[Mapping[str, Any]]:
        """The one, with its terms and its own lineage."""
        return self._teachers

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The crops: [N, 3, H, W] uint8."""
        return {"inputs": denormalise(batch.images[self.view.name][:_PICTURES], self.view.mean, self.view.std)}

    def _distance(self, ours: Tensor, theirs: Tensor) -> Tensor:
        if self.options.loss == "cosine":
            return 1 - F.cosine_similarity(ours, theirs, dim=1).mean()
        return F.smooth_l1_loss(ours, theirs)

    def _features(self, model: Any, images: Tensor) -> Features:
        found = model.forward_features(images)
        pooled = model.forward_head(found, pre_logits=True) if self.options.pooled_weight > 0 else None
        return Features(pooled, feature_map(model, found) if self.options.patch_weight > 0 else None)

    def _example(self, model: nn.Module, size: tuple[int, int], key: str) -> Features:
        """Features of one picture of zeros, for their shapes."""
        was_training, like = model.training, next(model.parameters())
        try:
            with torch.no_grad():
                return self._features(model.eval(), torch.zeros(1, 3, *size, device=like.device, dtype=like.dtype))
        except BadInput as error:
            raise BadInput(f"{key}: {error}; set method.patch_weight to 0, or take another") from error
        finally:
            model.train(was_training)


def _normalised(x: Tensor) -> Tensor:
    """Zero mean and unit variance over the channels: [B, T, ...] -> [B, T, ...]."""
    return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1)


def _at_places(places: Tensor, grid: tuple[int, int]) -> Tensor:
    """[B, T, *, *] -> [B, T, h, w]."""
    if tuple(places.shape[2:]) == grid:
        return places
    return F.interpolate(places, size=grid, mode="bilinear", antialias=True, align_corners=False)
