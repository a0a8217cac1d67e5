"""Features on disk, written as they come: Parquet, or an .npy with its ids and its layout beside it.

Letters: N pictures, T vectors a picture, D features, h and w patches.
"""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from foreseen.commands.outputs import complete_file, complete_path
from foreseen.errors import BadInput

SUFFIXES = (".parquet", ".npy")
_ROW_GROUP_BYTES = 32 << 20


class Id(NamedTuple):
    """Which picture a row is of; the label is None where it has none."""

    path: str
    key: str
    label: str | None


@dataclass(frozen=True)
class Layout:
    """What a row holds.

    Attributes:
        shapes: of each kind of features, in order: (D,), or (h, w, D) for patches, row by row from the top left.
        dtype: float32 or float16.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: np.dtype[Any]


class Writer(Protocol):
    """What rows are given to."""

    def add(self, ids: Sequence[Id], features: Mapping[str, NDArray[Any]]) -> None:
        """Write the rows of a batch; features [B, ...] by kind."""

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write what is said of the whole; plain values."""


@contextmanager
def embedding_file(out: Path, layout: Layout) -> Iterator[Writer]:
    """What writes to `out`, by its suffix; the files get their names at the end, all of them or none.

    Raises:
        BadInput: they cannot be written.
    """
    if out.suffix == ".parquet":
        with complete_path(out) as part:
            parquet = _Parquet(part, layout)
            try:
                yield parquet
            finally:
                parquet.close()
        return
    with (
        complete_file(out.with_suffix(".json")) as described,
        complete_file(out.with_suffix(".ids.csv")) as ids,
        complete_path(out) as part,
        open(part, "wb+") as array,
    ):
        yield _Npy(out, array, ids, described, layout)


def in_dtype(features: Mapping[str, NDArray[Any]], dtype: np.dtype[Any]) -> dict[str, NDArray[Any]]:
    """The features as they are stored.

    Raises:
        BadInput: some are too large for float16.
    """
    with np.errstate(over="ignore"):
        stored = {name: values.astype(dtype) for name, values in features.items()}
    for name, values in stored.items():
        if not np.isfinite(values).all() and np.isfinite(features[name]).all():
            largest = np.abs(features[name]).max()
            raise BadInput(f"{name} features reach {largest:.3g}, and float16 holds 65,504: take --dtype float32")
    return stored


class _Npy:
    """[N, D] of one vector a picture, else [N, T, D]: vectors in the order of the kinds, patches row by row."""

    def __init__(
        self, out: Path, array: IO[bytes], ids: IO[str], described: IO[str], layout: Layout
    ) -> None:  # fmt: skip
        self._out, self._array, self._described, self._layout = out, array, described, layout
        self._vectors = {name: int(np.prod(shape[:-1])) for name, shape in layout.shapes.items()}
        self._rows = 0
        self._ids = csv.writer(ids, lineterminator="\n")
        self._ids.writerow(["row", *Id._fields])
        self._write_head()

    @property
    def _shape(self) -> tuple[int, ...]:
        vectors = sum(self._vectors.values())
        size = next(iter(self._layout.shapes.values()))[-1]
        return (self._rows, size) if vectors == 1 else (self._rows, vectors, size)

    def _write_head(self) -> None:
        # numpy leaves room in the head for the first axis to grow, so one with more rows is as long.
        described = {"descr": self._layout.dtype.newbyteorder("<").str, "fortran_order": False, "shape": self._shape}
        self._array.seek(0)
        np.lib.format.write_array_header_1_0(self._array, described)

    def add(self, ids: Sequence[Id], features: Mapping[str, NDArray[Any]]) -> None:
        stored = in_dtype(features, self._layout.dtype)
        parts = [stored[name].reshape(len(ids), count, -1) for name, count in self._vectors.items()]
        self._array.write(np.ascontiguousarray(np.concatenate(parts, axis=1)).tobytes())
        self._ids.writerows([self._rows + row, *found] for row, found in enumerate(ids))
        self._rows += len(ids)

    def finish(self, facts: Mapping[str, Any]) -> None:
        self._write_head()
        shape = self._shape
        described: dict[str, Any] = {
            "file": self._out.name, "ids": self._out.with_suffix(".ids.csv").name, "dtype": self._layout.dtype.name,
            "shape": list(shape), "axes": ["sample", "feature"] if len(shape) == 2 else ["sample", "vector", "feature"],
        }  # fmt: skip
        start, vectors = 0, {}
        for name, count in self._vectors.items():
            vectors[name] = {"from": start, "to": start + count}
            if len(self._layout.shapes[name]) == 3:
                vectors[name]["grid"] = list(self._layout.shapes[name][:2])  # type: ignore[assignment]
            start += count
        json.dump(described | {"vectors": vectors} | dict(facts), self._described, indent=2)


class _Parquet:
    """Columns path, key and label, and one of fixed-size lists for each kind; patches lie flat, [h, w, D]."""

    def __init__(self, part: Path, layout: Layout) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._layout = layout
        value = pa.from_numpy_dtype(layout.dtype)
        self._types = {name: pa.list_(value, int(np.prod(shape))) for name, shape in layout.shapes.items()}
        texts = [pa.field(name, pa.string()) for name in Id._fields]
        schema = pa.schema([*texts, *(pa.field(name, kind) for name, kind in self._types.items())])
        self._schema, self._writer = schema, pq.ParquetWriter(part, schema)
        self._pending: list[Any] = []
        self._pending_bytes = 0

    def add(self, ids: Sequence[Id], features: Mapping[str, NDArray[Any]]) -> None:
        import pyarrow as pa

        columns = [pa.array(list(column), pa.string()) for column in zip(*ids, strict=True)]
        for name, values in in_dtype(features, self._layout.dtype).items():
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=self._types[name]))
            self._pending_bytes += values.nbytes
        self._pending.append(pa.table(columns, schema=self._schema))
        if self._pending_bytes >= _ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            joined = pa.concat_tables(self._pending)
            self._writer.write_table(joined, row_group_size=joined.num_rows)
        self._pending, self._pending_bytes = [], 0

    def finish(self, facts: Mapping[str, Any]) -> None:
        self._flush()
        columns = {name: {"shape": list(shape)} for name, shape in self._layout.shapes.items()}
        text = json.dumps({"columns": columns, "dtype": self._layout.dtype.name, **facts})
        self._writer.add_key_value_metadata({"foreseen": text})

    def close(self) -> None:
        self._writer.close()
