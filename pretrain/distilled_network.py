"""The network that student and teacher are, and what a config makes for it.

Letters: N images, C channels, H and W pixels, L patches, M of them looked at, D features, d of the bottleneck,
K prototypes.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foreseen.config import Config
from foreseen.data.multicrop import multicrop_views
from foreseen.data.views import View
from foreseen.device_keys import subkey
from foreseen.errors import BadInput
from foreseen.handoff.encoder import create_encoder
from foreseen.models.accepted_sizes import check_size
from foreseen.models.backbone import architecture_of
from foreseen.models.drop_path import draw_drop_path
from foreseen.models.masked_vit import check_plain_vit
from foreseen.models.position import PositionResize
from foreseen.models.projection_head import ProjectionHead
from foreseen.models.swin_tokens import is_swin, swin_tokens
from foreseen.models.take import take
from foreseen.models.vit_tokens import Patches, vit_tokens
from foreseen.pretrain.self_distillation_options import Plan, SelfDistillationOptions


class Encoded(NamedTuple):
    """What a backbone makes of images.

    Attributes:
        pooled: as the backbone's own head would pool them, [N, D].
        patches: tokens that were asked for, [N, M, D]; None of a backbone that is neither a plain ViT nor a Swin.
        seen: all patches as the last block of a plain ViT sees them, or of a Swin's last map, [N, L, D].
    """

    pooled: Tensor
    patches: Tensor | None = None
    seen: Tensor | None = None


class Network(nn.Module):
    """A backbone and the heads that go on from its features; the student has a mask token besides, where it needs one.

    Args:
        backbone: a timm model without classes.
        head: of its pooled features.
        patch_head: of its patch tokens; None where `head` serves them, or nobody does.
        resize: of a plain ViT's positions.
        masks: whether patches can be hidden.
    """

    def __init__(
        self,
        backbone: nn.Module,
        head: ProjectionHead,
        patch_head: ProjectionHead | None = None,
        *,
        resize: PositionResize,
        masks: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.patch_head = patch_head
        described: Any = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, described.embed_dim)) if masks else None
        self._resize: PositionResize = resize

    def patch_bottleneck(self, tokens: Tensor) -> Tensor:
        """Patch tokens [N, M, D] -> [N, M, d]."""
        head = self.head if self.patch_head is None else self.patch_head
        rows: Tensor = head(tokens.flatten(0, 1))
        return rows.view(*tokens.shape[:2], -1)

    def patch_prototypes(self) -> Tensor:
        """Of patch tokens, [K, d]."""
        return self.head.patch_prototypes() if self.patch_head is None else self.patch_head.prototypes()

    def encode(
        self, images: Tensor, key: Tensor | None = None, mask: Tensor | None = None, *, patches: Patches = "none"
    ) -> Encoded:
        """Run the backbone; behind the last attention of a plain ViT it computes what is pooled or asked for.

        Args:
            images: normalised, [N, C, H, W].
            key: for drop path, [N]; None where none is drawn, in evaluation.
            mask: patches hidden, [N, L]; for plain ViTs, and Swins, whose patches are the places of their last map.
            patches: whose tokens are wanted.
        """
        backbone: Any = self.backbone
        with nullcontext() if key is None else draw_drop_path(backbone, subkey(key, "drop_path")):
            if is_swin(backbone):
                places = swin_tokens(backbone, images, mask=mask, mask_token=self.mask_token)
                every = places.flatten(1, 2)
                return Encoded(backbone.forward_head(places, pre_logits=True), _wanted(every, patches), every)
            if not is_plain_vit(backbone):
                return Encoded(backbone(images))
            pools_all = backbone.global_pool != "token"
            tokens = vit_tokens(
                backbone, images, mask=mask, mask_token=self.mask_token, resize=self._resize,
                patches="all" if pools_all else patches,
            )  # fmt: skip
        found = tokens.wanted[:, backbone.num_prefix_tokens :]
        if pools_all:
            found = _wanted(found, patches)
        return Encoded(backbone.forward_head(tokens.wanted, pre_logits=True), found, tokens.seen)


def _wanted(tokens: Tensor, patches: Patches) -> Tensor:
    """Those of all patch tokens [N, L, D] that were asked for, [N, M, D]."""
    if isinstance(patches, Tensor):
        return take(tokens, patches)
    return tokens if patches == "all" else tokens[:, :0]


def is_plain_vit(model: nn.Module) -> bool:
    """Whether a backbone's patches can be hidden, and its positions be interpolated, here."""
    if not isinstance(model, VisionTransformer):
        return False
    try:
        check_plain_vit(model, "", stem=True)
    except BadInput:
        return False
    return True


