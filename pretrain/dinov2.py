"""DINOv2: iBOT with heads of its own for patches, balanced targets, stratified masks, and features pushed apart.

Oquab et al. 2023, DINOv2: Learning Robust Visual Features without Supervision, arXiv:2304.07193; the authors' code is
facebookresearch/dinov2, whose numbers this file reproduces (tests/pretrain/test_dinov2.py). Registers (Darcet et al.
2023, arXiv:2309.16588), SwiGLU and LayerScale are arguments of timm's models.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from foreseen.config import Config
from foreseen.errors import BadInput
from foreseen.pretrain.crop_masks import StratifiedMasks
from foreseen.pretrain.distilled_network import Network, Parts, draw_tokens, projection_head
from foreseen.pretrain.masked_distillation import (
    MaskedDistillation,
    MaskedDistillationOptions,
    check_head,
    check_masks,
    count_patch_prototypes,
)
from foreseen.pretrain.small_machines import Size


class DINOv2Options(MaskedDistillationOptions):
    """Options of `method.name: dinov2`."""

    name: Literal["dinov2"] = "dinov2"
    separate_heads: bool = True
    """Whether patch tokens have a head of their own; else they share that of class tokens."""
    patch_bottleneck_dim: int = Field(256, ge=1)
    """Length of the unit vector of the patches' own head."""
    norm_last_layer: bool = False
    """Hold the prototypes at unit length; else each has a gain that is trained, as in DINOv2's code."""
    teacher_temp_per: Literal["epoch", "step"] = "step"
    """Whether the temperature moves once an epoch, as in DINO and iBOT, or at every step, as in DINOv2."""
    centering: Literal["centre", "sinkhorn"] = "sinkhorn"
    """How targets are balanced: by a running mean of the teacher's logits, or by Sinkhorn-Knopp over each batch."""
    patch_embed_lr_scale: float = Field(0.2, gt=0)
    """Factor on the lr of a ViT's patch embedding, on top of `optim.layer_decay`."""
    koleo_weight: float = Field(0.1, ge=0)
    """Of the regulariser that spreads class tokens; 0 switches it off."""
    mask_probability: float = Field(0.5, gt=0, le=1)
    """Share of a step's large crops that are masked."""
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of patches hidden; over a step the shares are spread evenly between them."""

    @model_validator(mode="after")
    def _ratios_rise(self) -> Self:
        if not 0 <= self.mask_ratio[0] <= self.mask_ratio[1] <= 1:
            raise ValueError(f"method.mask_ratio must be two rising shares in [0, 1], got {list(self.mask_ratio)}")
        return self


class DINOv2(MaskedDistillation):
    """Class and patch distillation with KoLeo, over any plain timm ViT, and timm's Swins."""

    drops_gradient = False  # the authors set the frozen layer's lr to 0, and its moments go on
    centres_all_patches = False

    @classmethod
    def build(cls, config: Config) -> "DINOv2":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`.

        Args:
            config: with its length resolved, since the rules for small machines need it.
        """
        options = config.method
        assert isinstance(options, DINOv2Options)
        check_head(options)
        parts = Parts.of(config)
        grid = check_masks(parts)
        if config.model.init_from is None:
            draw_tokens(parts.backbone, std=1e-6)
        plan, size = parts.plan, Size.of(config)
        count, patch_head = plan.prototypes, None
        head = projection_head(options, parts.num_features, plan.prototypes)
        if options.separate_heads:
            count, notes = count_patch_prototypes(options, plan, size)
            plan = replace(plan, notes=plan.notes + notes)
            patch_head = projection_head(
                options, parts.num_features, count, bottleneck_dim=options.patch_bottleneck_dim
            )  # fmt: skip
        student = Network(parts.backbone, head, patch_head, resize=options.position_resize, masks=True)
        masks = StratifiedMasks(
            grid, parts.large.count, config.batch.global_size, config.seed, options.mask_probability, options.mask_ratio
        )
        if masks.masked < 1:
            raise BadInput(
                f"method.mask_probability {options.mask_probability} masks none of the {parts.large.count} × "
                f"{config.batch.global_size} large crops of a step, so that no patch would ever be trained; raise it "
                "or batch.global_size"
            )
        return cls(student, options, parts.large, parts.small, plan, masks, count)


def official_backbone(state: Mapping[str, Tensor], vit: VisionTransformer) -> dict[str, Tensor]:
    """Rename the weights of an authors' ViT to those of a timm one, without its mask token.

    Where timm's has no position for prefix tokens, that of the class token is added to the token itself.

    Args:
        state: "cls_token", "register_tokens" and so on; blocks may be in chunks.
        vit: that they are for.

    Source: facebookresearch/dinov2, models/vision_transformer.py.
    """
    renamed = {}
    for name, tensor in state.items():
        parts = name.split(".")
        if parts[0] == "blocks" and parts[2].isdigit():
            parts = ["blocks", *parts[2:]]
        ours = ".".join(parts).replace("mlp.w12.", "mlp.fc1.").replace("mlp.w3.", "mlp.fc2.")
        renamed[{"register_tokens": "reg_token"}.get(ours, ours)] = tensor
    renamed.pop("mask_token", None)
    positions = renamed["pos_embed"]
    of_class, of_patches = positions[:, :1], positions[:, 1:]
    if vit.no_embed_class:
        renamed["cls_token"] = renamed["cls_token"] + of_class
        renamed["pos_embed"] = of_patches
    elif "reg_token" in renamed:
        nothing = positions.new_zeros(1, renamed["reg_token"].shape[1], positions.shape[2])
        renamed["pos_embed"] = torch.cat([of_class, nothing, of_patches], dim=1)
    return renamed


def from_official(state: Mapping[str, Any], vit: VisionTransformer) -> dict[str, Tensor]:
    """Rename an authors' training checkpoint to this objective's: its "student" or "teacher", or both.

    Args:
        state: with networks of "backbone.*", "dino_head.*" and, where heads are separate, "ibot_head.*".
        vit: the backbone that they are for.

    Source: facebookresearch/dinov2, train/ssl_meta_arch.py.
    """
    renamed: dict[str, Tensor] = {}
    for network in ("student", "teacher"):
        found = state.get(network, {})
        backbone = {n.removeprefix("backbone."): t for n, t in found.items() if n.startswith("backbone.")}
        if backbone:
            renamed |= {f"{network}.backbone.{n}": t for n, t in official_backbone(backbone, vit).items()}
        if network == "student" and "mask_token" in backbone:
            renamed["student.mask_token"] = backbone["mask_token"]
        for name, tensor in found.items():
            for theirs, ours in (("dino_head.", "head."), ("ibot_head.", "patch_head.")):
                if name.startswith(theirs):
                    renamed[f"{network}.{ours}{name.removeprefix(theirs)}"] = tensor
    return renamed
