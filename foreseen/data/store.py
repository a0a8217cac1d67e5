"""Where the bytes of shards come from: the few questions that a reader asks of a folder, an object store or a cache.

A store knows names and bytes, and nothing of samples. It is sent to worker processes, so it opens what it needs when it
is first asked.
"""

import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from foreseen.errors import BadInput
from foreseen.files import open_regular

MAX_BYTES = 64 << 20  # of one member that is taken into memory
_MAX_OPEN_SHARDS = 128


class Piece(NamedTuple):
    """So many bytes of a file, from a place on."""

    name: str
    size: int
    at: int


class Store(Protocol):
    """The files of one folder, wherever it lies."""

    @property
    def place(self) -> str:
        """How a person calls it; without credentials."""

    def pread(self, name: str, size: int, at: int) -> bytes:
        """Bytes of a file; fewer where it ends before.

        Raises:
            BadInput: there is no such file, or it cannot be reached.
            OSError: a local disk failed.
        """

    def read_many(self, pieces: Sequence[Piece]) -> Iterator[bytes | OSError]:
        """The pieces in their order, fetched ahead where waiting for one after another would be slow."""

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """The size of each file now, -1 for one that is not there; None where asking for so many would take too long.

        Raises:
            BadInput: the place cannot be reached.
        """

    def describe_change(self, name: str, size: int) -> str | None:
        """What became of a file of `size` bytes since this store was made, in words; None if nothing did."""

    def forget(self, name: str) -> None:
        """Be told that what was read was not what it should be: the next reading takes nothing from a copy."""

    def expect(self, names: Sequence[str]) -> None:
        """Be told which files are needed soon; a store may fetch them meanwhile."""


class LocalStore:
    """A folder. Files are opened when first needed, at most 128 at a time, and never share a file position."""

    def __init__(self, folder: Path, *, made_at: float | None = None) -> None:
        self.folder = folder
        self._made_at = time.time() if made_at is None else made_at
        self._open = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._open_file)

    def __reduce__(self) -> tuple[Any, ...]:
        return _local_store, (self.folder, self._made_at)

    @property
    def place(self) -> str:
        """The folder's path."""
        return str(self.folder)

    def pread(self, name: str, size: int, at: int) -> bytes:
        """See `Store`."""
        file = self._open(name)  # held until the end, so that no other thread closes it meanwhile
        return os.pread(file.number, size, at)

    def read_many(self, pieces: Sequence[Piece]) -> Iterator[bytes | OSError]:
        """See `Store`; nothing is read before it is asked for."""
        for name, size, at in pieces:
            try:
                yield self.pread(name, size, at)
            except OSError as error:
                yield error

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """See `Store`."""
        found: list[int | None] = []
        for name in names:
            try:
                found.append(os.stat(self.folder / name).st_size)
            except FileNotFoundError:
                found.append(-1)
        return found

    def describe_change(self, name: str, size: int) -> str | None:
        """See `Store`."""
        try:
            now = os.stat(self.folder / name)
            then = os.fstat(self._open(name).number)
        except (FileNotFoundError, BadInput):
            return "it is no longer there"
        if now.st_size != size:
            return f"it has {now.st_size:,} bytes and not the {size:,} that were packed"
        if now.st_ino != then.st_ino or now.st_mtime > self._made_at:
            written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now.st_mtime))
            return f"another file of the same size has taken its place, last written at {written}"
        return None

    def forget(self, name: str) -> None:
        """See `Store`; there is no copy."""

    def expect(self, names: Sequence[str]) -> None:
        """See `Store`; a disk needs no telling."""

    def _open_file(self, name: str) -> "Descriptor":
        try:
            return Descriptor(open_regular(self.folder / name))
        except FileNotFoundError:
            raise BadInput(f"{self.folder / name} is missing: copy or pack the set again") from None


class Descriptor:
    """An open file that closes when its last user lets go, which may be a thread later than the cache that held it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _local_store(folder: Path, made_at: float) -> LocalStore:
    return LocalStore(folder, made_at=made_at)
