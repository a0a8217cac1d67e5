"""Supervised fine-tuning of a whole backbone on labelled images, by MAE's recipe and by BEiT's.

He et al. 2022, arXiv:2111.06377, table 9; facebookresearch/mae at efb2a80, main_finetune.py and models_vit.py; Bao et
al. 2021, arXiv:2106.08254; microsoft/unilm at 768a3c8, beit/run_class_finetuning.py and modeling_finetune.py. Their
logits and parameter groups this file reproduces (tests/finetune/test_supervised.py, test_beit.py). The same class
trains from scratch: the control is the same code. With other options it is DeiT's and DeiT III's recipe
(arXiv:2012.12877, arXiv:2204.07118).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from foreseen.config import Config, MethodOptions
from foreseen.config import Views as ViewOptions
from foreseen.data.batch import Batch
from foreseen.data.views import Draw, Request, Transform, View, configured_view, denormalise
from foreseen.device_keys import subkey
from foreseen.engine.layer_decay import parameter_rules
from foreseen.engine.objective import Objective, ParameterRule, Progress
from foreseen.finetune.augment import EraseBox, RandAugment, ThreeAugment, erase
from foreseen.finetune.freeze import freeze, frozen_modules, frozen_parameters
from foreseen.finetune.mixing import PairMix, mix, soft_targets
from foreseen.handoff.encoder import Preprocessing, create_encoder
from foreseen.models.backbone import Pool
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.initialise import head_names
from foreseen.models.precision import in_float32

_PICTURES = 8
_BY_NORM = re.compile("c?(fused)?lamb.*|n?lar[sc]")  # timm's, whose step of a weight is a share of its norm
_SMALL_HEAD = 1e-3  # 200 steps at a share of 0.01 make a norm e² times larger


class SupervisedOptions(MethodOptions):
    """Options of `method.name: supervised`; the defaults are MAE's, but for the crops, which `views` sets."""

    name: Literal["supervised"] = "supervised"
    pool: Pool | None = "mean"
    """What the head sees: "mean" of the patch tokens, or the class "token"; null is the model's own way."""
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    """"bce" asks of each class by itself whether it is there, as DeiT III: in a mixed image both are. It is a mean
    over images and classes, so its gradients are some K times smaller, which LAMB does not mind and AdamW does."""
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    mixup: float = Field(0.8, ge=0)
    """Alpha of mixup's Beta distribution; 0 switches it off."""
    cutmix: float = Field(1.0, ge=0)
    """Alpha of CutMix's Beta distribution; 0 switches it off."""
    mixup_prob: float = Field(1.0, ge=0, le=1)
    """Share of the pairs of images that are mixed, by either."""
    switch_prob: float = Field(0.5, ge=0, le=1)
    """Share of the mixed pairs that get CutMix, where both are on."""
    freeze: Literal["embeddings"] | Annotated[int, Field(ge=1)] | None = None
    """What stays as it was begun: the "embeddings" (patches, positions, tokens; a CNN's stem), or those and so many
    blocks from there on. It is not trained, has no drop path, and its BatchNorm keeps its statistics."""
    head_init_std: float = Field(2e-5, gt=0)
    """Of a new head on an encoder: of MAE, and of BEiT (0.02 × 0.001); from scratch it is drawn as timm draws it."""
    decay_relative_positions: bool = True
    """Whether a BEiT's tables of relative positions have weight decay."""

    @property
    def mixes(self) -> bool:
        """Whether images are mixed at all."""
        return max(self.mixup, self.cutmix) > 0 and self.mixup_prob > 0

    @model_validator(mode="after")
    def _bce_has_no_smoothing(self) -> Self:
        if self.loss == "bce" and self.label_smoothing > 0:
            raise ValueError(
                f"method.label_smoothing {self.label_smoothing} would tell method.loss bce that every class is there; "
                "set it to 0"
            )
        return self


