"""Everything that can be wrong with one shard, looked for by one worker process of `foreseen data check`.

Nothing that a shard holds is trusted: members are looked up by their place, sizes are compared before anything is read,
pictures go through `decode`, jsons are parsed, and whatever else there is stays closed.
"""

import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.decode import MAX_PIXELS, DecodeError, decode
from foreseen.data.shards import TAR_BLOCK
from foreseen.data.store import MAX_BYTES
from foreseen.data.tar_labels import BadMember, LabelRule, read_json, read_label
from foreseen.data.tar_samples import Fault, TarSamples, group_members
from foreseen.data.tars import read_tar
from foreseen.errors import BadInput

_MOST_MEMBER_SETS = 1000


@dataclass(frozen=True)
class CheckJob:
    """A shard to check.

    Attributes:
        file: the tar.
        samples, bytes: what the manifest says of it.
        rows: of the index; None for a tar without one, whose structure alone is checked.
        labels: class number of each sample, [N], or None.
        rule: where labels stand in the tar.
        classes: names of the classes, or None.
        image: extension of the pictures; None for the first picture of each sample.
        is_ours: written by `pack`, which promises more than others do.
        decode: decode every picture.
    """

    file: Path
    samples: int
    bytes: int
    rows: NDArray[Any] | None
    labels: NDArray[np.int32] | None
    rule: LabelRule
    classes: tuple[str, ...] | None
    image: str | None
    is_ours: bool
    decode: bool


@dataclass
class CheckedShard:
    """What was found in a shard.

    Attributes:
        samples, bytes: that are there.
        faults: all of them.
        keys: a hash of the key of each sample.
        crc32: of the picture of each row of the index, 0 where it could not be read.
        digests: size and crc32 of each picture in one number, 0 where it could not be read.
        member_sets: for every set of extensions how many samples have it, and the key of the first.
        passed_over: members that are never opened, by what they are.
    """

    samples: int = 0
    bytes: int = 0
    faults: list[Fault] = field(default_factory=list)
    keys: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    crc32: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    digests: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    member_sets: dict[tuple[str, ...], tuple[int, str]] = field(default_factory=dict)
    passed_over: dict[str, int] = field(default_factory=dict)


def check_shard(job: CheckJob) -> CheckedShard:
    """Find what is wrong with one shard."""
    found = CheckedShard()
    if job.rows is not None:
        found.crc32 = np.zeros(job.samples, dtype=np.uint32)
        found.digests = np.zeros(job.samples, dtype=np.uint64)
    try:
        found.bytes = job.file.stat().st_size
        tar = read_tar(job.file, salvage=True)
    except FileNotFoundError:
        found.faults.append(Fault("missing", "", "the shard is missing"))
        return found
    except BadInput as error:
        found.faults.append(Fault("no tar", "", str(error)))
        return found
    if job.rows is not None and found.bytes != job.bytes:
        reason = f"it has {found.bytes:,} bytes and not the {job.bytes:,} of the manifest"
        found.faults.append(Fault("size", "", reason))
    if tar.problem is not None:
        reason = f"it {tar.problem.removeprefix(f'{job.file} ')}"
        found.faults.append(Fault("truncated" if "truncated" in reason else "damaged", "", reason))
    samples = group_members(tar)
    found.samples = len(samples.keys)
    found.keys = _hash_keys(samples.keys)
    found.member_sets = _member_sets(samples)
    found.passed_over = samples.passed_over()
    found.faults += samples.faults(job.image)
    if job.rows is not None:
        _check_members(job, samples, found)
    return found


def _check_members(job: CheckJob, samples: TarSamples, found: CheckedShard) -> None:
    """Compare the index with the headers, and read every sample."""
    assert job.rows is not None
    pictures = samples.pictures(job.image)
    pictures = pictures[pictures >= 0]
    rows = _rows_of(job.rows, samples.offset[pictures], samples.size[pictures])
    if lost := len(job.rows) - int((rows >= 0).sum()):
        reason = f"{lost:,} of the {len(job.rows):,} pictures that the index has are not where it says"
        found.faults.append(Fault("index", "", reason))
    if more := int((rows < 0).sum()):
        key = samples.keys[samples.sample[pictures[int(np.argmax(rows < 0))]]]
        found.faults.append(Fault("index", key, f"{more:,} pictures are not in the index, this the first"))
    if (np.diff(rows[rows >= 0]) <= 0).any():
        found.faults.append(Fault("index", "", "its pictures stand in another order than in the index"))
    with open(job.file, "rb", buffering=0) as tar:
        for row, picture in zip(rows.tolist(), pictures.tolist(), strict=True):
            label = None if job.labels is None or row < 0 else int(job.labels[row])
            sample = _Sample(job, samples, tar.fileno(), int(samples.sample[picture]))
            crc32 = sample.check(picture, 0 if row < 0 else int(job.rows[row]["crc32"]), label, has_row=row >= 0)
            found.faults += sample.faults
            if row >= 0:
                found.crc32[row] = crc32
                found.digests[row] = int(samples.size[picture]) << 32 | crc32


