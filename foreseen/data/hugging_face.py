"""A Hugging Face set as a source: from the hub by its name, or local parquet, arrow, imagefolder or `save_to_disk`.

The library `datasets` finds splits and features; pictures are never decoded by it, so their bytes are packed as they
came. A local set is given to the reader of its own format, and a row that names a file is believed only below the set's
own folder, or where `datasets` keeps what it downloads.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from foreseen.data.labels import number_labels
from foreseen.data.source import Blob, FoundFile, Missing, SourceSample, Splits, digest_files, walk
from foreseen.data.table import Columns
from foreseen.errors import BadInput

PREFIX = "hf:"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # a bare name may be a reader of `datasets`, such as that of pickles
_LABEL_NAMES = frozenset({"label", "labels", "class", "category", "breed", "species", "target"})
_MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}
_MAGIC |= {b"II*\0": ".tif", b"MM\0*": ".tif"}


class HuggingFaceSource:
    """A set that `datasets` reads.

    Args:
        place: a file or folder; what is neither is a name on the hub, which may download.
        columns: which say what; `split` is not looked at, since the set has its own.
        config: the configuration of a hub set that has several.
        labels: "none" leaves labels out; anything else takes them where there is a column.
    """

    def __init__(self, place: str, columns: Columns, config: str | None = None, labels: str = "auto") -> None:
        self.place, self.columns, self.config, self.labels = place, columns, config, labels
        self.path = Path(place).expanduser()
        self.is_local = os.path.exists(self.path)
        if not self.is_local and not _HUB_NAME.fullmatch(place):
            raise BadInput(f"{PREFIX}{place} does not exist, and is no name on the hub, such as user/set")

    @property
    def name(self) -> str:
        """`hf:` and the name on the hub, or of the file or folder."""
        return PREFIX + (self.path.resolve().name if self.is_local else self.place)

    def digest(self) -> str:
        """Of names, sizes and times of a local set's files; a name on the hub is taken as it was first seen."""
        if not self.is_local:
            return "hub"
        return digest_files(walk(self.path) if self.path.is_dir() else [FoundFile.look(self.path)])

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """Load the set and list its rows.

        Args:
            classes: class names of the set that they join; the set's own if None.

        Raises:
            BadInput: it cannot be loaded, a column is missing or ambiguous, or a class is not among `classes`.
        """
        sets = self._load()
        first = sets.get("train", next(iter(sets.values())))
        image = self._image_column(first)
        label = None if self.labels == "none" else self._label_column(first)
        numbers: dict[str, NDArray[np.int32]] = {}
        notes = []
        if label is not None:
            labelled = {name: rows for name, rows in sets.items() if label in rows.column_names}
            numbers, classes = _labels(labelled, label, f"column {label!r} of {PREFIX}{self.place}", classes)
            lacking = [name for name in sets if name not in labelled]
            notes = [f"split {name!r} of {PREFIX}{self.place} has no column {label!r}: no labels" for name in lacking]
        roots = self._roots()
        listings = {}
        for name, rows in sets.items():
            where = f"split {name!r} of {PREFIX}{self.place}"
            listings[name] = _Rows(_pictures(rows, image, where), image, name, roots, numbers.get(name))
        return Splits(listings, True, classes if numbers else None, tuple(notes), first.info.license or None)

    def _roots(self) -> tuple[str, ...]:
        """Folders below which a row may name a file; a relative name is sought in the first."""
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE

        if self.is_local:
            folder = self.path if self.path.is_dir() else self.path.parent
            return os.path.abspath(folder), os.path.realpath(folder)
        config = datasets.config
        caches = (HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
        return tuple(os.path.abspath(cache) for cache in (*caches, config.EXTRACTED_DATASETS_PATH))

    def _load(self) -> dict[str, Any]:
        import datasets

        if self.is_local:
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # a local set is nobody else's business
            datasets.disable_progress_bars()
        try:
            if not self.is_local:
                found = datasets.load_dataset(self.place, self.config)
            elif (self.path / "dataset_dict.json").is_file() or (self.path / "state.json").is_file():
                found = datasets.load_from_disk(str(self.path))
            elif self.path.is_dir():
                found = datasets.load_dataset(_kind(self.path), data_dir=str(self.path))
            else:
                found = datasets.load_dataset(_kind(self.path), data_files=str(self.path))
        except BadInput:
            raise
        except Exception as error:  # a library's own and those of arrow, parquet and the network behind it
            what = str(error).strip().splitlines() or [type(error).__name__]
            raise BadInput(f"{PREFIX}{self.place} cannot be loaded: {what[0]}") from error
        sets = dict(found) if isinstance(found, dict) else {"train": found}
        return {str(name): rows for name, rows in sets.items() if len(rows)} or _refuse_empty(self.place)

    def _image_column(self, rows: Any) -> str:
        import datasets

        usual = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        usual = usual or [
            name
            for name, feature in rows.features.items()
            if isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        ]
        column = self.columns.find("image", rows.column_names, usual, PREFIX + self.place)
        if column is None:
            raise BadInput(
                f"{PREFIX}{self.place} has no column of pictures, it has {', '.join(rows.column_names)}: choose by "
                "--image-column (data.columns.image in a recipe)"
            )
        return column

    def _label_column(self, rows: Any) -> str | None:
        import datasets

        usual = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
        usual = usual or [name for name in rows.column_names if name.lower() in _LABEL_NAMES]
        return self.columns.find("label", rows.column_names, usual, PREFIX + self.place)


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


class _Rows(Sequence[SourceSample]):
    """The samples of one split, made when they are asked for."""

    def __init__(
        self, rows: Any, image: str, split: str, roots: tuple[str, ...], labels: NDArray[np.int32] | None
    ) -> None:
        self._rows, self._image, self._split, self._roots, self._labels = rows, image, split, roots, labels

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> SourceSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SourceSample]: ...
    def __getitem__(self, index: int | slice) -> SourceSample | Sequence[SourceSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = -1 if self._labels is None else int(self._labels[index])
        label = None if number < 0 else number
        size, start, path = int(self._sizes[index]), self._starts[index], self._paths[index]
        if size >= 0:
            suffix = next((suffix for magic, suffix in _MAGIC.items() if start.startswith(magic)), ".jpg")
            stem = os.path.splitext(os.path.basename(path))[0] if path else "row"
            return SourceSample(f"{self._split}/{index:09d}-{stem}{suffix}", RowBytes(self._rows, index, size), label)
        reason = f"row {index} of the split {self._split!r} has no picture"
        if path:
            if (file := _below(self._roots, path)) is None:
                reason += f", and {path} lies outside the set"
            elif os.path.isfile(file):
                name = "/".join(Path(file).parts[-2:])
                return SourceSample(f"{self._split}/{name}", Blob(file, os.path.getsize(file)), label)
            else:
                reason += f": no file {path}"
        return SourceSample(f"{self._split}/{index:09d}", Missing(reason), label)

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


def _pictures(rows: Any, column: str, where: str) -> Any:
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


def _labels(
    sets: dict[str, Any], column: str, where: str, classes: tuple[str, ...] | None
) -> tuple[dict[str, NDArray[np.int32]], tuple[str, ...]]:
    """Class number of each row of each split, and the names of the classes."""
    import datasets

    values = {name: rows.data.column(column).to_pylist() for name, rows in sets.items()}
    features = [rows.features[column] for rows in sets.values()]
    if all(isinstance(feature, datasets.ClassLabel) for feature in features):
        known = classes or tuple(dict.fromkeys(name for feature in features for name in feature.names))
        numbers = [
            _renumber(found, feature.names, known, where)
            for found, feature in zip(values.values(), features, strict=True)
        ]
        return dict(zip(values, numbers, strict=True)), known
    texts = [_text(value, feature) for found, feature in zip(values.values(), features, strict=True) for value in found]
    every, classes = number_labels(texts, where, classes)
    ends = np.cumsum([len(found) for found in values.values()])[:-1]
    return dict(zip(values, np.split(every, ends), strict=True)), classes


def _renumber(
    values: Sequence[int | None], names: Sequence[str], classes: tuple[str, ...], where: str
) -> NDArray[np.int32]:
    """Numbers that count the names of one split, as numbers of the classes of all."""
    numbers = {name: number for number, name in enumerate(classes)}
    found = np.array([-1 if value is None or value < 0 else value for value in values], dtype=np.int64)
    for value in np.unique(found[found >= 0]).tolist():
        if value >= len(names):
            raise BadInput(f"{where} holds the label {value}, and names but {len(names)} classes")
        if names[value] not in numbers:
            raise BadInput(f"{where} has a class {names[value]!r} that the set does not have: {', '.join(classes)}")
    table = np.array([*(numbers.get(name, -1) for name in names), -1], dtype=np.int32)
    return table[found]


def _text(value: Any, feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return None if value is None or value < 0 else str(feature.int2str(value))
    return None if value is None else str(value)


def _kind(path: Path) -> str:
    """The reader of `datasets` for a local set: by the suffixes of its files."""
    names = [file.name for file in walk(path)] if path.is_dir() else [path.name]
    suffixes = {os.path.splitext(name)[1].lower() for name in names}
    for suffix, kind in ((".parquet", "parquet"), (".arrow", "arrow")):
        if suffix in suffixes:
            return kind
    if path.is_dir():
        return "imagefolder"
    raise BadInput(f"{PREFIX}{path} is no set that is read: give a folder, a .parquet or .arrow file, or a hub name")


def _refuse_empty(place: str) -> dict[str, Any]:
    raise BadInput(f"{PREFIX}{place} has no rows")
