"""What `pack` takes: samples that say where their bytes lie, and a folder of pictures listed as such.

The kinds of sources stand beside this file: `folder.py`, `table.py` (CSV, JSON lines, lists), `hugging_face.py` and
`torchvision_set.py`; `open_source.py` tells them apart. Each answers with `Splits`.
"""

import errno
import hashlib
import json
import os
import stat
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, overload

import numpy as np
from numpy.typing import NDArray

from foreseen.data.not_pictures import count_unread, name_unread
from foreseen.data.shards import CorruptSample
from foreseen.data.store import MAX_BYTES
from foreseen.errors import BadInput
from foreseen.files import open_regular

IMAGE_SUFFIXES = frozenset(
    # What `decode` reads.
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".pbm", ".pgm", ".ppm", ".pnm", ".pfm"}
)

Box = tuple[int, int, int, int]


class Encoded(Protocol):
    """Bytes that can be had when they are needed; sent to worker processes, so small."""

    @property
    def size(self) -> int:
        """How many they are, before they are read."""

    def read(self) -> bytes:
        """The bytes; raises CorruptSample or OSError where they cannot be had."""


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes on disk: a whole file, or a slice of one, such as a member of a tar."""

    path: str
    size: int
    offset: int = 0

    def read(self) -> bytes:
        """The bytes; fewer than `size` if the file has shrunk meanwhile."""
        try:
            descriptor = open_regular(self.path)
        except BadInput as error:  # it has become something else since it was listed
            raise CorruptSample(str(error)) from None
        try:
            return os.pread(descriptor, self.size, self.offset)
        finally:
            os.close(descriptor)


def read_bounded(encoded: Encoded) -> bytes:
    """The bytes, of which there may not be more than of any picture.

    Raises:
        CorruptSample: there are more, or they cannot be had.
        OSError: a disk failed.
    """
    if encoded.size > MAX_BYTES:
        raise CorruptSample(f"it has {encoded.size:,} bytes, more than the {MAX_BYTES:,} allowed")
    return encoded.read()


@dataclass(frozen=True, slots=True)
class Missing:
    """A picture that a list names and that is not there: packed as unreadable, so that it is counted and named."""

    reason: str
    size: int = 0

    def read(self) -> bytes:
        """Raises CorruptSample with the reason."""
        raise CorruptSample(self.reason)


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
    image: Encoded
    label: int | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    boxes: Mapping[str, Box | None] = field(default_factory=dict)
    masks: Mapping[str, Blob] = field(default_factory=dict)


class Listing(Sequence[SourceSample]):
    """Samples that are made when they are asked for."""

    @abstractmethod
    def sample(self, index: int) -> SourceSample:
        """The sample of a number from 0 on; raises IndexError past the end."""

    @overload
    def __getitem__(self, index: int) -> SourceSample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[SourceSample]: ...
    def __getitem__(self, index: int | slice) -> SourceSample | Sequence[SourceSample]:
        if isinstance(index, slice):
            return [self.sample(number) for number in range(*index.indices(len(self)))]
        return self.sample(index)


class Part(Listing):
    """Some samples of another listing, by their numbers in it, [N]."""

    def __init__(self, samples: Sequence[SourceSample], chosen: NDArray[np.int64]) -> None:
        self._samples, self._chosen = samples, chosen

    def __len__(self) -> int:
        return len(self._chosen)

    def sample(self, index: int) -> SourceSample:
        """The sample at a place among those chosen."""
        return self._samples[int(self._chosen[index])]


@dataclass(frozen=True)
class Splits:
    """What a source holds, ready to be packed.

    Attributes:
        splits: samples of each split by its name; one called "train" where the source names none.
        are_named: the source itself tells its splits apart.
        classes: names of the labels' classes, the same for all splits; None without labels.
        notes: what was passed over, in words.
        licence: terms of the pictures, where the source says them.
    """

    splits: Mapping[str, Sequence[SourceSample]]
    are_named: bool
    classes: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    licence: str | None = None

    def choose(self, split: str | None) -> Mapping[str, Sequence[SourceSample]]:
        """The splits to pack under their names: all, or the one that is asked for, which names one that has no name.

        Raises:
            BadInput: there is no such split.
        """
        if split is None:
            return self.splits
        if not self.are_named:
            return {split: next(iter(self.splits.values()))}
        if split not in self.splits:
            raise BadInput(f"--split is {split!r}, the source has {', '.join(self.splits)}")
        return {split: self.splits[split]}


class Source(Protocol):
    """Pictures that somebody keeps in some form."""

    @property
    def name(self) -> str:
        """What it is called in manifests and file names."""

    def digest(self) -> str:
        """Changes when the source does; costs a look at its files, not at their bytes."""

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """List it, with the class names of the set that it joins, if any; raises BadInput where that cannot be done."""


class FolderListing(Listing):
    """The pictures below a folder, sorted by name.

    Attributes:
        classes: the names of the class folders, sorted; None without labels.
        skipped: files that were passed over because their suffix is not of a picture that is read.
        unread: how many of them are pictures of other kinds, by suffix.
    """

    def __init__(self, root: str | Path, labels: str = "none", classes: tuple[str, ...] | None = None) -> None:
        """List a folder.

        Args:
            root: folder, searched to any depth. Hidden files and folders (`._*` of macOS too) are passed over.
            labels: "none", or "folder": the first folder below root names the class; "auto" is "folder" where every
                picture lies in one.
            classes: with "folder", the class names of the set that this split joins; found by themselves if None.

        Raises:
            BadInput: the folder is missing or has no pictures, or a picture has no class of the set.
        """
        self.root = Path(root)
        if labels not in ("none", "folder", "auto"):
            raise BadInput(f"--labels is {labels!r}, it must be none or folder")
        found = sorted((file.name, file.size) for file in walk(self.root))
        pictures = [(name, size) for name, size in found if is_picture(name)]
        self.skipped = len(found) - len(pictures)
        self.unread = count_unread(name for name, _ in found)
        if not pictures:
            holds = f"holds {len(found):,} files, none of them" if found else "is empty: it needs"
            rest = f"; {name_unread(self.unread)}" if self.unread else ""
            raise BadInput(f"{root} {holds} pictures ({', '.join(sorted(IMAGE_SUFFIXES))}){rest}")
        self._names = [name for name, _ in pictures]
        self._sizes = np.array([size for _, size in pictures], dtype=np.int64)
        self.classes: tuple[str, ...] | None = None
        if labels == "folder" or (labels == "auto" and all("/" in name for name in self._names)):
            self.classes = classes or tuple(sorted({_class_of(name, self.root) for name in self._names}))
            self._numbers = {name: number for number, name in enumerate(self.classes)}
            unknown = sorted({_class_of(name, self.root) for name in self._names} - set(self.classes))
            if unknown:
                raise BadInput(
                    f"{root} has a class {unknown[0]!r} that the set does not have: {', '.join(self.classes)}"
                )

    def __len__(self) -> int:
        return len(self._names)

    def sample(self, index: int) -> SourceSample:
        """The picture at a place in the order of names."""
        name = self._names[index]
        label = None if self.classes is None else self._numbers[_class_of(name, self.root)]
        return SourceSample(name, Blob(str(self.root / name), int(self._sizes[index])), label)


def _class_of(name: str, root: Path) -> str:
    folder, _, rest = name.partition("/")
    if not rest:
        raise BadInput(f"{root / name} lies in no class folder: move it into one, or give --labels none")
    return folder


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file: its path as it is called, bytes, and when it changed last."""

    name: str
    size: int
    mtime_ns: int

    @classmethod
    def look(cls, file: Path) -> Self:
        """What the file system says of a file."""
        found = file.stat()
        return cls(file.name, found.st_size, found.st_mtime_ns)


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's does."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def walk(root: Path) -> Iterator[FoundFile]:
    """All files below a folder but hidden ones; links to folders are followed unless they lead back up.

    Raises:
        BadInput: it is no folder, or one below may not be read.
    """
    if not os.path.isdir(root):
        raise BadInput(f"{root} is not a folder" if os.path.exists(root) else f"{root} does not exist")
    yield from _walk(str(root), "", os.stat(root), set())


