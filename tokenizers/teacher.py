"""A frozen encoder whose features a tokenizer learns to predict: any timm model, brought to the grid of codes.

Letters: B images, H and W pixels, h and w codes, D the teacher's width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.handoff.encoder import PUBLIC
from foreseen.handoff.frozen import FrozenEncoder, frozen_encoder
from foreseen.models.backbone import patch_size
from foreseen.models.frozen import Frozen

_HOW = (
    "train one without labels, such as by `foreseen pretrain mae_cpu_minutes`, and give its folder: "
    f"method.teacher=runs/mae_cpu_minutes/encoder; or take public weights: method.teacher={PUBLIC}NAME"
)


def load_teacher(source: str | None, *, grid: tuple[int, int], crop: tuple[int, int]) -> "Teacher":
    """Load a teacher, and choose the size that it sees images at.

    Args:
        source: an encoder folder, or `timm:NAME` for public weights, which may download.
        grid: rows and columns of codes.
        crop: (H, W) in pixels that the tokenizer sees.

    Raises:
        BadInput: there is none, or it gives no features of places.
    """
    if source is None:
        raise BadInput(f"method.teacher is null, and this tokenizer learns from a teacher: {_HOW}")
    try:
        encoder = frozen_encoder(source)
    except BadInput as error:
        raise BadInput(f"method.teacher {source}: {error}. To have a teacher, {_HOW}") from error
    return Teacher(encoder, grid=grid, crop=crop)


class Teacher(Frozen[Any]):
    """A frozen timm model and the features that it has for each code.

    A model with one grid of patches sees images at the size at which that is the grid of codes, with its position table
    resampled. One that has other grids sees the tokenizer's size, or its own where it takes no other, and its features
    are interpolated.

    Args:
        encoder: as it was saved.
        grid: rows and columns of codes, (h, w).
        crop: (H, W) in pixels that the tokenizer sees.

    Attributes:
        size: (H, W) in pixels that the teacher wants to see.
        mean, std: what it wants its images normalised by.
        width: D.
        note: what was done to make it fit, in words.
    """

    def __init__(self, encoder: FrozenEncoder, *, grid: tuple[int, int], crop: tuple[int, int]) -> None:
        super().__init__(encoder.model)
        self.grid = grid
        self.parent = encoder.parent
        self.sha256 = encoder.sha256
        self.mean, self.std = encoder.preprocessing.mean, encoder.preprocessing.std
        own = encoder.preprocessing.size
        self.size, own_grid = self._fit(own, crop)
        self.note = _note(encoder.parent["source"], own, self.size, own_grid, grid, self.mean, self.std)

    def _fit(self, own: tuple[int, int], crop: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """The size to see images at, and the grid of features there; the first of some that the model can take."""
        patch = patch_size(self.network)
        has_patches = patch is not None and len(getattr(self.network, "blocks", ())) > 0  # else its map is coarser
        wished = (self.grid[0] * patch[0], self.grid[1] * patch[1]) if patch is not None and has_patches else crop
        problem: Exception | None = None
        now = own
        for size in dict.fromkeys((wished, crop, own)):
            try:
                if size != now and has_patches and hasattr(self.network, "set_input_size"):
                    self.network.set_input_size(img_size=size)
                    now = size
                with torch.no_grad():
                    features = self._features(torch.zeros(1, len(self.mean), *size))
            except (RuntimeError, ValueError, AssertionError, TypeError, AttributeError) as error:
                problem = error
                continue
            self.width = features.shape[1]
            return size, (features.shape[2], features.shape[3])
        raise BadInput(
            f"method.teacher {self.parent['source']} gives no features of places of an image of "
            f"{wished[0]}×{wished[1]} or {own[0]}×{own[1]} px ({problem}); take another"
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features of each code's place: images [B, 3, H, W] -> [B, h * w, D], in float32 at least."""
        with torch.no_grad():
            features = self._features(images)
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            if features.shape[2:] != self.grid:
                features = F.interpolate(features, size=self.grid, mode="bilinear", antialias=True)
        return features.flatten(2).transpose(1, 2)

    def _features(self, images: Tensor) -> Tensor:
        """A map [B, D, rows, columns] after the model's own norm; prefix tokens are no places."""
        found = self.network.forward_features(images)
        if found.ndim == 4:
            if getattr(self.network, "output_fmt", "NCHW") == "NHWC":
                return found.permute(0, 3, 1, 2)  # type: ignore[no-any-return]
            norm = getattr(getattr(self.network, "head", None), "norm", None)  # ConvNeXt's, which is of maps
            return found if norm is None else norm(found)  # type: ignore[no-any-return]
        patch = patch_size(self.network)
        if found.ndim != 3 or patch is None:
            raise ValueError(f"it gives a tensor of {found.ndim} dimensions")
        norm = getattr(self.network, "fc_norm", None) or nn.Identity()
        tokens = norm(found[:, getattr(self.network, "num_prefix_tokens", 1) :])
        rows, columns = images.shape[2] // patch[0], images.shape[3] // patch[1]
        return tokens.transpose(1, 2).unflatten(2, (rows, columns))  # type: ignore[no-any-return]


def _note(
    source: str, own: tuple[int, int], size: tuple[int, int], own_grid: tuple[int, int], grid: tuple[int, int],
    mean: tuple[float, ...], std: tuple[float, ...],
) -> str:  # fmt: skip
    text = f"teacher {source}: sees each crop at {size[0]}×{size[1]} px"
    if size != own:
        text += f" (it was trained at {own[0]}×{own[1]})"
    text += f", normalised by its own mean {_shown(mean)} and std {_shown(std)}"
    if own_grid != grid:
        text += f"; its {own_grid[0]}×{own_grid[1]} features are interpolated to the {grid[0]}×{grid[1]} codes"
    return text


def _shown(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
