"""A CSV as a source: a row is a picture, with columns for its path, its label and its split."""

import csv
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from foreseen.data.labels import number_labels
from foreseen.data.source import Blob, FoundFile, Missing, SourceSample, Splits, digest_files
from foreseen.errors import BadInput
from foreseen.files import bounded_lines

TABLE_SUFFIXES = frozenset({".csv", ".tsv"})
SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")

_IMAGE_NAMES = frozenset(
    {"path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path"}
)
_LABEL_NAMES = frozenset({"label", "labels", "class", "class_name", "category", "breed", "species", "target"})
_SPLIT_NAMES = frozenset({"split", "subset", "partition"})


@dataclass(frozen=True)
class Columns:
    """Which columns of a table say what; None finds the one with a usual name.

    Attributes:
        image: the picture, or its path.
        label: its class, by name or number.
        split: the split that it belongs to.
    """

    image: str | None = None
    label: str | None = None
    split: str | None = None

    def find(self, role: str, known: Sequence[str], usual: Sequence[str], where: str) -> str | None:
        """The column for a role.

        Args:
            role: "image", "label" or "split".
            known: columns of the table.
            usual: those of them that would do.
            where: the table, for messages.

        Raises:
            BadInput: the one asked for is not there, or several would do.
        """
        asked: str | None = asdict(self)[role]
        key = f"--{role}-column (data.columns.{role} in a recipe)"
        if asked is not None:
            if asked not in known:
                raise BadInput(f"{where} has no column {asked!r}, it has {', '.join(known)}: change {key}")
            return asked
        if len(usual) > 1:
            raise BadInput(f"{where} has several columns that may be the {role}, {', '.join(usual)}: choose by {key}")
        return usual[0] if usual else None


class TableSource:
    """The pictures that a CSV lists, with a head row; separated by commas, semicolons or tabs, in UTF-8.

    Args:
        file: the table. Paths in it are absolute or relative to its folder.
        columns: which say what.
        labels: "none" leaves labels out; anything else takes them where there is a column.
    """

    def __init__(self, file: Path, columns: Columns, labels: str = "auto") -> None:
        self.file, self.columns, self.labels = file, columns, labels

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.file.name

    def digest(self) -> str:
        """Of the table's size and time, and of those of every picture that is there."""
        return digest_files([FoundFile.look(self.file), *self._pictures])

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """List the rows.

        Args:
            classes: class names of the set that they join; those that occur if None.

        Raises:
            BadInput: a column is missing or ambiguous, there are no rows, or labels or splits make no sense.
        """
        head, paths = self._table[0], self._paths
        where = str(self.file)
        splits = self._values("split", _SPLIT_NAMES)
        labels = None if self.labels == "none" else self._values("label", _LABEL_NAMES)
        numbers = None
        if labels is not None:
            column = self.columns.find("label", head, _usual(head, _LABEL_NAMES), where)
            numbers, classes = number_labels(labels, f"column {column!r} of {where}", classes)
        members: dict[str, list[int]] = {}
        for row, split in enumerate(splits or ["train"] * len(paths)):
            if not SPLIT_NAME.fullmatch(split):
                raise BadInput(
                    f"row {row + 2} of {where} has the split {split!r}: a split's name is of letters, digits, - and _"
                )
            members.setdefault(split, []).append(row)
        listings = {split: _Rows(self, np.array(chosen), numbers) for split, chosen in members.items()}
        return Splits(listings, splits is not None, None if numbers is None else classes)

    def sample(self, row: int, label: int | None) -> SourceSample:
        """The picture of a row, or what says that it is not there."""
        name, found = self._paths[row], self._pictures[row]
        if found.size < 0:
            reason = f"row {row + 2} of {self.file.name} names no file" + (f" that is there: {name}" if name else "")
            return SourceSample(name or f"row {row + 2}", Missing(reason), label)
        return SourceSample(name, Blob(str(self.file.parent / name), found.size), label)

    @cached_property
    def _table(self) -> tuple[list[str], list[list[str]]]:
        try:
            with open(self.file, encoding="utf-8-sig", newline="") as text:
                first = next(bounded_lines(text, self.file), "")
                text.seek(0)
                separator = max(",;\t", key=first.count)
                lines = bounded_lines(text, self.file)
                rows = [row for row in csv.reader(lines, delimiter=separator, strict=True) if any(row)]
        except UnicodeDecodeError:
            raise BadInput(f"{self.file} is not UTF-8 text: save it as CSV in UTF-8") from None
        except (csv.Error, OSError) as error:
            raise BadInput(f"{self.file} cannot be read as CSV: {error}") from None
        head = [name.strip() for name in rows[0]] if rows else []
        if len(rows) < 2:
            raise BadInput(f"{self.file} has no rows below its head: it needs one for each picture")
        if twice := [name for name in head if head.count(name) > 1]:
            raise BadInput(f"{self.file} has two columns {twice[0]!r}: rename one of them")
        for row, cells in enumerate(rows[1:]):
            if len(cells) > len(head):
                raise BadInput(f"row {row + 2} of {self.file} has {len(cells)} cells and its head {len(head)}")
        return head, rows[1:]

    def _values(self, role: str, usual: frozenset[str]) -> list[str] | None:
        head, rows = self._table
        column = self.columns.find(role, head, _usual(head, usual), str(self.file))
        if column is None:
            return None
        at = head.index(column)
        return [cells[at].strip() if at < len(cells) else "" for cells in rows]

    @cached_property
    def _paths(self) -> list[str]:
        if (paths := self._values("image", _IMAGE_NAMES)) is None:
            raise BadInput(
                f"{self.file} has no column of the pictures' paths, it has {', '.join(self._table[0])}: choose by "
                "--image-column (data.columns.image in a recipe)"
            )
        return paths

    @cached_property
    def _pictures(self) -> list[FoundFile]:
        """The file of each row; of size -1 where there is none."""
        return [_look(self.file.parent, path) for path in self._paths]


class _Rows(Sequence[SourceSample]):
    """The samples of some rows, made when they are asked for."""

    def __init__(self, table: TableSource, rows: NDArray[np.int64], labels: NDArray[np.int32] | None) -> None:
        self._table, self._rows, self._labels = table, rows, labels

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> SourceSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SourceSample]: ...
    def __getitem__(self, index: int | slice) -> SourceSample | Sequence[SourceSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        label = -1 if self._labels is None else int(self._labels[row])
        return self._table.sample(row, None if label < 0 else label)


def _usual(head: Sequence[str], usual: frozenset[str]) -> list[str]:
    return [name for name in head if name.lower().replace(" ", "_") in usual]


def _look(folder: Path, path: str) -> FoundFile:
    try:
        if path and "\0" not in path and os.path.isfile(file := folder / path):
            found = os.stat(file)
            return FoundFile(path, found.st_size, found.st_mtime_ns)
    except OSError:  # a name that no file can have, or a folder that may not be read
        pass
    return FoundFile(path, -1, 0)
