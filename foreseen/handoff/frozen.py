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
    """A timm model without a classifier, in evaluation mode, what it wants done to images, and where it is from.

    Attributes:
        weights: sha256 of its file of weights; None for public ones.
    """

    model: nn.Module
    preprocessing: Preprocessing
    lineage: Mapping[str, Any]
    weights: str | None


@dataclass(frozen=True)
class FrozenClassifier:
    """A timm model with its head, in evaluation mode, what it wants done to images, and what its classes are called."""

    model: nn.Module
    preprocessing: Preprocessing
    label_names: tuple[str, ...]


def frozen_encoder(source: str) -> FrozenEncoder:
    """Load an encoder as it was saved.

    Args:
        source: an encoder folder; or `timm:NAME` for public weights, which may download.

    Raises:
        BadInput: it is no encoder folder, or there are no such weights.
    """
    read = load_encoder(source)  # its messages say what is wrong with a folder or a name
    return FrozenEncoder(_load(source, num_classes=0), read.preprocessing, read.lineage, read.weights)


def frozen_classifier(source: str) -> FrozenClassifier:
    """Load a fine-tuned model with its head. Classes that nobody named are called by their numbers.

    Args:
        source: a fine-tuning run's folder, or its encoder folder; or `timm:NAME`, which may download.

    Raises:
        BadInput: it is no such folder, or holds an encoder without a head.
    """
    inner = Path(source) / "encoder"
    if not source.startswith(PUBLIC) and (inner / "config.json").is_file():
        source = str(inner)
    read = load_encoder(source)
    if not read.num_classes:
        raise BadInput(f"{source} is an encoder without a classifier: fine-tune it first, with `foreseen finetune`")
    names = read.label_names or tuple(map(str, range(read.num_classes)))
    return FrozenClassifier(_load(source), read.preprocessing, names)


def _load(source: str, **arguments: Any) -> nn.Module:
    name = source.removeprefix(PUBLIC) if source.startswith(PUBLIC) else f"local-dir:{Path(source)}"
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **arguments)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"the encoder {source} cannot be loaded: {error}") from error
    return model.eval().requires_grad_(False)