@dataclass(frozen=True)
class Parts:
    """What a config makes for any self-distilled method.

    Attributes:
        backbone: with fresh weights, or those of `init_from`.
        large, small: views.
        plan: the options' numbers.
    """

    backbone: nn.Module
    large: View
    small: tuple[View, ...]
    plan: Plan

    @classmethod
    def of(cls, config: Config) -> "Parts":
        """Build them; weights come from the global generator."""
        options = config.method
        assert isinstance(options, SelfDistillationOptions)
        encoder = create_encoder(config.model, img_size=config.views.size, any_size=True)
        preprocessing = encoder.preprocessing
        large, *small = multicrop_views(options.crops, config.views, preprocessing.mean, preprocessing.std)
        if config.model.init_from is None:
            draw_tokens(encoder.model)
        for view in small:
            check_size(encoder.model, view.size, "method.crops.local_size", config.views.size)
        if options.head_warmup_steps and config.model.init_from is None:
            raise BadInput(
                f"method.head_warmup_steps is {options.head_warmup_steps} and model.init_from null: a backbone that "
                "begins from nothing has nothing to keep; set method.head_warmup_steps=0"
            )
        plan, begun = Plan.of(config), encoder.initialised
        plan = replace(plan, notes=(*plan.notes, *(begun.notes if begun is not None else ())))
        return cls(encoder.model, large, tuple(small), plan)

    @property
    def num_features(self) -> int:
        """D."""
        described: Any = self.backbone
        features: int = described.num_features
        return features

    @property
    def name(self) -> str:
        """Of the backbone, in timm's words."""
        return architecture_of(self.backbone)[0]


def draw_tokens(backbone: nn.Module, std: float = 0.02) -> None:
    """Draw the class token of a ViT as DINO and iBOT do; timm draws all else of it as they do."""
    token = getattr(backbone, "cls_token", None)
    if isinstance(token, nn.Parameter):
        nn.init.trunc_normal_(token, std=std)


def projection_head(options: SelfDistillationOptions, in_dim: int, prototypes: int, **more: Any) -> ProjectionHead:
    """The head that a method's options ask for; `more` wins over them."""
    asked: dict[str, Any] = {
        "hidden_dim": options.hidden_dim, "bottleneck_dim": options.bottleneck_dim, "num_layers": options.head_layers,
        "batch_norm": options.head_batch_norm, "trains_gain": not options.norm_last_layer,
    }  # fmt: skip
    return ProjectionHead(in_dim, prototypes, **asked | more)


def official_networks(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename the weights of an authors' training checkpoint to a self-distilled objective's.

    Args:
        state: with "student" and "teacher" (either may be missing), and the loss under "dino_loss" or "ibot_loss".

    Source: facebookresearch/dino at 7c446df, main_dino.py; bytedance/ibot, main_ibot.py.
    """
    renamed: dict[str, Tensor] = {}
    for network in ("student", "teacher"):
        for name, tensor in state.get(network, {}).items():
            ours = name.removeprefix("module.").replace("last_layer.parametrizations.weight.original0", _G).replace(
                "last_layer.parametrizations.weight.original1", _V
            )  # fmt: skip
            if ours == "backbone.masked_embed":
                ours = "mask_token"
                if network == "teacher":
                    continue
            renamed[f"{network}.{ours}"] = tensor
    loss = state.get("dino_loss", state.get("ibot_loss", {}))
    if "center" in loss:
        renamed["centre.center"] = loss["center"].flatten()
    if "center2" in loss:
        renamed["patch_centre.center"] = loss["center2"].flatten()
    return renamed


_G, _V = "last_layer.weight_g", "last_layer.weight_v"