class Supervised(Objective):
    """A backbone with a linear head, trained on labels.

    Args:
        model: a timm model with K classes.
        options: of the method.
        view: what it is trained on; evaluation sees the same size and normalisation.
        erase: probability of random erasing.
    """

    def __init__(self, model: nn.Module, options: SupervisedOptions, view: View, *, erase: float) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.view = view
        described: Any = model
        self.num_classes: int = described.num_classes
        self.group = 2 if options.mixes else 1
        draws = []
        if erase > 0:
            draws.append(Draw("erase", EraseBox(erase, view.size)))
        if options.mixes:
            draw = PairMix(
                mixup=options.mixup,
                cutmix=options.cutmix,
                probability=options.mixup_prob,
                switch=options.switch_prob,
                size=view.size,
            )
            draws.append(Draw("mix", draw, group=2))
        self._request = Request(views=(view,), draws=tuple(draws), labels=True)
        self.frozen = frozen_parameters(model, options.freeze)

    @classmethod
    def build(cls, config: Config, num_classes: int, class_names: Sequence[str] | None = None) -> "Supervised":
        """The objective that a recipe trains, with weights drawn from the global generator and from `init_from`.

        Args:
            config: of the verb "finetune".
            num_classes: of the labels.
            class_names: of the labels, where they have names.
        """
        options = config.method
        assert isinstance(options, SupervisedOptions)
        student = create_classifier(config, options, num_classes)
        objective = cls(student.model, options, student.view, erase=config.views.erase)
        objective.notes = student.notes
        return objective

    @property
    def request(self) -> Request:
        """One augmented crop per image and its label."""
        return self._request

    def evaluation_request(self) -> Request:
        """The middle of each image and its label."""
        return Request(views=(replace(self.view, crop="centre", flip=0.0, transform=None, colour=None),), labels=True)

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        """The cross-entropy, or that of each class by itself, with mixed and smoothed labels."""
        with draw_drop_path(self.model, subkey(batch.key, "drop_path")):
            logits = in_float32(self.model(self.augment(batch)))
        loss = self.label_loss(logits, batch)
        return {"loss": loss} | self.accuracy(logits, batch)

    def label_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss of logits [B, K] against the labels of the images that `augment` has mixed."""
        assert batch.label is not None
        mixing = batch.draws.get("mix")
        targets = soft_targets(batch.label, mixing, self.num_classes, self.options.label_smoothing).to(logits.dtype)
        if self.options.loss == "bce":
            return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))
        return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()

    def accuracy(self, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The share of the images that logits [B, K] get right, as "top1"; nothing where images are mixed."""
        if self.options.mixes:
            return {}
        assert batch.label is not None
        return {"top1": (logits.argmax(dim=1) == batch.label).to(logits.dtype).mean()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Sums over the labelled samples: how many, right at first and among five, the cross-entropy; and logits."""
        assert batch.label is not None
        known = batch.label >= 0
        label = batch.label.clamp(min=0)
        logits = in_float32(self.model(batch.images[self.view.name]))
        hits = logits.topk(min(5, self.num_classes), dim=1).indices == label[:, None]
        loss = F.cross_entropy(logits, label, reduction="none")
        return {
            "count": known.sum(),
            "top1": (hits[:, 0] & known).sum(),
            "top5": (hits.any(dim=1) & known).sum(),
            "loss": (loss * known).sum(),
            "logits": logits,
        }

    def encoder(self) -> nn.Module:
        """The backbone with its head."""
        return self.model

    def group_advice(self, micro_size: int) -> str:
        """Mixing takes pairs."""
        return "method.mixup=0 and method.cutmix=0"

    def parameter_rules(self, layer_decay: float | None) -> Mapping[str, ParameterRule]:
        """MAE's and BEiT's layer decay; see `foreseen.engine.layer_decay`."""
        decayed = self.options.decay_relative_positions
        rules = parameter_rules(self.model, layer_decay, decay_relative_positions=decayed)
        return {f"model.{name}": rule for name, rule in freeze(rules, self.frozen).items()}

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen stays as in evaluation."""
        super().train(mode)
        for module in frozen_modules(self.model, self.frozen):
            module.eval()
        return self

    def pictures(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """What the network is shown: [N, 3, H, W] uint8."""
        return {"inputs": denormalise(self.augment(batch)[:_PICTURES], self.view.mean, self.view.std)}

    def augment(self, batch: Batch) -> Tensor:
        """Erase and mix the images of the view: normalised, [B, 3, H, W]."""
        images = batch.images[self.view.name]
        if "erase" in batch.draws:
            images = erase(images, batch.draws["erase"], batch.key)
        if "mix" in batch.draws:
            images = mix(images, batch.draws["mix"])
        return images


class Classifier(NamedTuple):
    """The network that a recipe trains, the view that it is trained on, and what is to be said of how it began."""

    model: nn.Module
    view: View
    notes: tuple[str, ...]


def create_classifier(config: Config, options: SupervisedOptions, num_classes: int) -> Classifier:
    """Build what a recipe trains, with the weights of its `init_from`."""
    encoder = create_encoder(config.model, img_size=config.views.size, num_classes=num_classes, pool=options.pool)
    notes: tuple[str, ...] = ()
    if encoder.initialised is not None:
        notes = encoder.initialised.notes
        is_new = _draw_heads(encoder.model, encoder.initialised.fresh, options.head_init_std)
        if is_new and options.head_init_std < _SMALL_HEAD and _BY_NORM.fullmatch(config.optim.name):
            notes += (
                f"optim.name {config.optim.name} makes steps in proportion to a weight's norm, so a new head of "
                f"method.head_init_std {options.head_init_std:g} hardly moves: set it to 0.02",
            )
    return Classifier(encoder.model, training_view(config.views, encoder.preprocessing), notes)


def training_view(options: ViewOptions, preprocessing: Preprocessing) -> View:
    """The crop, named "image", that a config's `views` section asks for, with its augmentation in the worker."""
    view = configured_view(options, preprocessing.mean, preprocessing.std)
    transform: Transform | None = None
    if options.rand_augment is not None:
        transform = RandAugment(options.rand_augment, options.size, view.mean, options.interpolation)
    elif options.three_augment is not None:
        transform = ThreeAugment(options.three_augment)
    fraction = options.centre_fraction
    if fraction is None:
        # As MAE evaluates: resize to 256 and cut 224 out, but see the whole side of larger inputs.
        fraction = 0.875 if max(options.size) <= 224 else 1.0
    return replace(view, centre_fraction=fraction, transform=transform)


def _draw_heads(model: nn.Module, fresh: tuple[str, ...], std: float) -> bool:
    """Draw the classifiers that did not come with the weights anew; whether there are any."""
    new = [head for head in head_names(model) if f"{head}weight" in fresh]
    for head in new:
        classifier: Any = model.get_submodule(head.removesuffix("."))
        nn.init.trunc_normal_(classifier.weight, std=std)
        if classifier.bias is not None:
            nn.init.zeros_(classifier.bias)
    return bool(new)
