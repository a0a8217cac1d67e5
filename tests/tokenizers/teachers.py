"""Tiny encoder folders to be taught by."""

from pathlib import Path

import torch

from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone


def save_teacher(folder: Path, *, size: tuple[int, int] = (32, 32), patch: int = 8, seed: int = 0) -> Path:
    """A ViT of random weights as an encoder folder; written once."""
    if not (folder / "config.json").is_file():
        args = {"patch_size": patch, "embed_dim": 32, "depth": 1, "num_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create_backbone("vit_tiny_patch16_224", img_size=size, args=args)
        seen = Preprocessing((0.4, 0.45, 0.5), (0.2, 0.25, 0.3), "bicubic", 0.875, size)
        save_encoder(model, folder, preprocessing=seen, lineage={"method": "none"})
    return folder
