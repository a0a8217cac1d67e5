"""Where each member lies in a tar, without reading the members.

One header of 512 bytes is read a member, which costs 3 microseconds: a tenth of what `tarfile` takes. Names and sizes
that do not fit there stand in a member of their own before it, a GNU long name or a PAX record, and are read too.

Tars come from strangers. `tarfile` takes the memory that a long name asks for, goes round and round where a size is
negative, and keeps a kilobyte a member; so headers are read here, with a bound on everything, and tests hold the result
to what `tarfile` finds in sound tars.
"""

import os
import re
import struct
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foreseen.errors import BadInput
from foreseen.files import open_regular

_BLOCK = 512
_HEADER = struct.Struct("100s 24x 12s 20x B 100x 6s 82x 155s 12x")  # name, size, kind, magic, prefix (POSIX ustar)
_WINDOW = 8 * _BLOCK  # a page: the json and the next header come with the header before them
_CHECKED_TOGETHER = 1024  # summing the bytes of one header in Python takes longer than all the rest
_SEARCHED_TOGETHER = 1 << 20
_END = bytes(_BLOCK)
_POSIX = b"ustar\0"  # GNU's own magic has a blank there, and times where POSIX has the prefix
_REGULAR = frozenset(b"0\x007")
_WITHOUT_DATA = {ord("1"): "link", ord("2"): "link", ord("3"): "device", ord("4"): "device", ord("5"): "folder"}
_WITHOUT_DATA[ord("6")] = "pipe"
_LONG_NAMES, _PAX, _PAX_FOR_ALL, _SPARSE = frozenset(b"LK"), frozenset(b"xX"), ord("g"), ord("S")
_LONGEST_NAME, _LONGEST_PAX = 64 << 10, 1 << 20  # xattrs and ACLs are PAX records, too
_COMPRESSED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")  # its first letters may begin a member's name: BZhang.jpg


class Member(NamedTuple):
    """A regular file in a tar: its name, where its bytes begin and how many they are."""

    name: str
    offset: int
    size: int


class Tar(NamedTuple):
    """What stands in a tar.

    Attributes:
        members: the regular files whose bytes are all there, in the order in which they stand.
        skipped: how many links, devices, folders, pipes and members of unknown kinds were passed over.
        problem: why the list ends before the tar should, in a sentence; None for a sound tar.
    """

    members: list[Member]
    skipped: dict[str, int]
    problem: str | None


def scan_tar(file: Path) -> list[Member]:
    """List the regular members of an uncompressed tar in the order in which they stand.

    Links, devices and folders are left out. Names are what the tar says: they are for looking up, never for opening.

    Raises:
        BadInput: compressed, truncated, damaged, with a sparse member, or not a tar.
    """
    tar = read_tar(file)
    if tar.problem is not None:
        raise BadInput(tar.problem)
    return tar.members


def read_tar(file: Path, *, salvage: bool = False) -> Tar:
    """The same for a tar that may end too early or be damaged: what stands before that.

    Args:
        file: the tar.
        salvage: go on behind a damaged header, at the next block that is a sound one.

    Raises:
        BadInput: it is missing, a folder, or compressed.
    """
    try:
        with os.fdopen(open_regular(file), "rb", buffering=0) as tar:
            if (compression := compression_of(tar.read(_BLOCK))) is not None:
                reason = f"{file} is compressed ({compression}), and its members cannot be reached singly"
                raise BadInput(f"{reason}: unpack it, or pack it with `foreseen data pack {file} OUT`")
            return _Walk(file, tar.fileno()).run(salvage=salvage)
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}): give a tar") from None


def compression_of(start: bytes) -> str | None:
    """How a file that begins with these bytes is compressed: gzip, bzip2, xz, zstd, or None."""
    if _BZIP2.match(start):
        return "bzip2"
    return next((kind for magic, kind in _COMPRESSED.items() if start.startswith(magic)), None)


class _Bad(Exception):
    """What is wrong with the header that is being read."""


