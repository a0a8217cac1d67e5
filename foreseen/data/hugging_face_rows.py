"""The rows of a Hugging Face set as samples: encoded pictures, and what else their columns say."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.extra_columns import Keep, choose_extra, clean
from foreseen.data.source import Blob, Listing, Missing, SourceSample
from foreseen.errors import BadInput

_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
_MAGIC |= {b"II*\0": ".tif", b"MM\0*": ".tif"}


@dataclass(frozen=True, slots=True)
class RowBytes:
    """The picture of one row; a set is sent to a worker as the names of its arrow files."""

    rows: Any
    row: int
    size: int

    def read(self) -> bytes:
        """The bytes as they came into the set."""
        data: bytes = next(iter(self.rows[self.row].values()))["bytes"]
        return data


class Rows(Listing):
    """The samples of one split.

    Args:
        rows: the column of pictures alone.
        image: its name.
        split: name of the split.
        roots: folders below which a row may name a file; a relative name is sought in the first.
        labels: class number of each row, -1 where it has none; None without labels.
        extra: what else is kept of a row.
    """

    def __init__(
        self,
        rows: Any,
        image: str,
        split: str,
        roots: tuple[str, ...],
        labels: NDArray[np.int32] | None,
        extra: "ExtraColumns",
    ) -> None:
        self._rows, self._image, self._split, self._roots, self._labels = rows, image, split, roots, labels
        self._extra = extra

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> SourceSample:
        """The picture of a row, or what says why there is none."""
        number = -1 if self._labels is None else int(self._labels[index])
        label = None if number < 0 else number
        size, start, path = int(self._sizes[index]), self._starts[index], self._paths[index]
        meta = self._extra.read(index)
        if size >= 0:
            suffix = next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), ".jpg")
            stem = os.path.splitext(os.path.basename(path))[0] if path else "row"
            name = f"{self._split}/{index:09d}-{stem}{suffix}"
            return SourceSample(name, RowBytes(self._rows, index, size), label, meta)
        reason = f"row {index} of the split {self._split!r} has no picture"
        if path:
            if (file := _below(self._roots, path)) is None:
                reason += f", and {path} lies outside the set"
            elif os.path.isfile(file):
                name = "/".join(Path(file).parts[-2:])
                return SourceSample(f"{self._split}/{name}", Blob(file, os.path.getsize(file)), label, meta)
            else:
                reason += f": no file {path}"
        return SourceSample(f"{self._split}/{index:09d}", Missing(reason), label, meta)

    @cached_property
    def _column(self) -> Any:
        return self._rows.data.column(self._image)

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """Bytes of each picture; -1 where the row holds but a path, or nothing."""
        import pyarrow.compute as pc

        lengths = pc.fill_null(pc.cast(pc.binary_length(pc.struct_field(self._column, "bytes")), "int64"), -1)
        return np.asarray(lengths.to_numpy())

    @cached_property
    def _starts(self) -> list[bytes]:
        import pyarrow.compute as pc

        starts = pc.binary_slice(pc.struct_field(self._column, "bytes"), 0, 4)
        return [start or b"" for start in starts.to_pylist()]

    @cached_property
    def _paths(self) -> list[str | None]:
        import pyarrow.compute as pc

        paths: list[str | None] = pc.struct_field(self._column, "path").to_pylist()
        return paths


class ExtraColumns:
    """Further columns of one split, by their names in KEY.json; where a split lacks one of them, it is None.

    Args:
        rows: the split.
        names: names in KEY.json by column.
    """

    def __init__(self, rows: Any, names: Mapping[str, str]) -> None:
        there = [column for column in names if column in rows.column_names]
        self._names = names
        self._table = rows.data.table.select(there) if there else None
        self._classes = {column: getattr(rows.features[column], "names", None) for column in there}

    def read(self, row: int) -> dict[str, Any]:
        """What they say of a row: classes by name, times in ISO 8601, numbers that there are not (NaN) as None."""
        if self._table is None:
            return dict.fromkeys(self._names.values())
        cells = self._table.slice(row, 1).to_pylist()[0]
        return {name: self._clean(column, cells.get(column)) for column, name in self._names.items()}

    def _clean(self, column: str, value: Any) -> Any:
        if (classes := self._classes.get(column)) is not None:
            return classes[value] if value is not None and 0 <= value < len(classes) else None
        return clean(value)


def find_extra(
    sets: Mapping[str, Any], used: Collection[str | None], keep: Keep, where: str
) -> tuple[dict[str, str], list[str]]:
    """The further columns of all splits, by their names in KEY.json, and those that cannot be written there.

    Raises:
        BadInput: one that is asked for is not there, or holds bytes.
    """
    known = list(dict.fromkeys(name for rows in sets.values() for name in rows.column_names))
    with_bytes = {
        name
        for rows in sets.values()
        for name in rows.column_names
        if _holds_bytes(rows.data.table.schema.field(name).type, rows.features[name])
    }
    if keep is None:
        left_out = [name for name in known if name in with_bytes and name not in used]
        return choose_extra([name for name in known if name not in with_bytes], used, None, where), left_out
    if wrong := [name for name in keep if name in with_bytes]:
        raise BadInput(f"column {wrong[0]!r} of {where} holds bytes or pictures: KEY.json cannot (--keep-columns)")
    return choose_extra(known, used, keep, where), []


def _holds_bytes(kind: Any, feature: Any) -> bool:
    """Whether bytes stand somewhere in a column's type, or it is one of media, which are files."""
    import pyarrow.types as types

    if type(feature).__name__ in ("Image", "Audio", "Video", "Pdf", "Nifti"):
        return True
    are_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    if any(test(kind) for test in are_bytes):
        return True
    inner = [kind.field(number).type for number in range(kind.num_fields)]
    return any(_holds_bytes(part, None) for part in inner)


def select_pictures(rows: Any, column: str, where: str) -> Any:
    """The column of pictures alone, as encoded bytes or paths."""
    import datasets
    import pyarrow as pa

    if column not in rows.column_names:
        raise BadInput(f"{where} has no column {column!r}, it has {', '.join(rows.column_names)}")
    try:
        return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError):
        raise BadInput(
            f"column {column!r} of {where} holds no pictures: choose another by --image-column (data.columns.image in "
            "a recipe)"
        ) from None


def _below(roots: Sequence[str], path: str) -> str | None:
    """A path, without its `..`, if it lies below one of the folders; links in those are their owner's business."""
    file = os.path.normpath(os.path.join(roots[0], path))
    return file if any(file.startswith(os.path.join(root, "")) for root in roots) else None
