"""Read single samples out of packed shards, by number, in any order.

Nothing is read in sequence and nothing is extracted: the index says where each picture lies in its tar, and one
`pread` fetches it. The index is memory-mapped, so all workers of a machine share the pages that they touch, and a set
of 100 million samples opens at once. Neither torch nor Pillow is needed here.

One index a split rather than one a shard: a large set has 100,000 shards, and opening as many small files takes longer
than all the rest of the start.
"""

import hashlib
import json
import os
import zlib
from bisect import bisect_right
from difflib import get_close_matches
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from foreseen.data.arrays import map_array
from foreseen.data.manifest import Split, read_manifest
from foreseen.errors import BadInput
from foreseen.files import open_regular
from foreseen.printable import printable

# Offsets in a tar are multiples of 512, so 32 bits of them reach 2 TB; crc32 0 means not known.
INDEX_ROW = np.dtype([("offset_512", "<u4"), ("size", "<u4"), ("crc32", "<u4")])
TAR_BLOCK = 512
MAX_BYTES = 64 << 20  # of one picture, encoded
_MAX_OPEN_SHARDS = 128
_MOST_CLASSES = 1_000_000  # a classifier of as many is larger than most backbones


class CorruptSample(ValueError):
    """The bytes of one sample are not what was packed, or are no picture; the message says which and why."""


class ShardSet:
    """One split of a packed set; `ShardSet.open` makes it.

    It may be sent to worker processes and used by several threads: the files are opened when first needed, at most 128
    at a time, and never share a file position.

    Attributes:
        path, split: what was opened.
        classes: class names, or None.
        mean, std: of each RGB channel in [0, 1], or None.
        labels: class number of every sample, [N] int32, -1 where unlabelled; None when the split has no labels.
        fingerprint: changes when the pictures do; not with the folder's place, the files' times or the labels.
    """

    def __init__(
        self, path: Path, split: str, entry: Split, classes: tuple[str, ...] | None, index: NDArray[Any], labels: Any
    ) -> None:
        self.path, self.split, self.classes = path, split, classes
        self.mean, self.std = entry.mean, entry.std
        self.labels: NDArray[np.int32] | None = labels
        self.fingerprint = _fingerprint(entry)
        self._shards = entry.shards
        self._starts = [0, *accumulate(shard.samples for shard in entry.shards)]
        self._index = index
        self._open_shard = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._open_file)

    @classmethod
    def open(cls, path: str | Path, split: str) -> Self:
        """Open one split of the packed set in a folder.

        Raises:
            BadInput: the folder is missing, empty or not a packed set, it has no such split, or its index is broken.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if (entry := manifest.splits.get(split)) is None:
            near = get_close_matches(split, manifest.splits, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            has = ", ".join(sorted(manifest.splits)) or "none"
            raise BadInput(f"{path} has no split {split!r}, it has {has}{hint}")
        index = map_array(path / entry.index, INDEX_ROW, entry.samples)
        labels = None if entry.labels is None else map_array(path / entry.labels, np.dtype("<i4"), entry.samples)
        return cls(path, split, entry, manifest.classes, index, labels)

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
            raise BadInput(
                f"split {self.split!r} of {self.path} has the label {largest:,}, and labels below {most:,} are what "
                + ("its classes have names for" if self.classes else "is believed")
                + ": pack the set again"
            )
        return most if self.classes else largest + 1

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the files itself: sending the object must not send a gigabyte of index.
        return (type(self).open, (self.path, self.split))

    def read(self, sample: int, *, max_bytes: int = MAX_BYTES) -> bytes:
        """The encoded picture of one sample, in [0, len).

        Its checksum is compared, which costs under 2 % of decoding it: nothing else notices a flipped bit.

        Args:
            sample: its number.
            max_bytes: of a picture that the index says is longer nothing is read.

        Raises:
            IndexError: there is no such sample.
            CorruptSample: the bytes differ from those packed, the shard ends before them, or they are too many.
            BadInput: the shard has gone.
        """
        shard = self._shard_of(sample)
        offset_512, size, crc32 = self._index[sample].item()
        if size > max_bytes:
            raise CorruptSample(f"{self.describe(sample)} has {size:,} bytes, more than the {max_bytes:,} allowed")
        data = self._pread(shard, size, offset_512 * TAR_BLOCK)
        if len(data) != size:
            raise CorruptSample(f"{self.describe(sample)} ends after {len(data)} of its {size} bytes")
        if crc32 and zlib.crc32(data) != crc32:
            raise CorruptSample(f"{self.describe(sample)} has changed since it was packed (crc32 differs)")
        return data

    def describe(self, sample: int) -> str:
        """Name a sample for a message: `train-000003.tar: sample 17 (key 000003017)`."""
        shard, key = self.place(sample)
        text = f"{shard}: sample {sample - self._starts[self._shard_of(sample)]}"
        return f"{text} (key {key})" if key else text

    def place(self, sample: int) -> tuple[str, str]:
        """The file name of a sample's shard and its key there, fit to be shown; no key where none can be read."""
        shard = self._shard_of(sample)
        name = printable(self._shards[shard].name)
        header_at = (int(self._index[sample]["offset_512"]) - 1) * TAR_BLOCK
        try:
            header = self._pread(shard, TAR_BLOCK, header_at)
        except (OSError, BadInput):  # it is asked for where something has already gone wrong
            return name, ""
        return name, printable(header[:100].split(b"\0")[0].decode(errors="replace").split(".")[0])

    def check_sizes(self) -> None:
        """Compare every shard on disk with the manifest: a stat each, no reading.

        Raises:
            BadInput: names the first shard that is missing or has another size, and counts them all.
        """
        wrong = []
        for shard in self._shards:
            try:
                size = os.stat(self.path / shard.name).st_size
            except FileNotFoundError:
                wrong.append(f"{shard.name} is missing")
                continue
            if size != shard.bytes:
                wrong.append(f"{shard.name} has {size:,} bytes and not the {shard.bytes:,} of the manifest")
        if wrong:
            rest = f" ({len(wrong)} of {len(self._shards)} shards are wrong)" if len(wrong) > 1 else ""
            raise BadInput(f"{self.path}: {wrong[0]}{rest}: copy or pack the split {self.split!r} again")

    def _shard_of(self, sample: int) -> int:
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not in [0, {len(self)}) of {self.path} {self.split}")
        return bisect_right(self._starts, sample) - 1

    def _pread(self, shard: int, size: int, at: int) -> bytes:
        file = self._open_shard(shard)  # held until the end, so that no other thread closes it meanwhile
        return os.pread(file.number, size, at)

    def _open_file(self, shard: int) -> "_Descriptor":
        file = self.path / self._shards[shard].name
        try:
            return _Descriptor(open_regular(file))
        except FileNotFoundError:
            raise BadInput(f"{file} is missing: copy or pack the split {self.split!r} again") from None


class _Descriptor:
    """An open file that closes when its last user lets go, which may be a thread later than the cache that held it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def index_digest(rows: NDArray[Any]) -> str:
    """The digest of an index that the manifest keeps and the fingerprint uses."""
    return hashlib.blake2b(np.ascontiguousarray(rows).view(np.uint8).data, digest_size=16).hexdigest()


def _fingerprint(entry: Split) -> str:
    digest = hashlib.blake2b(entry.index_digest.encode(), digest_size=16)
    digest.update("".join(f"\n{name} {samples} {size}" for name, samples, size in entry.shards).encode())
    return digest.hexdigest()
