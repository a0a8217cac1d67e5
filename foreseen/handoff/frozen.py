"""An encoder to look through, not to train: the very model of a folder, with its own norm and pooling."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import nn

from foreseen.errors import BadInput
from foreseen.handoff.encoder import PUBLIC, Preprocessing, load_encoder


@dataclass(frozen=True)
class FrozenEncoder:
    """A timm model without a classifier, in evaluation mode, what it wants done to images, and where it is from."""

    model: nn.Module
    preprocessing: Preprocessing
    lineage: Mapping[str, Any]


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
        model: nn.Module = timm.create_model(name, pretrained=True, num_classes=0)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"the encoder {source} cannot be loaded: {error}") from error
    return FrozenEncoder(model.eval().requires_grad_(False), read.preprocessing, read.lineage)
