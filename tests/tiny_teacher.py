"""A classifier to learn from: the same at every call, in a folder of its own."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone

CLASSES = ("a", "b", "c")  # of tests/conftest.py's pictures


def save_teacher(
    folder: Path, *, name: str = "vit_tiny_patch16_224", size: tuple[int, int] = (24, 24), num_classes: int = 3,
    class_names: Sequence[str] | None = None, seed: int = 11, **args: Any,
) -> Path:  # fmt: skip
    """Write an encoder folder with a head that tells pictures apart, though it has learned nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith("vit"):
            args = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3} | args
        model = create_backbone(name, img_size=size, num_classes=num_classes, args=args)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(3.0)
        seen = Preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bicubic", 0.875, size)
        save_encoder(model, folder, preprocessing=seen, lineage={}, class_names=class_names)
    return folder


def tiny_teacher(num_classes: int = 3) -> Path:
    """The folder of a teacher of so many classes, which all processes share."""
    folder = Path(tempfile.gettempdir()) / f"foreseen-tiny-teacher-{os.getuid()}" / f"{num_classes}-v1"
    if not (folder / "config.json").is_file():
        own = Path(tempfile.mkdtemp())
        names = CLASSES if num_classes == len(CLASSES) else None
        save_teacher(own / "teacher", num_classes=num_classes, class_names=names)
        folder.parent.mkdir(exist_ok=True)
        try:
            (own / "teacher").rename(folder)
        except OSError:
            assert (folder / "config.json").is_file()  # another process was faster
    return folder
