"""Every pretraining method, by the name that recipes use."""

from collections.abc import Callable
from dataclasses import dataclass

from foreseen.config import Config, MethodOptions
from foreseen.engine.objective import Objective
from foreseen.pretrain.dino import DINO, DINOOptions
from foreseen.pretrain.dinov2 import DINOv2, DINOv2Options
from foreseen.pretrain.ibot import IBOT, IBOTOptions
from foreseen.pretrain.mae import MAE, MAEOptions


@dataclass(frozen=True)
class Method:
    """A method: its options, and how a config becomes the objective, drawing weights on the CPU."""

    options: type[MethodOptions]
    build: Callable[[Config], Objective]


METHODS: dict[str, Method] = {
    "dino": Method(DINOOptions, DINO.build),
    "dinov2": Method(DINOv2Options, DINOv2.build),
    "ibot": Method(IBOTOptions, IBOT.build),
    "mae": Method(MAEOptions, MAE.build),
}
