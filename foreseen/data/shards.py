"""Read single samples out of packed shards, by number, in any order.

Nothing is read in sequence and nothing is extracted: the index says where each picture lies in its tar, and one
`pread` of a store fetches it, from a folder or from a server. The index is memory-mapped, so all workers of a machine
share the pages that they touch, and a set of 100 million samples opens at once. Neither torch nor Pillow is needed
here.

One index a split rather than one a shard: a large set has 100,000 shards, and opening as many small files takes longer
than all the rest of the start.
"""

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from foreseen.data.arrays import map_array
from foreseen.data.manifest import Split, read_manifest
from foreseen.data.store import MAX_BYTES, LocalStore, Piece, Store
from foreseen.errors import BadInput
from foreseen.files import parse_json
from foreseen.printable import printable

# Offsets in a tar are multiples of 512, so 32 bits of them reach 2 TB; crc32 0 means not known.
INDEX_ROW = np.dtype([("offset_512", "<u4"), ("size", "<u4"), ("crc32", "<u4")])
TAR_BLOCK = 512
_FACTS_READ = 4096  # header and json of a sample, mostly
_MAX_FACTS = 1 << 20
_MOST_CLASSES = 1_000_000  # a classifier of as many is larger than most backbones


class CorruptSample(ValueError):
    """The bytes of one sample are not what was packed, or are no picture; the message says which and why."""


