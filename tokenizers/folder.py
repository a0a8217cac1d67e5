"""The tokenizer folder: what training a tokenizer ends in, and what BEiT reads.

config.json         kind, the arguments that make it, and the checksum of its weights
model.safetensors   its weights, in float32
health.json         how its codebook is used on its pictures, where that was measured
health.png          some of them: original, reconstruction if it makes any, code map
lineage.json        where the weights are from

The checksum of config.json names the tokenizer: it covers the weights, whose own checksum is in it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from foreseen.errors import BadInput
from foreseen.files import read_json, sha256_of
from foreseen.handoff.publish import float32_state, published
from foreseen.tokenizers.build import build_for, shapes_in
from foreseen.tokenizers.kinds import KINDS
from foreseen.tokenizers.tokenizer import Tokenizer

# What arguments and weights that fit nothing lead to, in the kinds, in timm and in torch.
_DAMAGE = (
    KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError, AssertionError,
    MemoryError, OSError, SafetensorError,
)  # fmt: skip


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
    with published(folder, "tokenizer folder") as new:
        _write(tokenizer, new, lineage, health, pictures)
        load_tokenizer(new)


def _write(
    tokenizer: Tokenizer,
    folder: Path,
    lineage: Mapping[str, Any],
    health: Mapping[str, Any] | None,
    pictures: Image.Image | None,
) -> None:
    save_file(float32_state(tokenizer), folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "format": 1,
        "kind": tokenizer.kind,
        "codebook_size": tokenizer.codebook_size,
        "arguments": tokenizer.arguments(),
        "weights_sha256": sha256_of(folder / "model.safetensors"),
    }
    (folder / "config.json").write_text(json.dumps(described, indent=2) + "\n")
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=2) + "\n")
    if health is not None:
        (folder / "health.json").write_text(json.dumps(health, indent=2) + "\n")
    if pictures is not None:
        pictures.save(folder / "health.png")


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
        if sha256_of(folder / "model.safetensors") != described["weights_sha256"]:
            raise BadInput("model.safetensors is not the one that config.json was written with")
        tokenizer = build_for(shapes_in(folder / "model.safetensors"), KINDS[kind], described["arguments"])
        tokenizer.load_state_dict(load_file(folder / "model.safetensors"))
        health, lineage = (
            read_json(folder / name) if (folder / name).is_file() else {} for name in ("health.json", "lineage.json")
        )
        if not isinstance(health, dict) or not isinstance(lineage, dict):
            raise BadInput("health.json or lineage.json holds no object")
    except _DAMAGE as error:
        what = str(error) if isinstance(error, BadInput) else " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"the tokenizer folder {folder} cannot be read: {what[:500]}") from error
    return TokenizerFolder(
        folder, tokenizer.eval().requires_grad_(False), sha256_of(folder / "config.json"), health, lineage
    )  # fmt: skip
