"""Pictures to look at, one by one, whether they are packed or still lie where they came from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foreseen.data.manifest import Manifest, read_manifest
from foreseen.data.open_set import Access, open_set
from foreseen.data.open_source import SourceOptions, is_packed, open_source
from foreseen.data.shards import ShardSet
from foreseen.data.source import Blob, SourceSample, is_picture, read_bounded
from foreseen.data.store import LocalStore
from foreseen.data.urls import is_url
from foreseen.errors import BadInput
from foreseen.files import expand_home
from foreseen.printable import printable


class Pictures(Protocol):
    """The pictures of one split, by number."""

    def __len__(self) -> int: ...

    @property
    def labels(self) -> NDArray[np.int32] | None:
        """Class number of each, [N], -1 where unlabelled; None where none has one."""

    def sizes(self) -> NDArray[np.unsignedinteger[Any]]:
        """Bytes of each, [N]."""

    def name(self, sample: int) -> str:
        """Path of a picture below its source, or its key where that is not known."""

    def read(self, sample: int) -> bytes:
        """The encoded picture; raises CorruptSample, OSError or BadInput where it cannot be had."""

    def read_start(self, sample: int, size: int) -> bytes:
        """The first bytes of it; raises as `read`."""


class PackedPictures:
    """Pictures of a split of shards."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.labels = shards, shards.labels
        self.sizes, self.read, self.read_start = shards.sizes, shards.read, shards.read_start

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, sample: int) -> str:
        """See `Pictures`."""
        return self.shards.name(sample)


class ListedPictures:
    """Pictures of a source that is not packed."""

    def __init__(self, samples: Sequence[SourceSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def labels(self) -> NDArray[np.int32] | None:
        """See `Pictures`."""
        found = np.array([-1 if sample.label is None else sample.label for sample in self.samples], np.int32)
        return found if (found >= 0).any() else None

    def sizes(self) -> NDArray[np.unsignedinteger[Any]]:
        """See `Pictures`."""
        return np.array([sample.image.size for sample in self.samples], np.uint64)

    def name(self, sample: int) -> str:
        """See `Pictures`."""
        return printable(self.samples[sample].name)

    def read(self, sample: int) -> bytes:
        """See `Pictures`."""
        return read_bounded(self.samples[sample].image)

    def read_start(self, sample: int, size: int) -> bytes:
        """See `Pictures`; a source has no cheaper way than to read it all."""
        return self.read(sample)[:size]


def open_pictures(
    src: str, split: str | None = None, shards_at: Path | None = None
) -> tuple[Mapping[str, Pictures], Manifest]:
    """The splits of a packed set or of a source, or the one that is named.

    Returns:
        Pictures by split, and the manifest; that of a source that is not packed has the class names alone.

    Raises:
        BadInput: there is nothing that can be read, or no such split.
    """
    if is_packed(src):
        path = expand_home(src)
        manifest = read_manifest(path)
        names = sorted(manifest.splits) if split is None else [split]
        store = None if shards_at is None else LocalStore(expand_home(shards_at))
        return {name: PackedPictures(ShardSet.open(path, name, store)) for name in names}, manifest
    if shards_at is not None:
        raise BadInput(f"--shards-at is for a set, and {src} is none")
    found = open_source(src, SourceOptions()).read()
    if split is not None and split not in found.splits:
        raise BadInput(f"--split is {split!r}, {src} has {', '.join(found.splits)}")
    chosen = found.splits if split is None else {split: found.splits[split]}
    return {name: ListedPictures(samples) for name, samples in chosen.items()}, Manifest({}, found.classes)


@dataclass(frozen=True)
class OneSplit:
    """One split of whatever holds pictures, and the names of its classes, where it has some."""

    pictures: Pictures
    classes: tuple[str, ...] | None

    def key(self, sample: int) -> str:
        """Shard and key of a packed picture; empty where it is not packed."""
        if isinstance(self.pictures, PackedPictures):
            return "/".join(self.pictures.shards.shard_and_key(sample))
        return ""

    def label(self, sample: int) -> str | None:
        """The name, or else the number, of a picture's class, fit to be shown; None where it has none."""
        labels = self.pictures.labels
        if labels is None or labels[sample] < 0:
            return None
        return printable(self.classes[labels[sample]]) if self.classes else str(labels[sample])


def open_one_split(src: str, split: str | None, options: SourceOptions, say: Callable[[str], None]) -> OneSplit:
    """One split of a packed set, here or behind a URL, or of a source, which is not packed for it; or a single picture.

    Args:
        src: any of these.
        split: which, where there are several.
        options: how a source is read.
        say: told in a line what is passed over, or fetched.

    Raises:
        BadInput: there is nothing that can be read, no such split, or several and none is named.
    """
    if is_url(src):
        shards = open_set(src, split or _only((), src), Access(), say)
        return OneSplit(PackedPictures(shards), shards.classes)
    if is_packed(src):
        manifest = read_manifest(expand_home(src))
        shards = open_set(src, split or _only(sorted(manifest.splits), src), Access(), say)
        return OneSplit(PackedPictures(shards), shards.classes)
    path = expand_home(src)
    if is_picture(src) and path.is_file():
        return OneSplit(ListedPictures([SourceSample(src, Blob(str(path), path.stat().st_size))]), None)
    found = open_source(src, options).read()
    for note in found.notes:
        say(printable(note))
    if split is None and found.are_named:
        split = _only(list(found.splits), src)
    return OneSplit(ListedPictures(next(iter(found.choose(split).values()))), found.classes)


def _only(splits: Sequence[str], src: str) -> str:
    if len(splits) != 1:
        there = f"the splits {', '.join(splits)}" if splits else "splits that are not listed before they are read"
        raise BadInput(f"{src} has {there}: choose one by --split")
    return splits[0]