class ShardSet:
    """One split of a packed set; `ShardSet.open` makes it.

    It may be sent to worker processes and used by several threads.

    Attributes:
        path, split: folder with the manifest and the index, and what was opened of it.
        place: what a person calls the set: that folder, or the URL that it was fetched from.
        store: where the shards are read.
        shard_samples, shard_bytes: of each shard, in order.
        source, licence: where the pictures came from, and under which terms.
        classes: class names, or None.
        mean, std: of each RGB channel in [0, 1], or None.
        labels: class number of every sample, [N] int32, -1 where unlabelled; None when the split has no labels.
        fingerprint: changes when the pictures do; not with the folder's place, the files' times or the labels.
    """

    def __init__(
        self, path: Path, split: str, entry: Split, classes: tuple[str, ...] | None, index: NDArray[Any], labels: Any,
        store: Store, place: str,
    ) -> None:  # fmt: skip
        self.path, self.split, self.classes = path, split, classes
        self.place, self.store = place, store
        self.mean, self.std = entry.mean, entry.std
        self.source, self.licence = entry.source, entry.licence
        self.labels: NDArray[np.int32] | None = labels
        self.fingerprint = _fingerprint(entry)
        self._shards = entry.shards
        self._starts = [0, *accumulate(shard.samples for shard in entry.shards)]
        self._index = index

    @classmethod
    def open(cls, path: str | Path, split: str, store: Store | None = None, place: str | None = None) -> Self:
        """Open one split of the packed set in a folder; `open_set` also opens one behind a URL.

        Args:
            path: folder with the manifest and the index.
            split: which.
            store: where the shards are; None for the same folder.
            place: what a person calls the set; None for the folder.

        Raises:
            BadInput: the folder is missing, empty or not a packed set, it has no such split, or its index is broken.
        """
        path = Path(path)
        manifest = read_manifest(path)
        entry = find_split(manifest.splits, split, place or str(path))
        index = map_array(path / entry.index, INDEX_ROW, entry.samples)
        labels = None if entry.labels is None else map_array(path / entry.labels, np.dtype("<i4"), entry.samples)
        return cls(path, split, entry, manifest.classes, index, labels, store or LocalStore(path), place or str(path))

    def __len__(self) -> int:
        return len(self._index)

    @property
    def labels_fingerprint(self) -> str | None:
        """Changes when a label or a class name does; None without labels. Reads all of them."""
        if self.labels is None:
            return None
        digest = hashlib.blake2b(np.ascontiguousarray(self.labels, dtype="<i4").data, digest_size=16)
        digest.update(json.dumps(self.classes).encode())
        return digest.hexdigest()

    def picture_digests(self) -> NDArray[np.uint64]:
        """Size and crc32 of every picture's bytes in one number, [N]; a crc32 that is not known is 0."""
        return self._index["size"].astype(np.uint64) << np.uint64(32) | self._index["crc32"].astype(np.uint64)

    @property
    def num_classes(self) -> int:
        """Classes that the labels count: those with a name, or up to the largest label. Reads all of them."""
        largest = -1 if self.labels is None or not len(self.labels) else int(self.labels.max())
        most = len(self.classes) if self.classes else _MOST_CLASSES
        if largest >= most:
            sample = int(self.labels.argmax()) if self.labels is not None else 0
            raise BadInput(
                f"{self.describe(sample)} of split {self.split!r} of {self.path} has the label {largest:,}, and labels "
                f"below {most:,} are what "
                + ("its classes have names for" if self.classes else "is believed")
                + ": pack the set again"
            )
        return most if self.classes else largest + 1

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the files itself: sending the object must not send a gigabyte of index.
        return (type(self).open, (self.path, self.split, self.store, self.place))

    @property
    def address(self) -> str:
        """Where another process finds the set: the whole path of its folder, or its URL."""
        return self.place if "://" in self.place else str(self.path.resolve())

    @property
    def shard_samples(self) -> list[int]:
        return [shard.samples for shard in self._shards]

    @property
    def shard_bytes(self) -> list[int]:
        return [shard.bytes for shard in self._shards]

    def read(self, sample: int, *, max_bytes: int = MAX_BYTES) -> bytes:
        """The encoded picture of one sample, in [0, len).

        Its checksum is compared, which costs under 2 % of decoding it: nothing else notices a flipped bit.

        Args:
            sample: its number.
            max_bytes: of a picture that the index says is longer nothing is read.

        Raises:
            IndexError: there is no such sample.
            CorruptSample: the bytes differ from those packed, the shard ends before them, or they are too many.
            BadInput: the shard has gone, or is another one than was packed.
        """
        name, size, at, crc32 = self._locate(sample, max_bytes)
        data = self.store.pread(name, size, at)
        if len(data) != size or (crc32 and zlib.crc32(data) != crc32):
            return self._read_again(sample, max_bytes)
        return data

    def read_many(
        self, samples: Sequence[int], *, max_bytes: int = MAX_BYTES
    ) -> Iterator[bytes | CorruptSample | OSError]:
        """The same of many samples, in their order; what would be raised of a single one stands in its place.

        Where each read waits for a server, they wait together.
        """
        located = [self._locate_or_error(sample, max_bytes) for sample in samples]
        answers = self.store.read_many([Piece(*where[:3]) for where in located if not isinstance(where, CorruptSample)])
        for sample, where in zip(samples, located, strict=True):
            if isinstance(where, CorruptSample):
                yield where
                continue
            data, (_, size, _, crc32) = next(answers), where
            if isinstance(data, OSError) or (len(data) == size and (not crc32 or zlib.crc32(data) == crc32)):
                yield data
                continue
            try:
                yield self._read_again(sample, max_bytes)
            except (CorruptSample, OSError) as error:
                yield error

    def read_start(self, sample: int, size: int) -> bytes:
        """The first bytes of a sample's encoded picture, all of them if it has fewer; for headers, so not compared.

        Raises:
            IndexError: there is no such sample.
            BadInput: the shard has gone.
        """
        name, whole, at, _ = self._locate(sample, None)
        return self.store.pread(name, min(size, whole), at)

    def sizes(self) -> NDArray[np.uint32]:
        """Bytes of every encoded picture, [N]."""
        sizes: NDArray[np.uint32] = self._index["size"]
        return sizes

    def facts(self, sample: int) -> dict[str, Any]:
        """What KEY.json says of a sample: path, width, height and so on; nothing where it does not follow the picture.

        In tars of others the json may stand before the picture, and what follows is that of the next sample.

        Raises:
            IndexError: there is no such sample.
            BadInput: the shard has gone.
        """
        shard, size, start, _ = self._locate(sample, None)
        at = start + -(-size // TAR_BLOCK) * TAR_BLOCK
        head = self.store.pread(shard, _FACTS_READ, at)
        (key, extension), length = _key_and_extension(head), head[124:135].strip(b" \0")
        if extension != b"json" or not length.isdigit() or start < TAR_BLOCK:
            return {}
        if key != _key_and_extension(self.store.pread(shard, TAR_BLOCK, start - TAR_BLOCK))[0]:
            return {}
        if (end := TAR_BLOCK + int(length, 8)) > len(head):
            head = self.store.pread(shard, min(end, _MAX_FACTS), at)
        try:
            found = parse_json(head[TAR_BLOCK:end])
        except ValueError:  # cut off, or made by others
            return {}
        return found if isinstance(found, dict) else {}

    def name(self, sample: int) -> str:
        """The path that a picture had below its source, or its place in the set; fit to be shown."""
        path = self.facts(sample).get("path")
        return printable(path) if isinstance(path, str) else self.describe(sample)

    def describe(self, sample: int) -> str:
        """Name a sample for a message: `train-000003.tar: sample 17 (key 000003017)`."""
        shard, key = self.shard_and_key(sample)
        text = f"{shard}: sample {sample - self._starts[self._shard_of(sample)]}"
        return f"{text} (key {key})" if key else text

    def shard_and_key(self, sample: int) -> tuple[str, str]:
        """The file name of a sample's shard and its key there, fit to be shown; no key where none can be read."""
        shard = self._shard_of(sample)
        name = printable(self._shards[shard].name)
        header_at = (int(self._index[sample]["offset_512"]) - 1) * TAR_BLOCK
        try:
            header = self.store.pread(self._shards[shard].name, TAR_BLOCK, header_at)
        except (OSError, BadInput):  # it is asked for where something has already gone wrong
            return name, ""
        return name, printable(_key_and_extension(header)[0].decode(errors="replace"))

    def check_sizes(self) -> None:
        """Compare the shards with the manifest: a stat each, no reading; of very many behind a URL only some.

        Raises:
            BadInput: names the first shard that is missing or has another size, and counts them all.
        """
        wrong = []
        sizes = self.store.sizes([shard.name for shard in self._shards])
        for shard, size in zip(self._shards, sizes, strict=True):
            if size == -1:
                wrong.append(f"{shard.name} is missing")
            elif size is not None and size != shard.bytes:
                wrong.append(f"{shard.name} has {size:,} bytes and not the {shard.bytes:,} of the manifest")
        if wrong:
            rest = f" ({len(wrong)} of {len(self._shards)} shards are wrong)" if len(wrong) > 1 else ""
            raise BadInput(f"{self.store.place}: {wrong[0]}{rest}: copy or pack the split {self.split!r} again")

    def expect(self, shards: Sequence[int]) -> None:
        """Tell the store which shards, by number, are read soon."""
        self.store.expect([self._shards[shard].name for shard in shards])

    def _shard_of(self, sample: int) -> int:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not in [0, {len(self)}) of {self.place} {self.split}")
        return bisect_right(self._starts, sample) - 1

    def _locate(self, sample: int, max_bytes: int | None) -> tuple[str, int, int, int]:
        """Shard, size, offset and checksum of a sample's picture; refused if it may not be so large."""
        shard = self._shard_of(sample)
        offset_512, size, crc32 = self._index[sample].item()
        if max_bytes is not None and size > max_bytes:
            raise CorruptSample(f"{self.describe(sample)} has {size:,} bytes, more than the {max_bytes:,} allowed")
        return self._shards[shard].name, size, offset_512 * TAR_BLOCK, crc32

    def _locate_or_error(self, sample: int, max_bytes: int) -> tuple[str, int, int, int] | CorruptSample:
        try:
            return self._locate(sample, max_bytes)
        except CorruptSample as error:
            return error

    def _read_again(self, sample: int, max_bytes: int) -> bytes:
        """A second look at a sample that was not what it should be: the way here may have been bad, or the shard is."""
        name, size, at, crc32 = self._locate(sample, max_bytes)
        self.store.forget(name)
        data = self.store.pread(name, size, at)
        if len(data) == size and (not crc32 or zlib.crc32(data) == crc32):
            return data
        if (change := self.store.describe_change(name, self._shards[self._shard_of(sample)].bytes)) is not None:
            raise BadInput(
                f"{self.store.place}: shard {name} has changed under this run: {change}; bring the old one back, and "
                "the same command goes on, or pack the set again for a new run"
            )
        if len(data) != size:
            raise CorruptSample(f"{self.describe(sample)} ends after {len(data)} of its {size} bytes")
        raise CorruptSample(f"{self.describe(sample)} has changed since it was packed (crc32 differs)")


def find_split(splits: Mapping[str, Split], split: str, place: str) -> Split:
    """The entry of a split.

    Raises:
        BadInput: there is none of that name.
    """
    if (entry := splits.get(split)) is None:
        near = get_close_matches(split, splits, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        has = ", ".join(sorted(splits)) or "none"
        raise BadInput(f"{place} has no split {split!r}, it has {has}{hint}")
    return entry


def rows_digest(rows: NDArray[Any]) -> str:
    """The digest of an index or of labels that the manifest keeps; the fingerprint uses that of the index."""
    return hashlib.blake2b(np.ascontiguousarray(rows).view(np.uint8).data, digest_size=16).hexdigest()


def _key_and_extension(header: bytes) -> tuple[bytes, bytes]:
    """Of the member that a header names: the key, folders included, and the extension."""
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345:346].strip(b"\0"):
        name = header[345:500].split(b"\0")[0] + b"/" + name
    folder, slash, last = name.rpartition(b"/")
    stem, _, extension = last.partition(b".")
    return folder + slash + stem, extension


def _fingerprint(entry: Split) -> str:
    digest = hashlib.blake2b((entry.first_digest or entry.index_digest).encode(), digest_size=16)
    digest.update("".join(f"\n{name} {samples} {size}" for name, samples, size in entry.shards).encode())
    return digest.hexdigest()
