"""What `pack` takes: samples that say where their bytes lie, and a folder of pictures listed as such."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from foreseen.errors import BadInput

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}  # what `decode` reads
)

Box = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes on disk: a whole file, or a slice of one, such as a member of a tar."""

    path: str
    size: int
    offset: int = 0

    def read(self) -> bytes:
        """The bytes; fewer than `size` if the file has shrunk meanwhile."""
        with open(self.path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), self.size, self.offset)


@dataclass(frozen=True, slots=True)
class SourceSample:
    """One picture and what is known of it. All samples of a split have the same keys in `meta`, `boxes` and `masks`.

    Attributes:
        name: path below the source, kept in the json and shown in messages.
        image: the encoded picture.
        label: class number, or None.
        meta: further entries of the json.
        boxes: [xmin, ymin, xmax, ymax] in pixels or None, by their key in the json; scaled with the picture.
        masks: PNG label maps of the picture's size, by member extension ("trimap.png"); scaled with the picture.
    """

    name: str
    image: Blob
    label: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    boxes: Mapping[str, Box | None] = field(default_factory=dict)
    masks: Mapping[str, Blob] = field(default_factory=dict)


class FolderListing(Sequence[SourceSample]):
    """The pictures below a folder, sorted by name.

    Attributes:
        classes: with labels="folder", the names of the folders, sorted; else None.
        skipped: files that were passed over because their suffix is not of a picture.
    """

    def __init__(self, root: str | Path, labels: str = "none", classes: tuple[str, ...] | None = None) -> None:
        """List a folder.

        Args:
            root: folder, searched to any depth. Hidden files and folders (`._*` of macOS too) are passed over.
            labels: "none", or "folder": the first folder below root names the class.
            classes: with "folder", the class names of the set that this split joins; found by themselves if None.

        Raises:
            BadInput: the folder is missing or has no pictures, or a picture has no class of the set.
        """
        self.root = Path(root)
        if labels not in ("none", "folder"):
            raise BadInput(f"--labels is {labels!r}, it must be none or folder")
        if not self.root.is_dir():
            raise BadInput(f"{root} is not a folder" if self.root.exists() else f"{root} does not exist")
        try:
            found = sorted(_walk(str(self.root), "", set()))
        except PermissionError as error:
            raise BadInput(f"{error.filename} may not be read: change its permissions") from None
        pictures = [(name, size) for name, size in found if os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES]
        self.skipped = len(found) - len(pictures)
        if not pictures:
            holds = f"holds {len(found):,} files, none of them" if found else "is empty: it needs"
            raise BadInput(f"{root} {holds} pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self._names = [name for name, _ in pictures]
        self._sizes = np.array([size for _, size in pictures], dtype=np.int64)
        self.classes: tuple[str, ...] | None = None
        if labels == "folder":
            self.classes = classes or tuple(sorted({_class_of(name, self.root) for name in self._names}))
            self._numbers = {name: number for number, name in enumerate(self.classes)}
            unknown = sorted({_class_of(name, self.root) for name in self._names} - set(self.classes))
            if unknown:
                raise BadInput(
                    f"{root} has a class {unknown[0]!r} that the set does not have: {', '.join(self.classes)}"
                )

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> SourceSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SourceSample]: ...
    def __getitem__(self, index: int | slice) -> SourceSample | Sequence[SourceSample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._names[index]
        label = None if self.classes is None else self._numbers[_class_of(name, self.root)]
        return SourceSample(name, Blob(str(self.root / name), int(self._sizes[index])), label)


def _class_of(name: str, root: Path) -> str:
    folder, _, rest = name.partition("/")
    if not rest:
        raise BadInput(f"{root / name} lies in no class folder: move it into one, or give --labels none")
    return folder


def _walk(root: str, below: str, above: set[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Names and sizes of all files; links to folders are followed unless they lead back up."""
    folder = os.stat(os.path.join(root, below))
    if (here := (folder.st_dev, folder.st_ino)) in above:
        return
    with os.scandir(os.path.join(root, below)) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{below}/{entry.name}" if below else entry.name
            if entry.is_dir():
                yield from _walk(root, name, above | {here})
            elif entry.is_file():
                yield name, entry.stat().st_size
