"""Which kind of source a path is."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from foreseen.data.folder import FolderSource
from foreseen.data.hugging_face import PREFIX, HuggingFaceSource
from foreseen.data.manifest import FILE_NAME, WORK_PREFIX
from foreseen.data.source import Source
from foreseen.data.table import TABLE_SUFFIXES, Columns, TableSource
from foreseen.data.tar_paths import holds_tars
from foreseen.data.tar_source import TarSource
from foreseen.errors import BadInput


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
        labels: "none", "folder" (of a folder alone), or "auto": from class folders where every picture lies in one, or
            from the label column.
        columns: of a CSV or a Hugging Face set.
        hf_config: configuration of a Hugging Face set on the hub.
    """

    labels: str = "auto"
    columns: Columns = field(default_factory=Columns)
    hf_config: str | None = None


def open_source(src: str, options: SourceOptions) -> Source:
    """The source at a path: `hf:…`, a CSV, tars, or a folder of pictures.

    Raises:
        BadInput: there is nothing, or a file of another kind.
    """
    if options.labels not in ("none", "folder", "auto"):
        raise BadInput(f"--labels is {options.labels!r}, it must be none or folder")
    if src.startswith(PREFIX):
        return HuggingFaceSource(src.removeprefix(PREFIX), options.columns, options.hf_config, options.labels)
    path = Path(src).expanduser()
    if holds_tars(src):
        return TarSource([src], options.columns, options.labels)
    if os.path.isfile(path):
        if path.suffix.lower() not in TABLE_SUFFIXES:
            kinds = f"a folder of pictures, a {' or '.join(sorted(TABLE_SUFFIXES))} file, tars, or hf:NAME"
            raise BadInput(f"{path} is a file of no kind that is read: give {kinds}")
        return TableSource(path, options.columns, options.labels)
    return FolderSource(path, options.labels)


def is_packed(src: str) -> bool:
    """Whether a path is a packed set, or one that is being packed, and not a source of pictures."""
    path = Path(src).expanduser()
    return os.path.isdir(path) and (os.path.exists(path / FILE_NAME) or any(path.glob(f"{WORK_PREFIX}*")))