class _Walk:
    """One pass from header to header."""

    def __init__(self, file: Path, descriptor: int) -> None:
        self.file, self.descriptor, self.end = file, descriptor, os.fstat(descriptor).st_size
        self.members: list[Member] = []
        self.skipped: Counter[str] = Counter()
        self.name: str | None  # from a long name or PAX record, for the member that follows
        self.size: int | None
        self._forget()

    def run(self, *, salvage: bool) -> Tar:
        problem, damaged_at = self._run_from(0)
        while salvage and damaged_at and (found := self._next_header(damaged_at + _BLOCK)) is not None:
            _, damaged_at = self._run_from(found)
        return Tar(self.members, dict(self.skipped), problem)

    def _run_from(self, at: int) -> tuple[str | None, int | None]:
        """Go from header to header; what stopped it before the end, and where the damage is that did, if any."""
        start = at
        problem: str | None = None
        self._forget()
        headers: list[bytes] = []  # whose checksums are still to be compared,
        places: list[tuple[int, int]] = []  # where they stand, and how many members stand before
        together = 1 if start else _CHECKED_TOGETHER  # behind one damage another may come soon
        window, window_at = b"", 0
        while True:
            header = window[at - window_at : at - window_at + _BLOCK]
            if len(header) < _BLOCK:
                window, window_at = os.pread(self.descriptor, _WINDOW, at), at
                header = window[:_BLOCK]
            if header == _END or (not header and start < at <= self.end):
                break
            if at > self.end:
                problem = f"{self.file} is truncated: it ends at byte {self.end:,}, its last member at {at:,}"
                break
            if len(header) < _BLOCK:
                problem = f"{self.file} is truncated or no tar: its header at byte {at:,} is cut off"
                break
            headers.append(header)
            places.append((at, len(self.members)))
            try:
                at = self._step(header, at)
            except _Bad as error:
                problem = f"{self.file} {error}"
                break
            if len(headers) >= together:
                if _first_wrong(headers) is not None:
                    break
                together = min(2 * together, _CHECKED_TOGETHER)
                headers.clear()
                places.clear()
        if self.name is not None or self.size is not None:
            problem = problem or f"{self.file} is truncated: a long name stands at its end, and no member"
        if (wrong := _first_wrong(headers)) is not None:  # what it led to means nothing
            at, before = places[wrong]
            del self.members[before:]
            what = "is no tar" if at == 0 else "is damaged"
            problem = f"{self.file} {what}: the checksum of its header at byte {at:,} is wrong"
            return problem, at
        return problem, None

    def _next_header(self, at: int) -> int | None:
        """The first block from here on that looks like a header and has the right checksum."""
        together = _WINDOW  # what is near is found by reading little, however often
        while blocks := os.pread(self.descriptor, together, at):
            together = min(2 * together, _SEARCHED_TOGETHER)
            for place in range(0, len(blocks) - _BLOCK + 1, _BLOCK):
                block = blocks[place : place + _BLOCK]
                if block[257:262] == b"ustar" and _first_wrong([block]) is None:
                    return at + place
            at += len(blocks) // _BLOCK * _BLOCK or len(blocks)
        return None

    def _step(self, header: bytes, at: int) -> int:
        """Take one header; where the next one stands."""
        name_field, size_field, kind, magic, prefix_field = _HEADER.unpack(header)
        begin = at + _BLOCK
        if kind in _WITHOUT_DATA or (kind == 0 and _text(name_field).endswith("/")):  # how very old tars mark a folder
            self.skipped[_WITHOUT_DATA.get(kind, "folder")] += 1
            self._forget()
            return begin
        size = _number(size_field)
        if kind in _REGULAR:
            size = size if self.size is None else self.size
            name = self.name
            if name is None:
                name = _text(name_field)
                if prefix_field[0] and magic == _POSIX:
                    name = f"{_text(prefix_field)}/{name}"
            self._forget()
            next_at = self._behind(begin, size, name)
            self.members.append(Member(name, begin, size))  # type: ignore[arg-type]  # _behind has refused None
            return next_at
        if kind == _SPARSE:
            raise _Bad("has a sparse member, whose bytes do not lie together: pack it again without --sparse")
        next_at = self._behind(begin, size, f"what stands at byte {at:,}")
        if kind in _LONG_NAMES:
            payload = self._payload(begin, size, _LONGEST_NAME, "a name")
            if kind == ord("L"):
                self._name_next(payload.split(b"\0", 1)[0])
        elif kind in _PAX:
            self._take_pax(self._payload(begin, size, _LONGEST_PAX, "a PAX header"))
        elif kind == _PAX_FOR_ALL:
            if (
                not _pax_records(self._payload(begin, size, _LONGEST_PAX, "a PAX header"))
                .keys()
                .isdisjoint((b"path", b"size"))
            ):
                raise _Bad("has a PAX header that gives all members one name or size: it is not one that a tool wrote")
        else:
            self.skipped["unknown"] += 1
            self._forget()
        return next_at

    def _forget(self) -> None:
        self.name = self.size = None

    def _behind(self, begin: int, size: int | None, name: str) -> int:
        if size is None:
            raise _Bad(f"is damaged: the size of {name[:200]!r} is no number of bytes")
        if begin + size > self.end:
            raise _Bad(f"is truncated: {name[:200]} should end at byte {begin + size:,}, the file has {self.end:,}")
        return begin + _in_blocks(size)

    def _payload(self, begin: int, size: int | None, limit: int, what: str) -> bytes:
        if size is None or size > limit:
            raise _Bad(f"has {what} of {size:,} bytes at byte {begin:,}, more than the {limit:,} allowed")
        # tarfile reads on to the end of the block, where a name has no NUL within its size: all readers see one name.
        return os.pread(self.descriptor, _in_blocks(size), begin)

    def _name_next(self, name: bytes) -> None:
        if self.name is not None:
            raise _Bad(f"gives one member two names, {self.name[:200]!r} and another: no tool writes that")
        self.name = name.decode("utf-8", "surrogateescape")

    def _take_pax(self, payload: bytes) -> None:
        records = _pax_records(payload)
        if any(key.startswith(b"GNU.sparse.") for key in records):
            raise _Bad("has a sparse member, whose bytes do not lie together: pack it again without --sparse")
        if (path := records.get(b"path")) is not None:
            self._name_next(path.split(b"\0", 1)[0])
        if (size := records.get(b"size")) is not None:
            if not size.isdigit() or len(size) > 20 or self.size is not None:
                raise _Bad(f"is damaged: a PAX header gives the size {size[:40].decode('ascii', 'replace')!r}")
            self.size = int(size)


