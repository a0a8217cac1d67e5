"""Which kind of source a path is."""

import os
from dataclasses import dataclass, field

from foreseen.data import hugging_face, torchvision_set
from foreseen.data.extra_columns import Keep
from foreseen.data.folder import FolderSource
from foreseen.data.hugging_face import HuggingFaceSource
from foreseen.data.manifest import FILE_NAME, WORK_PREFIX
from foreseen.data.source import Source
from foreseen.data.table import Columns, TableSource
from foreseen.data.table_files import TABLE_SUFFIXES
from foreseen.data.tar_paths import holds_tars
from foreseen.data.tar_source import TarSource
from foreseen.data.torchvision_set import TorchvisionSource
from foreseen.errors import BadInput
from foreseen.files import expand_home


@dataclass(frozen=True)
class SourceOptions:
    """How a source is read.

    Attributes:
        labels: "none", "folder" (of a folder alone), or "auto": from class folders where every picture lies in one, or
            from the label column, or the set's own.
        columns: of a table or a Hugging Face set.
        hf_config: configuration of a Hugging Face set on the hub.
        keep: further columns of a table, a Hugging Face set or the jsons of tars that go into KEY.json; None is all.
        download: let torchvision fetch a set that is not there.
    """

    labels: str = "auto"
    columns: Columns = field(default_factory=Columns)
    hf_config: str | None = None
    keep: Keep = ()
    download: bool = False


def open_source(src: str, options: SourceOptions) -> Source:
    """The source at a path: `hf:…`, `torchvision:…`, tars, a file that lists pictures, or a folder of them.

    Raises:
        BadInput: there is nothing, or a file of another kind.
    """
    if options.labels not in ("none", "folder", "auto"):
        raise BadInput(f"--labels is {options.labels!r}, it must be none or folder")
    if src.startswith(hugging_face.PREFIX):
        place = src.removeprefix(hugging_face.PREFIX)
        return HuggingFaceSource(place, options.columns, options.hf_config, options.labels, options.keep)
    if src.startswith(torchvision_set.PREFIX):
        place = src.removeprefix(torchvision_set.PREFIX)
        return TorchvisionSource(place, options.labels, options.download)
    if options.download:
        raise BadInput(f"--download is for {torchvision_set.PREFIX}NAME@DIR, not for {src}")
    path = expand_home(src)
    if holds_tars(src):
        return TarSource([src], options.columns, options.labels, options.keep)
    if os.path.isfile(path):
        if path.suffix.lower() not in TABLE_SUFFIXES:
            tables = ", ".join(sorted(TABLE_SUFFIXES))
            kinds = f"a folder of pictures, tars, a {tables} file, hf:NAME or torchvision:NAME@DIR"
            raise BadInput(f"{path} is a file of no kind that is read: give {kinds}")
        return TableSource(path, options.columns, options.labels, options.keep)
    return FolderSource(path, options.labels)


def is_folder(src: str) -> bool:
    """Whether a source is none but a folder of pictures."""
    prefixes = (hugging_face.PREFIX, torchvision_set.PREFIX)
    return not src.startswith(prefixes) and not os.path.isfile(expand_home(src)) and not holds_tars(src)


def resolve(src: str) -> str:
    """The same source by a name that does not depend on the working directory."""
    place = src.removeprefix(hugging_face.PREFIX)
    if src.startswith(torchvision_set.PREFIX):
        place = src.partition("@")[2]
    path = expand_home(place)
    return src[: len(src) - len(place)] + str(path.resolve()) if path.exists() else src


def is_packed(src: str) -> bool:
    """Whether a path is a packed set, or one that is being packed, and not a source of pictures."""
    path = expand_home(src)
    return os.path.isdir(path) and (os.path.exists(path / FILE_NAME) or any(path.glob(f"{WORK_PREFIX}*")))
