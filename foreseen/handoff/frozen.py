"""An encoder to look through, not to train: the very model of a folder, with its own norm and pooling."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.handoff.encoder import PUBLIC, Preprocessing, describe_parent, load_encoder


@dataclass(frozen=True)
class FrozenEncoder:
    """A timm model without a classifier, in evaluation mode, what it wants done to images, and where it is from.

    Attributes:
        parent: what to say of it where other weights come from it, its lineage included.
        sha256: of its folder's weights, or of public weights as they were had.
    """

    model: nn.Module
    preprocessing: Preprocessing
    lineage: Mapping[str, Any]
    parent: Mapping[str, Any]
    sha256: str


def frozen_encoder(source: str) -> FrozenEncoder:
    """Load an encoder as it was saved.

    Args:
        source: an encoder folder; or `timm:NAME` for public weights, which may download.

    Raises:
        BadInput: it is no encoder folder, or there are no such weights.
    """
    read = load_encoder(source)  # its messages say what is wrong with a folder or a name
    name = source.removeprefix(PUBLIC) if source.startswith(PUBLIC) else f"local-dir:{Path(source)}"
    try:
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"the encoder {source} cannot be loaded: {error}") from error
    checksum = read.weights or _checksum(read.state)
    return FrozenEncoder(
        model.eval().requires_grad_(False), read.preprocessing, read.lineage, describe_parent(read), checksum
    )


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
