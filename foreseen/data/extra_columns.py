"""Columns of a source that are no picture, label or split: which go into KEY.json, under what name, of what type."""

import datetime
import json
import math
import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

from foreseen.errors import BadInput

RESERVED = ("path", "width", "height", "label")  # what `pack` says of every picture

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,18})")  # 007 is a name
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
_INT64 = range(-(1 << 63), 1 << 63)

Keep = tuple[str, ...] | None


def parse_keep(text: str) -> Keep:
    """What `--keep-columns` says: "all" (None), "none", or names between commas."""
    if text in ("all", "none"):
        return None if text == "all" else ()
    return tuple(dict.fromkeys(name for part in text.split(",") if (name := part.strip())))


def choose_extra(known: Sequence[str], used: Collection[str | None], keep: Keep, where: str) -> dict[str, str]:
    """The columns to keep, and their names in KEY.json.

    A column that is called as one of the facts that `pack` writes is kept as `source_path`, `source_width` and so on.

    Args:
        known: all columns; those without a name are never kept.
        used: columns that say what the picture, its label or its split is.
        keep: names to keep, which may be of used ones; None keeps all that are not used.
        where: the source, for messages.

    Raises:
        BadInput: a column that is asked for is not there, or two would have the same name.
    """
    if keep is None:
        keep = tuple(name for name in known if name and name not in used)
    names: dict[str, str] = {}
    for column in keep:
        if column not in known:
            near = get_close_matches(column, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
            raise BadInput(f"{where} has no column {column!r} to keep; {hint} (--keep-columns)")
        name = f"source_{column}" if column in RESERVED else column
        if name in names.values():
            raise BadInput(f"{where} has two columns that would be kept as {name!r}: leave one out by --keep-columns")
        names[column] = name
    return names


def type_texts(texts: Sequence[str]) -> list[Any]:
    """Cells of one column of a CSV: whole numbers or numbers where all of them are, else text; None where empty.

    Whole numbers of more than 64 bits, and those that begin with zeros, stay text.
    """
    written = [text for text in texts if text]
    if all(_WHOLE.fullmatch(text) and int(text) in _INT64 for text in written):
        return [int(text) if text else None for text in texts]
    if all(_NUMBER.fullmatch(text) and _is_float(text) for text in written):
        return [float(text) if text else None for text in texts]
    return [text or None for text in texts]


def type_values(values: Sequence[Any]) -> list[Any]:
    """Values of one name of JSON lines: numbers become of one type, other mixed scalars text; the rest stays as it is.

    Readers such as `datasets` give a column one type. Whole numbers of more than 64 bits become text, too.
    """
    kinds = {type(value) for value in values if value is not None}
    if not kinds <= {str, bool, int, float}:
        return list(values)
    if int in kinds and any(isinstance(value, int) and value not in _INT64 for value in values):
        kinds.add(str)
    if kinds == {int, float}:
        return [None if value is None else float(value) for value in values]
    if len(kinds) > 1:
        return [value if value is None or isinstance(value, str) else json.dumps(value) for value in values]
    return list(values)


def clean(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [clean(part) for part in value]
    if isinstance(value, dict):
        return {str(name): clean(part) for name, part in value.items()}
    if value is None or isinstance(value, str | int):
        return value
    return value.isoformat() if isinstance(value, datetime.date | datetime.time) else str(value)


def _is_float(text: str) -> bool:
    """Whether a float holds this number: no infinity, and no whole number that it would round."""
    is_whole = text.lstrip("-").isdigit()
    return math.isfinite(float(text)) and not (is_whole and abs(int(text)) > 1 << 53)
