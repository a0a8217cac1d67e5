"""The tokenizer folder: what training a tokenizer ends in, and what BEiT reads.

config.json         kind, the arguments that make it, and the checksum of its weights
model.safetensors   its weights, in float32
health.json         how its codebook is used on its pictures, where that was measured
health.png          some of them: original, reconstruction if it makes any, code map
lineage.json        where the weights are from

The checksum of config.json names the tokenizer: it covers the weights, whose own checksum is in it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from foreseen.errors import BadInput
from foreseen.files import read_json
from foreseen.tokenizers.kinds import KINDS
from foreseen.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer as read.

    Attributes:
        source: the folder.
        tokenizer: in evaluation mode, frozen, on the CPU.
        sha256: of its config.json, which names it.
        health: of health.json; empty where it was not measured.
        lineage: where it is from.
    """

    source: Path
    tokenizer: Tokenizer
    sha256: str
    health: dict[str, Any]
    lineage: dict[str, Any]


def save_tokenizer(
    tokenizer: Tokenizer,
    folder: Path,
    *,
    lineage: Mapping[str, Any],
    health: Mapping[str, Any] | None = None,
    pictures: Image.Image | None = None,
) -> None:
    """Write a tokenizer folder, in the place of an older one; it is loaded back before it takes its place.

    Args:
        tokenizer: to be kept.
        folder: of it.
        lineage: where it is from.
        health, pictures: of `foreseen.tokenizers.health.measure_health`.

    Raises:
        BadInput: `folder` holds something else.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise BadInput(f"{folder} is there and is no tokenizer folder; remove it or choose another run.dir")
    new, old = (folder.parent / f".{folder.name}.{word}" for word in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    state = {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().clone().contiguous()
        for name, value in tokenizer.state_dict().items()
    }
    save_file(state, new / "model.safetensors", metadata={"format": "pt"})
    described = {
        "format": 1,
        "kind": tokenizer.kind,
        "codebook_size": tokenizer.codebook_size,
        "arguments": tokenizer.arguments(),
        "weights_sha256": _sha256(new / "model.safetensors"),
    }
    (new / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (new / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n")
    if health is not None:
        (new / "health.json").write_text(json.dumps(health, indent=2) + "\n")
    if pictures is not None:
        pictures.save(new / "health.png")
    for path in new.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    load_tokenizer(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_tokenizer(folder: str | Path) -> TokenizerFolder:
    """Read a tokenizer folder.

    Raises:
        BadInput: it is none, or it is damaged.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        inner = folder / "tokenizer"
        hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
        raise BadInput(f"{folder} is no tokenizer folder: config.json or model.safetensors is missing{hint}")
    try:
        described = read_json(folder / "config.json")
        kind = described["kind"]
        if kind not in KINDS:
            raise BadInput(f"its config.json says kind {kind!r}; there are {', '.join(sorted(KINDS))}")
        if _sha256(folder / "model.safetensors") != described["weights_sha256"]:
            raise BadInput("model.safetensors is not the one that config.json was written with")
        with torch.random.fork_rng(devices=[]):
            tokenizer = KINDS[kind](**described["arguments"])
        tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
        health, lineage = (
            read_json(folder / name) if (folder / name).is_file() else {} for name in ("health.json", "lineage.json")
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError, SafetensorError) as error:
        what = str(error) if isinstance(error, BadInput) else f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"the tokenizer folder {folder} cannot be read: {what}") from error
    return TokenizerFolder(
        folder, tokenizer.eval().requires_grad_(False), _sha256(folder / "config.json"), health, lineage
    )  # fmt: skip


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
