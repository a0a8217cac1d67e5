"""Where each member lies in a tar, without reading the members.

Reading one 512-byte header a member costs 3 microseconds; `tarfile` takes ten times that, and is asked only where a
header is not a plain ustar one (GNU long names, PAX records, sizes of 8 GB and more).
"""

import os
import struct
import tarfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from foreseen.errors import BadInput
from foreseen.files import open_regular

_BLOCK = 512
_HEADER = struct.Struct("100s 24x 12s 20x B 100x 5s 83x 155s 12x")  # name, size, kind, magic, prefix (POSIX ustar)
_WINDOW = 8 * _BLOCK  # a page: the json and the next header come with the header before them
_CHECKED_TOGETHER = 1024  # summing the bytes of one header in Python takes longer than all the rest
_END = bytes(_BLOCK)
_REGULAR = frozenset(b"0\0")
_WITHOUT_DATA = frozenset(b"123456")  # hard and symbolic links, devices, folders, pipes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SPARSE = "{file} has a sparse member, whose bytes do not lie together: pack it again without --sparse"
_TRUNCATED = "{file} is truncated: {name} should end at byte {end:,}, the file has {size:,}"


class Member(NamedTuple):
    """A regular file in a tar: its name, where its bytes begin and how many they are."""

    name: str
    offset: int
    size: int


def scan_tar(file: Path) -> list[Member]:
    """List the regular members of an uncompressed tar in the order in which they stand.

    Links, devices and folders are left out. Names are what the tar says: they are for looking up, never for opening.

    Raises:
        BadInput: compressed, truncated, with a sparse member, or not a tar.
    """
    with os.fdopen(open_regular(file), "rb", buffering=0) as tar:
        start = tar.read(_BLOCK)
        for magic, kind in _COMPRESSED.items():
            if start.startswith(magic):
                raise BadInput(f"{file} is compressed ({kind}), and its members cannot be reached singly: unpack it")
        members = _scan_headers(file, tar.fileno())
    return _scan_with_tarfile(file) if members is None else members


def _scan_headers(file: Path, descriptor: int) -> list[Member] | None:
    """The members, or None where a header needs `tarfile`."""
    end, at = os.fstat(descriptor).st_size, 0
    members: list[Member] = []
    headers: list[bytes] = []  # whose checksums are still to be compared
    window, window_at, problem = b"", 0, ""
    while not problem:
        header = window[at - window_at : at - window_at + _BLOCK]
        if len(header) < _BLOCK:
            window, window_at = os.pread(descriptor, _WINDOW, at), at
            header = window[:_BLOCK]
        if header == _END or (not header and members):
            break
        if len(header) < _BLOCK:
            problem = f"{file} is truncated or no tar: its header at byte {at:,} is cut off"
            break
        headers.append(header)
        name_field, size_field, kind, magic, prefix_field = _HEADER.unpack(header)
        size = _octal(size_field)
        if (kind not in _REGULAR and kind not in _WITHOUT_DATA) or size is None:
            return None  # tarfile knows other kinds and other encodings of numbers
        if len(headers) == _CHECKED_TOGETHER:
            if not _checksums_fit(headers):
                return None
            headers.clear()
        if kind in _WITHOUT_DATA:
            at += _BLOCK
            continue
        name = _text(name_field)
        if prefix_field[0] and magic == b"ustar":
            name = f"{_text(prefix_field)}/{name}"
        begin = at + _BLOCK
        at = begin + -(-size // _BLOCK) * _BLOCK
        if begin + size > end:
            problem = _TRUNCATED.format(file=file, name=name, end=begin + size, size=end)
        elif not name.endswith("/"):  # how very old tars mark a folder
            members.append(Member(name, begin, size))
    if not _checksums_fit(headers):
        return None  # tarfile words its errors
    if problem:
        raise BadInput(problem)
    return members


def _checksums_fit(headers: list[bytes]) -> bool:
    """Whether each header's checksum is the sum of its bytes, its own field counted as blanks."""
    table = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, _BLOCK)
    sums = table.sum(1, dtype=np.uint32) - table[:, 148:156].sum(1, dtype=np.uint32) + 8 * 32
    totals: list[int | None] = sums.tolist()
    return totals == [_octal(header[148:156]) for header in headers]


def _scan_with_tarfile(file: Path) -> list[Member]:
    size = file.stat().st_size
    members = []
    try:
        with tarfile.open(file, "r:") as tar:
            for info in tar:
                if info.issparse():
                    raise BadInput(_SPARSE.format(file=file))
                if info.size < 0:  # numbers in base 256 have a sign, and tarfile would go back by it, for ever
                    raise BadInput(f"{file} is no tar that can be read: {info.name} has {info.size} bytes")
                if not info.isreg():
                    continue
                if (end := info.offset_data + info.size) > size:
                    raise BadInput(_TRUNCATED.format(file=file, name=info.name, end=end, size=size))
                members.append(Member(info.name, info.offset_data, info.size))
    except tarfile.TarError as error:
        raise BadInput(f"{file} is no tar that can be read: {error}") from None
    return members


@lru_cache(maxsize=4096)  # checksums repeat: they differ by digits of names
def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    if not text:
        return 0
    return int(text, 8) if text.isdigit() and not text.strip(b"01234567") else None


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")
