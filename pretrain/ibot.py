"""iBOT: DINO, and masked patches that predict the teacher's own tokens in their places.

Zhou et al. 2022, iBOT: Image BERT Pre-Training with Online Tokenizer, arXiv:2111.07832; the authors' code is
bytedance/ibot, whose numbers this file reproduces (tests/pretrain/test_ibot.py).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from foreseen.config import Config
from foreseen.pretrain.crop_masks import IndependentMasks
from foreseen.pretrain.distilled_network import Network, Parts, official_networks, projection_head
from foreseen.pretrain.masked_distillation import (
    MaskedDistillation,
    MaskedDistillationOptions,
    check_head,
    check_masks,
    count_patch_prototypes,
)
from foreseen.pretrain.small_machines import Size


class IBOTOptions(MaskedDistillationOptions):
    """Options of `method.name: ibot`."""

    name: Literal["ibot"] = "ibot"
    out_dim: int | None = Field(8192, ge=2)
    """Prototypes, K; null fits them to the data and the batch (`pretrain/small_machines.py`)."""
    shared_head: bool = True
    """Whether class and patch tokens share the last layer; they always share the head's MLP."""
    mask_shape: Literal["block", "random"] = "block"
    mask_ratio: tuple[float, ...] = (0.0, 0.3)
    """Share of patches hidden in a large crop; one of these is chosen for each crop."""
    mask_ratio_spread: tuple[float, ...] = (0.0, 0.2)
    """The share is uniform within so much of the one chosen."""

    @model_validator(mode="after")
    def _ratios_are_shares(self) -> Self:
        pairs = list(zip(self.mask_ratio, self.mask_ratio_spread, strict=False))
        if not pairs or len(self.mask_ratio) != len(self.mask_ratio_spread):
            raise ValueError(
                f"method.mask_ratio {list(self.mask_ratio)} and method.mask_ratio_spread "
                f"{list(self.mask_ratio_spread)} must be as many"
            )
        if any(not (0 <= spread <= ratio and ratio + spread <= 1) for ratio, spread in pairs):
            raise ValueError(
                f"method.mask_ratio {list(self.mask_ratio)} ± {list(self.mask_ratio_spread)} leaves [0, 1]"
            )  # fmt: skip
        return self


class IBOT(MaskedDistillation):
    """DINO with masked patch distillation, over any plain timm ViT, and timm's Swins."""

    @classmethod
    def build(cls, config: Config) -> "IBOT":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`.

        Args:
            config: with its length resolved, since the rules for small machines need it.
        """
        options = config.method
        assert isinstance(options, IBOTOptions)
        check_head(options)
        parts = Parts.of(config)
        grid = check_masks(parts)
        plan = parts.plan
        count = plan.prototypes
        if not options.shared_head:
            count, notes = count_patch_prototypes(options, plan, Size.of(config))
            plan = replace(plan, notes=plan.notes + notes)
        head = projection_head(
            options, parts.num_features, plan.prototypes, patch_prototypes=None if options.shared_head else count
        )
        student = Network(parts.backbone, head, resize=options.position_resize, masks=True)
        masks = IndependentMasks(
            grid, parts.large.count, options.mask_shape, options.mask_ratio, options.mask_ratio_spread
        )
        return cls(student, options, parts.large, parts.small, plan, masks, count)


def from_official(state: Mapping[str, Any], *, shared_head: bool) -> dict[str, Tensor]:
    """Rename an authors' training checkpoint: its "student", "teacher" and the state of its "ibot_loss".

    Args:
        state: the checkpoint.
        shared_head: of the recipe; their files list a shared last layer under both names.

    Source: bytedance/ibot, main_ibot.py and models/head.py.
    """
    renamed = official_networks(state)
    if shared_head:
        return {name: tensor for name, tensor in renamed.items() if ".last_layer2." not in name}
    return renamed