def _in_blocks(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _pax_records(payload: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header, each `LENGTH KEY=VALUE\\n` with a length that counts all of it."""
    records, at = {}, 0
    while at < len(payload) and payload[at]:
        blank = payload.find(b" ", at, at + 8)
        digits = payload[at:blank] if blank > at else b""
        end = at + int(digits) if digits.isdigit() else at
        if not blank < end <= len(payload) or payload[end - 1 : end] != b"\n":
            raise _Bad("is damaged: a PAX header in it makes no sense")
        key, _, value = payload[blank + 1 : end - 1].partition(b"=")
        records[key] = value
        at = end
    return records


def _first_wrong(headers: list[bytes]) -> int | None:
    """The first header whose checksum is not the sum of its bytes, its own field counted as blanks."""
    if not headers:
        return None
    table = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, _BLOCK)
    rest = 8 * 32 - table[:, 148:156].sum(1, dtype=np.int32)
    sums: list[int] = (table.sum(1, dtype=np.int32) + rest).tolist()
    stated = [_number(header[148:156]) for header in headers]
    if sums == stated:
        return None
    # Very old writers summed signed bytes.
    signed: list[int] = (table.view(np.int8).sum(1, dtype=np.int32) + rest).tolist()
    fits = [value in pair for value, *pair in zip(stated, sums, signed, strict=True)]
    return None if all(fits) else fits.index(False)


@lru_cache(maxsize=4096)  # checksums repeat: they differ by digits of names
def _number(field: bytes) -> int | None:
    """Octal digits, or GNU's base 256; None for what is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.split(b"\0", 1)[0].strip(b" ")
    if not text:
        return 0
    return int(text, 8) if text.isdigit() and not text.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
