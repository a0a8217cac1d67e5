"""`manifest.json`: what a packed set holds, and the only thing that makes a split exist.

A set is a folder. Each split has shards `train-000000.tar`…, one index `train.index.npy` and, where there are labels,
`train.labels.npy`. The manifest names them all and is replaced last, by rename, so that a folder is never half a set.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from foreseen import __version__
from foreseen.errors import BadInput
from foreseen.files import MAX_JSON_BYTES, parse_json, read_text, write_atomically

FORMAT, VERSION = "foreseen-shards", 1
FILE_NAME = "manifest.json"
WORK_PREFIX = ".packing-"

_KINDS = {str: "text", dict: "an object"}
_NOT_IN_NAMES = re.compile("[/\\\\\0\ud800-\udfff]")  # what leads elsewhere, and what no file's name can hold


class Shard(NamedTuple):
    """One tar: its file name, the samples in it and its size on disk."""

    name: str
    samples: int
    bytes: int


@dataclass(frozen=True)
class Split:
    """One split of a set.

    Attributes:
        samples: samples in all shards.
        shards: in the order of the samples.
        image: file name extension of the image member, without the dot.
        index, index_digest: file with one row a sample, and the blake2b of its rows.
        labels: file with one class number a sample, or None.
        mean, std: of each RGB channel in [0, 1], every picture weighing the same.
        source, licence: where the pictures came from, and under which terms.
        plan: the options that the split was packed with, and a digest of what was listed; `indexed` and how the index
            was made for tars that others made.
        labels_digest: the blake2b of the labels; None without any, and of a set that an older version packed.
        first_digest: `index_digest` as it was before missing checksums were filled in, which changed no picture; the
            fingerprint goes on with it. None where they never were.
    """

    samples: int
    shards: tuple[Shard, ...]
    image: str
    index: str
    index_digest: str
    labels: str | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    source: str | None
    licence: str | None
    plan: Mapping[str, Any] | None
    first_digest: str | None = None
    labels_digest: str | None = None

    @property
    def is_indexed(self) -> bool:
        """Whether others made the tars, so that nothing is known of them but what was looked up."""
        return self.plan is not None and "indexed" in self.plan


@dataclass(frozen=True)
class Manifest:
    """All splits of a set and the class names that their labels count."""

    splits: Mapping[str, Split]
    classes: tuple[str, ...] | None = None


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a packed set.

    Raises:
        BadInput: the folder is missing, empty, not a packed set, half packed, or its manifest makes no sense.
    """
    file = folder / FILE_NAME
    try:
        text = read_text(file, max_bytes=MAX_JSON_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(_why_no_manifest(folder)) from None
    except UnicodeDecodeError:
        raise BadInput(f"{file} is not text: pack the set again") from None
    try:
        found = parse_json(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format is {found['format']!r}, not {FORMAT!r}")
        if found["version"] != VERSION:
            raise ValueError(f"version is {found['version']!r}, and this foreseen reads {VERSION}")
        classes = None if found["classes"] is None else tuple(str(name) for name in found["classes"])
        return Manifest({str(name): _parse_split(split) for name, split in found["splits"].items()}, classes)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"{file} cannot be used: {reason}") from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest atomically: a reader finds the old one or the new one, and neither is torn by a crash."""
    splits = {name: asdict(split) | {"shards": []} for name, split in sorted(manifest.splits.items())}
    head = {"format": FORMAT, "version": VERSION, "created_by": f"foreseen {__version__}", "classes": manifest.classes}
    text = json.dumps(head | {"splits": splits}, indent=1)
    for split in (manifest.splits[name] for name in splits):  # one line a shard: there may be 100,000 of them
        lines = ",\n".join(f"    {json.dumps(shard._asdict())}" for shard in split.shards)
        text = text.replace('"shards": []', f'"shards": [\n{lines}\n   ]', 1)
    write_atomically(folder / FILE_NAME, text.encode() + b"\n")


def _parse_split(found: dict[str, Any]) -> Split:
    shards = tuple(Shard(shard["name"], shard["samples"], shard["bytes"]) for shard in found["shards"])
    if not all(_is_count(shard.samples) and _is_count(shard.bytes) for shard in shards):
        raise ValueError("a shard's samples and bytes must be whole numbers below 2^63, none of them negative")
    if (total := sum(shard.samples for shard in shards)) != found["samples"]:
        raise ValueError(f"samples is {found['samples']}, but its shards hold {total}")
    names = [shard.name for shard in shards] + [found["index"]] + ([] if found["labels"] is None else [found["labels"]])
    for name in names:
        if not isinstance(name, str) or not name or _NOT_IN_NAMES.search(name) or name.startswith("."):
            raise ValueError(f"{name!r} is not the name of a file beside it")
    for key, kind in (("source", str), ("licence", str), ("first_digest", str), ("plan", dict)):
        if not isinstance(found.get(key), kind | None):
            raise ValueError(f"{key} is {json.dumps(found[key])[:80]}, it must be {_KINDS[kind]} or null")
    plan = found["plan"] or {}
    if not isinstance(plan.get("indexed"), dict | None):
        raise ValueError(f"plan.indexed is {json.dumps(plan['indexed'])[:80]}, it must be an object or null")
    return Split(
        samples=total,
        shards=shards,
        image=str(found["image"]),
        index=found["index"],
        index_digest=str(found["index_digest"]),
        labels=found["labels"],
        mean=_parse_statistic(found["mean"]),
        std=_parse_statistic(found["std"]),
        source=found["source"],
        licence=found["licence"],
        plan=found["plan"],
        first_digest=found.get("first_digest"),
        labels_digest=found.get("labels_digest"),
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _parse_statistic(found: list[float] | None) -> tuple[float, ...] | None:
    return None if found is None else tuple(float(value) for value in found)


def _why_no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} does not exist: give the folder that `foreseen data pack` wrote"
    if not folder.is_dir():
        return f"{folder} is a file, not a folder: give the folder that `foreseen data pack` wrote"
    names = os.listdir(folder)
    if not names:
        return f"{folder} is empty: pack pictures into it with `foreseen data pack SRC {folder}`"
    if any(name.startswith(WORK_PREFIX) for name in names):
        return f"packing into {folder} has not finished: run the same `foreseen data` command again, it goes on"
    return f"{folder} has no {FILE_NAME}, so it is not a packed set: pack it with `foreseen data pack {folder} OUT`"
