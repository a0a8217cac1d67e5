"""Options that DINO, iBOT and DINOv2 share, and what they come to in a run of some size."""

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from foreseen.config import Config, MethodOptions, Optim
from foreseen.data.multicrop import MultiCrop
from foreseen.engine.schedule import scaled_lr
from foreseen.models.position import PositionResize
from foreseen.pretrain import small_machines
from foreseen.pretrain.small_machines import Size


class SelfDistillationOptions(MethodOptions):
    """Options that DINO, iBOT and DINOv2 share."""

    out_dim: int | None = Field(65_536, ge=2)
    """Prototypes, K; null fits them to the data and the batch (`pretrain/small_machines.py`)."""
    hidden_dim: int = Field(2048, ge=1)
    """Width of the head's MLP."""
    bottleneck_dim: int = Field(256, ge=1)
    """Length of the unit vector that is compared with the prototypes."""
    head_layers: int = Field(3, ge=1)
    """Layers of the head's MLP; 1 is a linear head, which has no use for `hidden_dim`."""
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
    head_warmup_steps: int | None = Field(None, ge=0)
    """For so many first steps the heads alone are trained, for a backbone that begins from `model.init_from`; over as
    many more the backbone's lr rises to its own. Null takes a tenth of the run, at most 1,000 steps."""
    patch_embed_lr_scale: float = Field(1.0, gt=0)
    """Factor on the lr of a ViT's patch embedding, on top of `optim.layer_decay`."""
    position_resize: PositionResize = "offset"
    """How a ViT's positions are interpolated for small crops: "offset" as in DINO, iBOT and DINOv2; "antialias" as in
    timm."""
    logits_chunk: int | None = Field(None, ge=1)
    """Rows of logits held at once, of student and teacher together; more are made in turn, and again in the backward
    pass. Null takes as many as have 2^25 logits (128 MiB). Results differ by rounding alone."""
    koleo_weight: float = Field(0.0, ge=0)
    """Of DINOv2's regulariser that spreads features; 0 switches it off, as in the papers of DINO and iBOT. Short runs
    on little data learn more with it (docs/self_distillation.md)."""
    koleo_group: int = Field(16, ge=2)
    """Images among which nearest neighbours are looked for, consecutive ones; `batch.micro_size` is a multiple of it.
    The authors' are the images of a GPU."""
    on_collapse: Literal["warn", "stop"] = "warn"
    """What happens when the numbers show that the run has collapsed."""
    crops: MultiCrop = MultiCrop()
    """The large and small crops; their colours."""

    @model_validator(mode="after")
    def _there_are_pairs(self) -> Self:
        if self.crops.global_count + self.crops.local_count < 2:
            raise ValueError(
                f"method.crops.global_count {self.crops.global_count} and method.crops.local_count "
                f"{self.crops.local_count} leave no two crops of an image to compare; take at least 2 together"
            )
        return self

    @model_validator(mode="after")
    def _a_linear_head_has_no_norm(self) -> Self:
        if self.head_layers == 1 and self.head_batch_norm:
            raise ValueError(
                "method.head_layers 1 is a linear head, between whose layers method.head_batch_norm true has no place; "
                "set head_layers to 2 or more, or head_batch_norm to false"
            )
        return self

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
        head_steps: in which the backbone stands still.
        grace_steps: before collapse is looked for.
        notes: sentences about it.
    """

    prototypes: int
    momentum: float
    temperature_steps: int
    frozen_steps: int
    head_steps: int
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
        frozen_steps = round(options.freeze_last_layer_epochs * size.steps_per_epoch)
        head_steps, of_heads = small_machines.head_warmup(
            options.head_warmup_steps, size, begins_from_weights=config.model.init_from is not None
        )
        notes = (
            _of_lr(config.optim, size.global_size),
            of_prototypes,
            of_momentum,
            of_warmup,
            of_heads,
            small_machines.too_long(
                "method.freeze_last_layer_epochs", frozen_steps, size, "the prototypes are never trained"
            ),
            small_machines.too_long(
                "method.warmup_teacher_temp_epochs", temperature_steps, size, "the teacher's temperature never arrives"
            )
            if options.teacher_temp != options.warmup_teacher_temp
            else None,
            small_machines.too_long("method.head_warmup_steps", head_steps, size, "the backbone never moves"),
            _of_average(config.optim),
        )
        return cls(
            prototypes=prototypes,
            momentum=momentum,
            temperature_steps=temperature_steps,
            frozen_steps=frozen_steps,
            head_steps=head_steps,
            grace_steps=(config.optim.warmup_steps or 0) + head_steps,
            notes=tuple(note for note in notes if note is not None),
        )


def _of_lr(optim: Optim, global_size: int) -> str | None:
    reference = optim.lr_reference_batch
    if optim.lr_scaling == "none" or global_size == reference:
        return None
    share = f"{global_size} / {reference}"
    factor = share if optim.lr_scaling == "linear" else f"the square root of {share}"
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, global_size, reference)
    return (
        f"peak lr {peak:.4g}: optim.base_lr {optim.base_lr:.4g} × {factor}, as optim.lr_scaling={optim.lr_scaling} says"
    )


def _of_average(optim: Optim) -> str | None:
    if optim.ema_decay is None:
        return None
    return (
        f"optim.ema_decay {optim.ema_decay} averages the student, but what is scored and handed over is the teacher, "
        "an average already (method.teacher_momentum): optim.ema_decay=null spares the memory"
    )
