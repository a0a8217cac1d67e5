"""VQ-KD, the tokenizer of BEiT v2: codes from which a small decoder can tell what a teacher sees at each place.

Peng et al. 2022, BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers, arXiv:2208.06366, section 2.2;
the authors' code is microsoft/unilm at 768a3c8, beit2/modeling_vqkd.py, whose numbers this file reproduces
(tests/tokenizers/test_vqkd.py).

Letters: B images, H and W pixels, h and w codes, L = h * w, K codes in the codebook.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.models.backbone import architecture_of, create_backbone, patch_grid, patch_size
from foreseen.models.masked_vit import check_plain_vit
from foreseen.tokenizers.quantizer import Codebook, nearest
from foreseen.tokenizers.tokenizer import Tokenizer

HALF = (0.5, 0.5, 0.5)
"""Mean and std of the authors' input: pixels in [-1, 1]."""
_SET_ELSEWHERE = ("img_size", "global_pool", "fc_norm", "num_classes")


class VQKD(Tokenizer):
    """A plain ViT, a task layer, and a codebook of unit vectors.

    Args:
        architecture: timm's name of the ViT.
        model_args: its keyword arguments; its input size is not among them.
        input_size: (H, W) in pixels.
        codebook_size: K.
        code_dim: width of a code.
        mean, std: what its images are normalised by.
        interpolation: how a picture is brought to its size.
        vit: the ViT itself, where it is made already.
    """

    kind = "vqkd"

    def __init__(
        self, *, architecture: str, model_args: Mapping[str, Any], input_size: tuple[int, int], codebook_size: int,
        code_dim: int, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF,
        interpolation: Literal["bicubic", "bilinear", "lanczos"] = "bicubic", vit: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._architecture, self._model_args = architecture, dict(model_args)
        self.input_size = (input_size[0], input_size[1])
        self.mean, self.std, self.interpolation = tuple(mean), tuple(std), interpolation
        self.codebook_size, self.code_dim = codebook_size, code_dim
        made = vit or create_backbone(architecture, img_size=self.input_size, args=model_args)
        self.encoder: VisionTransformer = check_plain_vit(made, architecture)
        patch = patch_size(made)
        assert patch is not None, "check_plain_vit lets no model without patches pass"
        self.stride = patch
        self.encode_task_layer = task_layer(self.encoder.embed_dim, code_dim)
        self.codebook = Codebook(codebook_size, code_dim)

    @classmethod
    def around(cls, vit: nn.Module, **more: Any) -> "VQKD":
        """A tokenizer over a backbone of `create_backbone`, whose weights it keeps; `more` are its other arguments."""
        name, args = architecture_of(vit)
        own = {key: value for key, value in args.items() if key not in _SET_ELSEWHERE}
        return cls(architecture=name, model_args=own, vit=vit, **more)

    def arguments(self) -> dict[str, Any]:
        """Plain values that make it again, but for its weights."""
        return {
            "architecture": self._architecture, "model_args": self._model_args, "input_size": list(self.input_size),
            "codebook_size": self.codebook_size, "code_dim": self.code_dim, "mean": list(self.mean),
            "std": list(self.std), "interpolation": self.interpolation,
        }  # fmt: skip

    def tokens(self, images: Tensor) -> Tensor:
        """What is quantized: normalised images [B, 3, H, W] -> [B, L, code_dim], in float32 at least."""
        features = patch_tokens(self.encoder, images)
        with torch.autocast(images.device.type, enabled=False):  # a code must not flip with the precision of a run
            return self.encode_task_layer(features.to(self.codebook.weight.dtype))  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes of normalised images, [B, 3, H, W] -> [B, h, w] int64."""
        rows, columns = self.grid((images.shape[2], images.shape[3]))
        weight = self.codebook.weight
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.tokens(images.to(weight.dtype))
            return nearest(F.normalize(tokens, dim=-1), weight).view(-1, rows, columns)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of codes; its position table ties it to the size that it was trained at."""
        if tuple(size) != self.input_size and not self.encoder.dynamic_img_size:
            height, width = self.input_size
            raise BadInput(
                f"this VQ-KD tokenizer takes {height}×{width} px, not {size[0]}×{size[1]}; train it with "
                f"views.size=[{size[0]},{size[1]}], or with model.args.dynamic_img_size=true for any size"
            )
        return super().grid(size)

    def input_for(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The input (H, W) in pixels that has such a grid of codes."""
        own = patch_grid(self.encoder)
        if tuple(grid) != own and not self.encoder.dynamic_img_size:
            raise BadInput(
                f"this VQ-KD tokenizer has {own[0]}×{own[1]} codes, not {grid[0]}×{grid[1]}; train it with "
                f"views.size=[{grid[0] * self.stride[0]},{grid[1] * self.stride[1]}]"
            )
        return super().input_for(grid)


def patch_tokens(vit: VisionTransformer, images: Tensor) -> Tensor:
    """Patch tokens after the ViT's own norm, [B, L, D]; the authors' `fc_norm`, over the tokens one by one."""
    features = vit.forward_features(images)
    return vit.fc_norm(features[:, vit.num_prefix_tokens :])  # type: ignore[no-any-return]


def task_layer(width: int, out: int) -> nn.Sequential:
    """Linear, tanh, linear, as the authors put it behind the encoder and behind the decoder."""
    first, last = nn.Linear(width, width), nn.Linear(width, out)
    for layer in (first, last):
        nn.init.trunc_normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(first, nn.Tanh(), last)
