"""A file that lists pictures as a source: CSV, JSON lines or a list; columns for the path, the label and the split."""

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.extra_columns import Keep, choose_extra, type_texts, type_values
from foreseen.data.labels import number_labels
from foreseen.data.source import Blob, FoundFile, Listing, Missing, SourceSample, Splits, digest_files
from foreseen.data.table_files import Table, read_table
from foreseen.errors import BadInput

SPLIT_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
IMAGE_NAMES = frozenset(
    {"path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "img_path"}
)
LABEL_NAMES = frozenset({"label", "labels", "class", "class_name", "category", "breed", "species", "target"})

_SPLIT_NAMES = frozenset({"split", "subset", "partition"})
_USUAL = {"image": IMAGE_NAMES, "label": LABEL_NAMES, "split": _SPLIT_NAMES}


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
        chosen: dict[str, str | None] = asdict(self)
        asked = chosen.pop(role)
        usual = [name for name in usual if name not in chosen.values()]
        key = f"--{role}-column (data.columns.{role} in a recipe)"
        if asked is not None:
            if asked not in known:
                raise BadInput(f"{where} has no column {asked!r}, it has {', '.join(known)}: change {key}")
            return asked
        if len(usual) > 1:
            raise BadInput(f"{where} has several columns that may be the {role}, {', '.join(usual)}: choose by {key}")
        return usual[0] if usual else None


class TableSource:
    """The pictures that a CSV, a file of JSON lines or a list of paths names (see `table_files.py`).

    Args:
        file: the table. Paths in it are absolute or relative to its folder.
        columns: which say what.
        labels: "none" leaves labels out; anything else takes them where there is a column.
        keep: further columns that go into KEY.json; None is all of them.
    """

    def __init__(self, file: Path, columns: Columns, labels: str = "auto", keep: Keep = ()) -> None:
        self.file, self.columns, self.labels, self.keep = file, columns, labels, keep
        self._notes: list[str] = []

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.file.name

    def digest(self) -> str:
        """Of the table's size and time, and of those of every picture that is there."""
        return digest_files([FoundFile.look(self.file), *(file for file in self._pictures if file is not None)])

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """List the rows.

        Args:
            classes: class names of the set that they join; those that occur if None.

        Raises:
            BadInput: a column is missing or ambiguous, there are no rows, or labels or splits make no sense.
        """
        numbers = None
        if (labels := self._texts("label")) is not None:
            where = f"column {self._columns['label']!r} of {self.file}"
            numbers, classes = number_labels(labels, where, classes, self._place)
        members: dict[str, list[int]] = {}
        splits = self._texts("split")
        for row, split in enumerate(splits or ["train"] * len(self._paths)):
            if not SPLIT_NAME.fullmatch(split):
                raise BadInput(
                    f"{self._place(row)} of {self.file} has the split {split!r}: a split's name is of letters, digits, "
                    "- and _"
                )
            members.setdefault(split, []).append(row)
        if all(found is not None and found.size < 0 for found in self._pictures):
            raise BadInput(f"{self.file} lists folders, such as {self._paths[0]}: give the folder itself as the source")
        extra = self._extra()
        listings = {split: _Rows(self, np.array(chosen), numbers, extra) for split, chosen in members.items()}
        return Splits(listings, splits is not None, None if numbers is None else classes, tuple(self._notes))

    def sample(self, row: int, label: int | None, meta: Mapping[str, Any]) -> SourceSample:
        """The picture of a row, or what says that it is not there."""
        name, found = self._paths[row], self._pictures[row]
        if found is not None and found.size >= 0:
            return SourceSample(name, Blob(str(self.file.parent / name), found.size), label, meta)
        place = self._place(row)
        reason = f"{place} of {self.file.name} names no file"
        if found is not None:
            reason = f"{place} of {self.file.name} names a folder: {name}"
        elif name:
            reason += f" that is there: {name}"
        return SourceSample(name or place, Missing(reason), label, meta)

    @cached_property
    def _table(self) -> Table:
        return read_table(self.file)

    def _place(self, row: int) -> str:
        return f"{self._table.unit} {self._table.rows[row]}"

    @cached_property
    def _columns(self) -> dict[str, str | None]:
        """The column of each role, if there is one; labels that are left out have none."""
        head = list(self._table.columns)
        found = {
            role: self.columns.find(role, head, _usual(head, usual), str(self.file)) for role, usual in _USUAL.items()
            if role != "label" or self.labels != "none"
        }  # fmt: skip
        label = found.get("label")
        if label is not None and self.columns.label is None and self._holds_lists(label):
            found["label"] = None
            self._notes.append(f"column {label!r} of {self.file} holds lists or objects: no labels are taken from it")
        return {"label": None, **found}

    def _holds_lists(self, column: str) -> bool:
        return any(isinstance(value, list | dict) for value in self._table.columns[column])

    def _extra(self) -> dict[str, list[Any]]:
        """Typed cells of the further columns by their names in KEY.json."""
        table = self._table
        chosen = choose_extra(list(table.columns), self._columns.values(), self.keep, str(self.file))
        type_cells = type_values if table.is_typed else type_texts
        return {name: type_cells(table.columns[column]) for column, name in chosen.items()}

    def _texts(self, role: str) -> list[str] | None:
        """The cells of a role as text, empty where there is nothing; None without a column for it."""
        if (column := self._columns[role]) is None:
            return None
        return [self._text(value, row, role) for row, value in enumerate(self._table.columns[column])]

    def _text(self, value: Any, row: int, role: str) -> str:
        if value is None or isinstance(value, str):
            return (value or "").strip()
        if isinstance(value, list | dict) or role == "image":
            what = "a path" if role == "image" else "text or a number"
            raise BadInput(
                f"{self._place(row)} of {self.file} has the {role} {json.dumps(value)[:80]}, it must be {what}: change "
                f"it, or choose another column by --{role}-column"
            )
        return json.dumps(value)

    @cached_property
    def _paths(self) -> list[str]:
        if (paths := self._texts("image")) is None:
            raise BadInput(
                f"{self.file} has no column of the pictures' paths, it has {', '.join(self._table.columns)}: choose by "
                "--image-column (data.columns.image in a recipe)"
            )
        return paths

    @cached_property
    def _pictures(self) -> list[FoundFile | None]:
        """The file of each row; of size -1 where it is a folder, None where there is nothing."""
        return [_look(self.file.parent, path) for path in self._paths]


class _Rows(Listing):
    """The samples of some rows, with the cells of all rows in further columns."""

    def __init__(
        self,
        table: TableSource,
        rows: NDArray[np.int64],
        labels: NDArray[np.int32] | None,
        extra: Mapping[str, Sequence[Any]],
    ) -> None:
        self._table, self._rows, self._labels, self._extra = table, rows, labels, extra

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> SourceSample:
        """The picture of one of the rows."""
        row = int(self._rows[index])
        label = -1 if self._labels is None else int(self._labels[row])
        meta = {name: cells[row] for name, cells in self._extra.items()}
        return self._table.sample(row, None if label < 0 else label, meta)


def _usual(head: Sequence[str], usual: frozenset[str]) -> list[str]:
    return [name for name in head if name.lower().replace(" ", "_") in usual]


def _look(folder: Path, path: str) -> FoundFile | None:
    try:
        if path and "\0" not in path:
            found = os.stat(folder / path)
            if stat.S_ISREG(found.st_mode):
                return FoundFile(path, found.st_size, found.st_mtime_ns)
            if stat.S_ISDIR(found.st_mode):
                return FoundFile(path, -1, 0)
    except (OSError, ValueError):  # nothing there, a name that no file can have, or a folder that may not be read
        pass
    return None
