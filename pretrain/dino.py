"""DINO: tell from any crop of an image what a slow copy of the network says of another, larger one.

Caron et al. 2021, Emerging Properties in Self-Supervised Vision Transformers, arXiv:2104.14294; the authors' code is
facebookresearch/dino at 7c446df, whose numbers this file reproduces (tests/pretrain/test_dino.py).
"""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from foreseen.config import Config
from foreseen.pretrain.distilled_network import Network, Parts, official_networks, projection_head
from foreseen.pretrain.self_distillation import SelfDistillation
from foreseen.pretrain.self_distillation_options import SelfDistillationOptions


class DINOOptions(SelfDistillationOptions):
    """Options of `method.name: dino`."""

    name: Literal["dino"] = "dino"


class DINO(SelfDistillation):
    """Self-distillation without labels, over any timm backbone that pools its features."""

    @classmethod
    def build(cls, config: Config) -> "DINO":
        """The objective that a recipe trains, with weights drawn from the global generator or from `init_from`.

        Args:
            config: with its length resolved, since the rules for small machines need it.
        """
        options = config.method
        assert isinstance(options, DINOOptions)
        parts = Parts.of(config)
        head = projection_head(options, parts.num_features, parts.plan.prototypes)
        student = Network(parts.backbone, head, resize=options.position_resize)
        return cls(student, options, parts.large, parts.small, parts.plan)


def from_official(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename an authors' training checkpoint: its "student", "teacher" and the state of its "dino_loss".

    Source: facebookresearch/dino at 7c446df, main_dino.py.
    """
    return official_networks(state)
