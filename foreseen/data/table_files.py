"""Files that list pictures, as tables: CSV, JSON lines, and plain lists of paths.

A table is held in memory whole, as it is listed to be packed; its cells are text, or what JSON says. What they mean is
`table.py`'s business.
"""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from foreseen.data.source import IMAGE_SUFFIXES
from foreseen.errors import BadInput
from foreseen.files import bounded_lines, open_regular

_MAX_COLUMNS = 1000  # a column costs a cell a row
_UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# ImageNet's lists: a path that ends as a picture's does, blanks, a class number.
_NUMBERED = re.compile(rf"(.*(?:{'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))}))\s+([+-]?\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class Table:
    """What a file lists.

    Attributes:
        columns: cells by the name of their column, as many in each: text, or of JSON any value; None where missing.
        rows: where each row stands in the file, counted from 1.
        unit: what such a place is called, "row" or "line".
        is_typed: the cells have the types of JSON; else all are text.
    """

    columns: Mapping[str, list[Any]]
    rows: list[int]
    unit: str
    is_typed: bool = False


def read_table(file: Path) -> Table:
    """Read a file of one of the suffixes in TABLE_SUFFIXES, in UTF-8.

    Raises:
        BadInput: it cannot be read, is of another encoding, lists nothing, or a line of it makes no sense.
    """
    try:
        with os.fdopen(open_regular(file), "rb") as data:
            start = data.read(4)
        if start.startswith(_UTF_16_MARKS) or b"\0" in start:
            raise BadInput(f"{file} is not UTF-8 text, UTF-16 it seems: save it in UTF-8")
        with open(file, encoding="utf-8-sig", newline="") as text:
            return _READERS[file.suffix.lower()](file, text)
    except UnicodeDecodeError as error:
        raise BadInput(f"{file} is not UTF-8 text ({_first_bad_line(file, error)}): save it in UTF-8") from None
    except OSError as error:
        raise BadInput(f"{file} cannot be read: {error.strerror}") from None


def _read_csv(file: Path, text: IO[str]) -> Table:
    first = next(bounded_lines(text, file), "")
    text.seek(0)
    separator = max(",;\t", key=first.count)
    lines = bounded_lines(text, file)
    try:
        numbered = list(enumerate(csv.reader(lines, delimiter=separator, strict=True), 1))
    except csv.Error as error:
        raise BadInput(f"{file} cannot be read as CSV: {error}") from None
    filled = [(number, row) for number, row in numbered if any(row)]
    head = [name.strip() for name in filled[0][1]] if filled else []
    if len(filled) < 2:
        raise BadInput(f"{file} has no rows below its head: it needs one for each picture")
    if len(head) > _MAX_COLUMNS:
        raise BadInput(f"{file} has {len(head):,} columns, more than {_MAX_COLUMNS:,}: it is no table of pictures")
    if twice := [name for name in head if head.count(name) > 1]:
        raise BadInput(f"{file} has two columns {twice[0]!r}: rename one of them")
    rows = filled[1:]
    for number, cells in rows:
        if len(cells) > len(head):
            raise BadInput(f"row {number} of {file} has {len(cells)} cells and its head {len(head)}")
    columns = {
        name: [cells[at].strip() if at < len(cells) else "" for _, cells in rows] for at, name in enumerate(head)
    }
    return Table(columns, [number for number, _ in rows], "row")


def _read_json_lines(file: Path, text: IO[str]) -> Table:
    columns: dict[str, list[Any]] = {}
    lines: list[int] = []
    for number, line in enumerate(bounded_lines(text, file), 1):
        if not line.strip():
            continue
        found = _parse_object(line, f"line {number} of {file}")
        for name in found:
            if name not in columns:
                if len(columns) == _MAX_COLUMNS:
                    raise BadInput(f"{file} has more than {_MAX_COLUMNS:,} names in its objects: it is no table")
                columns[name] = [None] * len(lines)
        for name, column in columns.items():
            column.append(found.get(name))
        lines.append(number)
    if not lines:
        raise BadInput(f"{file} holds no objects: it needs one for each picture, each on a line of its own")
    return Table(columns, lines, "line", is_typed=True)


def _read_list(file: Path, text: IO[str]) -> Table:
    """Paths, and labels behind a tab or, as whole numbers, behind blanks."""
    paths, labels, lines = [], [], []
    for number, line in enumerate(bounded_lines(text, file), 1):
        if not (entry := line.strip()) or entry.startswith("#"):
            continue
        path, *more = (part.strip() for part in entry.split("\t"))
        if len(more) > 1:
            raise BadInput(
                f"line {number} of {file} has {len(more) + 1} parts between tabs: a list has a path and perhaps a "
                "label on a line; what has more columns is a .csv with a head"
            )
        if not more and (numbered := _NUMBERED.fullmatch(path)):
            path, label = numbered.groups()
            more = [label]
        paths.append(path)
        labels.append(more[0] if more else "")
        lines.append(number)
    if not lines:
        raise BadInput(f"{file} lists no pictures: it needs one path on each line")
    columns = {"path": paths, "label": labels} if any(labels) else {"path": paths}
    return Table(columns, lines, "line")


_READERS: Mapping[str, Callable[[Path, Any], Table]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".txt": _read_list,
    ".lst": _read_list,
}
TABLE_SUFFIXES = frozenset(_READERS)


def _parse_object(line: str, where: str) -> dict[str, Any]:
    """A line's object; what other writers put for numbers that there are not, NaN and Infinity, is null."""
    try:
        found = json.loads(
            line, parse_constant=lambda _: None, parse_float=_finite, object_pairs_hook=_object_without_repeats
        )
    except json.JSONDecodeError as error:
        raise BadInput(
            f"{where} is no JSON ({error.msg} at character {error.colno}): each line needs an object of its own"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where} cannot be used: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f'{where} is no JSON object: each line needs one, such as {{"path": "a.jpg"}}')
    return found


def _finite(text: str) -> float | None:
    return number if math.isfinite(number := float(text)) else None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"it has {name[:_MAX_COLUMNS]!r} twice")
    return found


def _first_bad_line(file: Path, error: UnicodeDecodeError) -> str:
    """Where the first bytes stand that are no UTF-8; the decoder saw but a part of the file."""
    with open(file, "rb") as data:
        for number, line in enumerate(data, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"line {number}"
    return error.reason
