"""Every pretraining method, by the name that recipes use."""

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import Accelerator

from foreseen.config import Config, MethodOptions
from foreseen.engine.objective import Objective
from foreseen.pretrain.beit import BEiT, BEiTOptions
from foreseen.pretrain.dino import DINO, DINOOptions
from foreseen.pretrain.dinov2 import DINOv2, DINOv2Options
from foreseen.pretrain.distill import FeatureDistill, FeatureDistillOptions
from foreseen.pretrain.ibot import IBOT, IBOTOptions
from foreseen.pretrain.mae import MAE, MAEOptions
from foreseen.pretrain.tokenizer_choice import choose_tokenizer
from foreseen.tokenizers.looking import Cut


@dataclass(frozen=True)
class Method:
    """A method: its options, and how a config becomes the objective, drawing weights on the CPU.

    Attributes:
        ready: what has to be there before the objective can be built, such as a tokenizer: makes it from the training
            pictures, and returns the config that names it. All ranks call it, at every start.
    """

    options: type[MethodOptions]
    build: Callable[[Config], Objective]
    ready: Callable[[Config, Cut, Accelerator], Config] | None = None


METHODS: dict[str, Method] = {
    "dino": Method(DINOOptions, DINO.build),
    "dinov2": Method(DINOv2Options, DINOv2.build),
    "ibot": Method(IBOTOptions, IBOT.build),
    "mae": Method(MAEOptions, MAE.build),
    "feature_distill": Method(FeatureDistillOptions, FeatureDistill.build),
    "beit": Method(BEiTOptions, BEiT.build, choose_tokenizer),
}
