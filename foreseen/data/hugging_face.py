"""A Hugging Face set as a source: from the hub by its name, or local parquet, arrow, imagefolder or `save_to_disk`.

The library `datasets` finds splits and features; pictures are never decoded by it, so their bytes are packed as they
came. A local set is given to the reader of its own format, and a row that names a file is believed only below the set's
own folder, or where `datasets` keeps what it downloads. `hugging_face_rows.py` has the rows.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foreseen.data.extra_columns import Keep
from foreseen.data.hugging_face_rows import ExtraColumns, Rows, find_extra, select_pictures
from foreseen.data.labels import number_labels, renumber_labels
from foreseen.data.source import FoundFile, Part, SourceSample, Splits, digest_files, walk
from foreseen.data.table import IMAGE_NAMES, LABEL_NAMES, SPLIT_NAME, Columns
from foreseen.errors import BadInput
from foreseen.files import expand_home

PREFIX = "hf:"
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # a bare name may be a reader of `datasets`, such as that of pickles
_CONFIGS = re.compile(r"Config name is missing.*?(\[[^\]]*\])", re.DOTALL)
_LABEL_NAMES = LABEL_NAMES | {"cls"}  # as webdataset calls it
_MAX_CONFIGS_NAMED = 20


class HuggingFaceSource:
    """A set that `datasets` reads.

    Args:
        place: a file or folder; what is neither is a name on the hub, which may download.
        columns: which say what; `split` where it is asked for alone, since the set has splits of its own.
        config: the configuration of a hub set that has several.
        labels: "none" leaves labels out; anything else takes them where there is a column.
        keep: further columns that go into KEY.json; None is all of them.
    """

    def __init__(
        self, place: str, columns: Columns, config: str | None = None, labels: str = "auto", keep: Keep = ()
    ) -> None:
        self.place, self.columns, self.config, self.labels, self.keep = place, columns, config, labels, keep
        self.path = expand_home(place)
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
        where = f"{PREFIX}{self.place}"
        lists = [] if label is not None or self.labels == "none" else _label_columns(first, of_one_label=False)
        notes = [f"column {name!r} of {where} holds lists or objects: no labels are taken from it" for name in lists]
        if label is not None:
            labelled = {name: rows for name, rows in sets.items() if label in rows.column_names}
            numbers, classes = _labels(labelled, label, f"column {label!r} of {where}", classes)
            lacking = [name for name in sets if name not in labelled]
            notes = [f"split {name!r} of {where} has no column {label!r}: no labels" for name in lacking]
        used = (image, label, self.columns.split)
        extra, left_out = find_extra(sets, used, self.keep, where)
        if left_out:
            notes.append(f"columns that hold bytes or pictures are not kept in KEY.json: {', '.join(left_out)}")
        listings: dict[str, Sequence[SourceSample]] = {}
        for name, rows in sets.items():
            pictures = select_pictures(rows, image, f"split {name!r} of {where}")
            columns = ExtraColumns(rows, extra)
            listings[name] = Rows(pictures, image, name, self._roots(), numbers.get(name), columns)
        if self.columns.split is not None:
            listings = self._split_by_column(sets, listings)
        return Splits(listings, True, classes if numbers else None, tuple(notes), first.info.license or None)

    def _split_by_column(
        self, sets: dict[str, Any], listings: dict[str, Sequence[SourceSample]]
    ) -> dict[str, Sequence[SourceSample]]:
        """The rows of the only split that there is, under the names in a column."""
        where = f"{PREFIX}{self.place}"
        if len(sets) > 1:
            raise BadInput(
                f"{where} has the splits {', '.join(sets)}, and --split-column (data.columns.split in a recipe) is for "
                "a set with one: leave it out"
            )
        ((origin, rows),) = sets.items()
        column = self.columns.find("split", rows.column_names, [], where)
        feature = rows.features[column]
        names = [_text(value, feature) or "" for value in rows.data.column(column).to_pylist()]
        if (row := next((row for row, name in enumerate(names) if not SPLIT_NAME.fullmatch(name)), None)) is not None:
            raise BadInput(
                f"row {row} of {where} has the split {names[row]!r}: a split's name is of letters, digits, - and _"
            )
        members = np.array(names)
        return {name: Part(listings[origin], np.flatnonzero(members == name)) for name in dict.fromkeys(names)}

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
            raise BadInput(f"{PREFIX}{self.place} {_why_not_loaded(error)}") from error
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
        usual = usual or [name for name, feature in rows.features.items() if _may_be_pictures(name, feature)]
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
        usual = usual or _label_columns(rows, of_one_label=True)
        return self.columns.find("label", rows.column_names, usual, PREFIX + self.place)


def _labels(
    sets: dict[str, Any], column: str, where: str, classes: tuple[str, ...] | None
) -> tuple[dict[str, NDArray[np.int32]], tuple[str, ...]]:
    """Class number of each row of each split, and the names of the classes."""
    import datasets

    values = {name: rows.data.column(column).to_pylist() for name, rows in sets.items()}
    features = [rows.features[column] for rows in sets.values()]
    if not all(isinstance(feature, datasets.Value | datasets.ClassLabel) for feature in features):
        raise BadInput(f"{where} holds lists or objects: choose one with a label for each picture by --label-column")
    if all(isinstance(feature, datasets.ClassLabel) for feature in features):
        known = classes or tuple(dict.fromkeys(name for feature in features for name in feature.names))
        numbers = [
            renumber_labels(found, feature.names, known, where)
            for found, feature in zip(values.values(), features, strict=True)
        ]
        return dict(zip(values, numbers, strict=True)), known
    texts = [_text(value, feature) for found, feature in zip(values.values(), features, strict=True) for value in found]
    every, classes = number_labels(texts, where, classes)
    ends = np.cumsum([len(found) for found in values.values()])[:-1]
    return dict(zip(values, np.split(every, ends), strict=True)), classes


def _text(value: Any, feature: Any) -> str | None:
    import datasets

    if isinstance(feature, datasets.ClassLabel):
        return None if value is None or value < 0 else str(feature.int2str(value))
    return None if value is None else str(value)


def _label_columns(rows: Any, *, of_one_label: bool) -> list[str]:
    """Columns with a usual name that hold a label for each picture, or lists or objects."""
    import datasets

    single = (datasets.Value, datasets.ClassLabel)
    named = [name for name in rows.column_names if name.lower() in _LABEL_NAMES]
    return [name for name in named if isinstance(rows.features[name], single) == of_one_label]


def _may_be_pictures(name: str, feature: Any) -> bool:
    """Whether a column without a type of its own has a picture's name, and bytes or paths."""
    return name.lower() in IMAGE_NAMES and getattr(feature, "dtype", None) in (
        "binary", "large_binary", "string", "large_string"
    )  # fmt: skip


def _why_not_loaded(error: Exception) -> str:
    """What a library says of a set that it cannot load, in a sentence."""
    if found := _CONFIGS.search(str(error)):
        names = re.findall(r"'([^']*)'", found[1])
        more = ", …" if len(names) > _MAX_CONFIGS_NAMED else ""
        listed = ", ".join(names[:_MAX_CONFIGS_NAMED]) + more
        return f"has the configurations {listed}: choose by --hf-config (data.hf_config in a recipe)"
    reason: BaseException = error
    while reason.__cause__ is not None:  # `datasets` wraps what went wrong in a sentence that says nothing of it
        reason = reason.__cause__
    what = str(reason).strip().splitlines() or [type(reason).__name__]
    return f"cannot be loaded: {what[0]}"


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
