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
from foreseen.handoff.encoder import PUBLIC, EncoderFolder, Preprocessing, describe_parent, load_encoder


@dataclass(frozen=True)
class FrozenEncoder:
    """A timm model in evaluation mode, what it wants done to images, and where it is from.

    Attributes:
        parent: what to say of it where other weights come from it, its lineage included.
        sha256: of its folder's weights, or of public weights as they were had.
    """

    model: nn.Module
    preprocessing: Preprocessing
    lineage: Mapping[str, Any]
    parent: Mapping[str, Any]
    sha256: str


@dataclass(frozen=True)
class FrozenClassifier(FrozenEncoder):
    """The same with its head.

    Attributes:
        num_classes: K.
        class_names: K names, where they are known.
    """

    num_classes: int
    class_names: tuple[str, ...] | None


def frozen_encoder(source: str) -> FrozenEncoder:
    """Load an encoder as it was saved, without its classifier.

    Args:
        source: an encoder folder; or `timm:NAME` for public weights, which may download.

    Raises:
        BadInput: it is no encoder folder, or there are no such weights.
    """
    read = load_encoder(source)  # its messages say what is wrong with a folder or a name
    return FrozenEncoder(
        _model(source, num_classes=0), read.preprocessing, read.lineage, describe_parent(read), _sha256(read)
    )


def frozen_classifier(source: str) -> FrozenClassifier:
    """Load an encoder with its head.

    Args:
        source: the encoder folder of a fine-tuned run; or `timm:NAME` for public weights, which may download.

    Raises:
        BadInput: it is no encoder folder, it has no head, or there are no such weights.
    """
    read = load_encoder(source)
    if read.num_classes == 0:
        raise BadInput(f"the encoder {source} has no classes yet: fine-tune it first")
    return FrozenClassifier(
        _model(source), read.preprocessing, read.lineage, describe_parent(read), _sha256(read), read.num_classes,
        read.class_names,
    )  # fmt: skip


def _model(source: str, **args: Any) -> nn.Module:
    name = source.removeprefix(PUBLIC) if source.startswith(PUBLIC) else f"local-dir:{Path(source)}"
    try:
        # Its weights are read, not drawn: what is drawn for the network that learns from it stays as it is.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model: nn.Module = timm.create_model(name, pretrained=True, **args)
    except (RuntimeError, TypeError, ValueError, OSError) as error:
        raise BadInput(f"the encoder {source} cannot be loaded: {error}") from error
    return model.eval().requires_grad_(False)


def _sha256(read: EncoderFolder) -> str:
    return read.weights or _checksum(read.state)


def _checksum(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