def _rows_of(rows: NDArray[Any], offset: NDArray[np.int64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of the index that each picture has, -1 where it has none."""
    if not len(rows):
        return np.full(len(offset), -1, dtype=np.int64)
    stated = rows["offset_512"].astype(np.int64) * TAR_BLOCK
    order = np.argsort(stated, kind="stable")
    found = order[np.searchsorted(stated[order], offset).clip(max=len(rows) - 1)]
    return np.where((stated[found] == offset) & (rows["size"][found] == size), found, -1)


class _Sample:
    """One sample, and what is wrong with it."""

    def __init__(self, job: CheckJob, samples: TarSamples, tar: int, number: int) -> None:
        self.job, self.samples, self.tar, self.number = job, samples, tar, number
        self.key = samples.keys[number]
        members = samples.members_of(number)[::-1]  # of the same extension twice the first counts
        self.members = {samples.extensions[samples.extension[member]]: member for member in members}
        self.faults: list[Fault] = []

    def check(self, picture: int, stated: int, label: int | None, *, has_row: bool) -> int:
        """Look at all members that are read; the crc32 of the picture, 0 where it cannot be read."""
        size = int(self.samples.size[picture])
        if size > MAX_BYTES:
            self._say("picture", f"it has {size:,} bytes, more than the {MAX_BYTES:,} allowed")
            return 0
        data = self._read(picture)
        crc32 = zlib.crc32(data)
        pixels: tuple[int, int] | None = None
        if stated and crc32 != stated:
            self._say("checksum", "its picture is not the one that was packed or indexed (crc32 differs)")
        elif self.job.decode:
            with self._faults("picture"):
                height, width = decode(data, fast=False).shape[:2]
                pixels = (width, height)
        self._check_json(pixels, label, has_row=has_row)
        self._check_label(label)
        if self.job.is_ours:
            for extension, member in self.members.items():
                if extension.endswith(".png"):
                    self._check_mask(extension, member, pixels)
        return crc32

    def _check_json(self, pixels: tuple[int, int] | None, label: int | None, *, has_row: bool) -> None:
        if "json" not in self.members:
            return
        member = self.members["json"]
        with self._faults("json"):
            facts = read_json(self.tar, int(self.samples.offset[member]), int(self.samples.size[member]))
            if not self.job.is_ours:
                return
            stated = (facts.get("width"), facts.get("height"))
            if pixels is not None and stated != pixels:
                raise BadMember(
                    f"its json says {stated[0]} x {stated[1]} pixels, the picture has {pixels[0]} x {pixels[1]}"
                )
            if has_row and (self.job.labels is not None or facts.get("label") is not None):
                expected = None if label is None or label < 0 else label
                if facts.get("label") != expected:
                    raise BadMember(f"its json has the label {facts.get('label')!r}, the labels file {expected}")

    def _check_label(self, label: int | None) -> None:
        """The labels file against the number of classes, and for tars of others against what stands in the tar."""
        if label is None:
            return
        classes = self.job.classes
        if label < -1 or (classes is not None and label >= len(classes)):
            self._say("label", f"its label is {label}, and there are {len(classes or ())} classes")
            return
        rule = self.job.rule
        if self.job.is_ours or rule.extension is None:
            return
        with self._faults("label"):
            if (member := self.members.get(rule.extension)) is None:
                raise BadMember(f"it has no member {rule.extension}, from which labels were read")
            text = read_label(self.tar, self.samples, member, rule)
            known = {None} if label < 0 else {str(label), None if classes is None else classes[label]}
            if text not in known:
                raise BadMember(f"its label in the tar is {text!r}, in the labels file {label}")

    def _check_mask(self, extension: str, member: int, pixels: tuple[int, int] | None) -> None:
        with self._faults("mask"):
            if (size := int(self.samples.size[member])) > MAX_BYTES:
                raise BadMember(f"{extension} has {size:,} bytes, more than the {MAX_BYTES:,} allowed")
            try:
                with Image.open(io.BytesIO(self._read(member)), formats=("PNG",)) as mask:
                    if pixels is not None and mask.size != pixels:
                        raise BadMember(
                            f"{extension} is {mask.width} x {mask.height} pixels, the picture {pixels[0]} x {pixels[1]}"
                        )
                    if mask.width * mask.height > MAX_PIXELS:
                        raise BadMember(f"{extension} is {mask.width} x {mask.height} pixels, more than allowed")
                    if self.job.decode:
                        mask.load()
            except (BadMember, MemoryError):
                raise
            except Exception as error:  # Pillow's plugins raise nearly everything on malformed input
                raise BadMember(f"{extension}: {error}") from None

    def _read(self, member: int) -> bytes:
        return os.pread(self.tar, int(self.samples.size[member]), int(self.samples.offset[member]))

    @contextmanager
    def _faults(self, kind: str) -> Iterator[None]:
        try:
            yield
        except (BadMember, DecodeError) as error:
            self._say(kind, str(error))

    def _say(self, kind: str, reason: str) -> None:
        self.faults.append(Fault(kind, self.key, reason))


def _hash_keys(keys: Any) -> NDArray[np.uint64]:
    digests = (hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest() for key in keys)
    return np.frombuffer(b"".join(digests), dtype=np.uint64)


def _member_sets(samples: TarSamples) -> dict[tuple[str, ...], tuple[int, str]]:
    _, first, counts = np.unique(samples.member_sets, return_index=True, return_counts=True)
    found = {}
    for number, count in list(zip(first.tolist(), counts.tolist(), strict=True))[:_MOST_MEMBER_SETS]:
        found[tuple(sorted(set(samples.extensions_of(number))))] = (count, samples.keys[number])
    return found