def entries(folder: str | Path) -> Iterator[tuple[str, os.stat_result]]:
    """What stands in a folder but hidden things: names, and what the file system says of them or of a link's end.

    Links that lead nowhere or to themselves, and what vanishes meanwhile, are passed over.

    Raises:
        BadInput: it may not be read.
    """
    try:
        with os.scandir(folder) as found:
            for entry in found:
                if entry.name.startswith("."):
                    continue
                try:
                    yield entry.name, entry.stat()
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ELOOP):
                        raise
    except FileNotFoundError:  # the folder itself has vanished
        return
    except PermissionError as error:
        raise BadInput(f"{error.filename} may not be read: change its permissions") from None


def digest_files(files: Iterable[FoundFile]) -> str:
    """Changes when a file is added, removed, renamed, written or of another length."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(files, key=lambda file: file.name):
        digest.update(f"{json.dumps(file.name)} {file.size} {file.mtime_ns}\n".encode())
    return digest.hexdigest()


def _walk(root: str, below: str, folder: os.stat_result, above: set[tuple[int, int]]) -> Iterator[FoundFile]:
    if (here := (folder.st_dev, folder.st_ino)) in above:
        return
    for last, found in entries(os.path.join(root, below)):
        name = f"{below}/{last}" if below else last
        if stat.S_ISDIR(found.st_mode):
            yield from _walk(root, name, found, above | {here})
        elif stat.S_ISREG(found.st_mode):
            yield FoundFile(name, found.st_size, found.st_mtime_ns)
