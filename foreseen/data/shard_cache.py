"""Whole shards on a local disk, bounded in size, shared by all loader workers and ranks of a machine.

A shard is written as `NAME.part`, its size taken from the disk at once, and renamed when it is complete. Whoever reads
or writes a file holds a lock on it, and only a file without one is deleted, the one that was used longest ago first.
What is counted is what lies in the folder, so nothing needs repair after a kill: the system drops the locks of the
dead, and what they left half written is written anew or deleted.
"""

import errno
import fcntl
import os
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from foreseen.data.remote import RemoteStore
from foreseen.data.store import MAX_BYTES, Piece
from foreseen.errors import BadInput
from foreseen.files import locked

_PART = ".part"
_LOCK = ".lock"
_LOOK_AGAIN_S = 0.05


class CachedStore:
    """The files below a URL, each fetched whole when it is first needed.

    Args:
        remote: where they are.
        folder: of the cache; other sets and jobs may share it.
        set_key: names the set and its version, so that a set which was published anew is fetched anew.
        limit: most bytes in the folder.
        shard_bytes: size of every file that will be asked for.
        fetches_ahead: whether there is room for files that are only expected.
    """

    def __init__(
        self, remote: RemoteStore, folder: Path, set_key: str, limit: int, shard_bytes: dict[str, int],
        *, fetches_ahead: bool,
    ) -> None:  # fmt: skip
        self._remote, self._root, self._key = remote, folder, set_key
        self._limit, self._bytes, self._fetches_ahead = limit, shard_bytes, fetches_ahead
        self._folder = folder / set_key
        self._expected: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._told: set[str] = set()
        self._forgotten: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        facts = (self._remote, self._root, self._key, self._limit, self._bytes, self._fetches_ahead)
        return _cached_store, facts

    @property
    def place(self) -> str:
        """The URL, without its credentials."""
        return self._remote.place

    def pread(self, name: str, size: int, at: int) -> bytes:
        """See `Store`."""
        with self._held(name) as number:
            return os.pread(number, size, at)

    def read_many(self, pieces: Sequence[Piece]) -> Iterator[bytes | OSError]:
        """See `Store`: 64 MiB at a time, shard by shard, so that one shard is held at a time."""
        window: list[Piece] = []
        for piece in pieces:
            if window and sum(p.size for p in window) + piece.size > MAX_BYTES:
                yield from self._read_window(window)
                window = []
            window.append(piece)
        yield from self._read_window(window)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """See `Store`."""
        return self._remote.sizes(names)

    def describe_change(self, name: str, size: int) -> str | None:
        """See `Store`."""
        return self._remote.describe_change(name, size)

    def forget(self, name: str) -> None:
        """Drop a copy that may be damaged; once, since the shard itself may be."""
        if name not in self._forgotten:
            self._forgotten.add(name)
            with suppress(FileNotFoundError):
                os.unlink(self._folder / name)  # who reads it holds it, and is not disturbed

    def expect(self, names: Sequence[str]) -> None:
        """See `Store`: a thread fetches them, those that no other process is fetching."""
        if not self._fetches_ahead or self._told.issuperset(names):
            return
        new = [name for name in names if name not in self._told]
        self._told = set(names)
        for name in new[os.getpid() % len(new) :] + new[: os.getpid() % len(new)]:  # each worker begins at another
            self._expected.put(name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._fetch_expected, daemon=True)
            self._thread.start()

    def _fetch_expected(self) -> None:
        while True:
            name = self._expected.get()
            with suppress(BadInput, OSError):  # who needs the shard meets the fault again, and tells it
                self._fetch(name, waits=False)

    def _read_window(self, pieces: Sequence[Piece]) -> list[bytes]:
        found: dict[int, bytes] = {}
        for name in dict.fromkeys(piece.name for piece in pieces):
            with self._held(name) as number:
                found |= {row: os.pread(number, p.size, p.at) for row, p in enumerate(pieces) if p.name == name}
        return [found[row] for row in range(len(pieces))]

    @contextmanager
    def _held(self, name: str) -> Iterator[int]:
        """The descriptor of a shard that is here, and stays while it is held."""
        number = self._open(name)
        while number is None:
            self._fetch(name, waits=True)
            number = self._open(name)
        try:
            yield number
        finally:
            os.close(number)

    def _open(self, name: str) -> int | None:
        try:
            number = os.open(self._folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(number, fcntl.LOCK_SH)
        if os.fstat(number).st_nlink == 0:  # deleted before it was held
            os.close(number)
            return None
        os.utime(number)  # when it was last used
        return number

    def _fetch(self, name: str, *, waits: bool) -> None:
        """Bring a shard here, unless it is or another process does; `waits` for that one."""
        file, part = self._folder / name, self._folder / (name + _PART)
        if file.exists():
            return
        size = self._bytes[name]
        if size > self._limit:
            raise BadInput(
                f"data.cache_gb {self._limit / 1e9:g} is too small: the shard {name} alone has {size / 1e9:.3g} GB; "
                "raise it, or set data.fetch=range"
            )
        with _out_of_space(self._root), locked(part, waits=waits) as number:
            if number is None or file.exists():
                return
            self._reserve(number, part, size)
            self._download(number, name, size)
            with locked(self._root / _LOCK, waits=True):  # else who counts just then might see neither name
                os.replace(part, file)

    def _reserve(self, number: int, part: Path, size: int) -> None:
        """Take the space for a shard, when there is as much below the limit."""
        while True:
            with locked(self._root / _LOCK, waits=True):
                os.ftruncate(number, 0)
                if self._make_room(size):
                    if hasattr(os, "posix_fallocate"):  # else a full disk is met while writing
                        os.posix_fallocate(number, 0, max(size, 1))
                    os.ftruncate(number, size)
                    return
            time.sleep(_LOOK_AGAIN_S)  # all that is here is in use; no reader holds a shard while it waits for another

    def _make_room(self, size: int) -> bool:
        """Delete what was used longest ago until so many bytes fit; whether they do."""
        found = sorted(self._files(), key=lambda entry: entry[0])
        total = sum(length for _, length, _ in found)
        for _, length, path in found:
            if total + size <= self._limit:
                break
            if _delete_unused(path):
                total -= length
        return total + size <= self._limit

    def _files(self) -> Iterator[tuple[float, int, str]]:
        """Last use, size and path of everything in the cache."""
        for folder in os.scandir(self._root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder):
                with suppress(FileNotFoundError):
                    facts = entry.stat(follow_symlinks=False)
                    yield facts.st_mtime, facts.st_size, entry.path

    def _download(self, number: int, name: str, size: int) -> None:
        at = 0

        def begin_again() -> None:
            nonlocal at
            at = 0

        def take(chunk: bytes) -> None:
            nonlocal at
            if at + len(chunk) > size:
                raise BadInput(_ANOTHER_SIZE.format(place=self.place, name=name, size=size, found="more"))
            with _out_of_space(self._root):
                at += os.pwrite(number, chunk, at)

        self._remote.download(name, take, begin_again)
        if at != size:
            raise BadInput(_ANOTHER_SIZE.format(place=self.place, name=name, size=size, found=f"{at:,}"))


_ANOTHER_SIZE = (
    "{place}: shard {name} has changed: it has {found} bytes and not the {size:,} of the manifest; bring the old one "
    "back, and the same command goes on, or pack the set again for a new run"
)


def make_cache_folder(folder: Path, set_key: str) -> None:
    """Make the folders of a set's shards.

    Raises:
        BadInput: they cannot be written.
    """
    try:
        (folder / set_key).mkdir(parents=True, exist_ok=True)
        with open(folder / _LOCK, "ab"):
            pass
    except OSError as error:
        raise BadInput(f"data.cache_dir {folder} cannot be written ({error.strerror}): give another folder") from None


def _cached_store(
    remote: RemoteStore, folder: Path, set_key: str, limit: int, shard_bytes: dict[str, int], fetches_ahead: bool
) -> CachedStore:
    return CachedStore(remote, folder, set_key, limit, shard_bytes, fetches_ahead=fetches_ahead)


@contextmanager
def _out_of_space(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise BadInput(
            f"the disk of data.cache_dir {folder} is full ({error.strerror}): lower data.cache_gb, name another folder "
            "in data.cache_dir, or set data.fetch=range, which needs none"
        ) from None


def _delete_unused(path: str) -> bool:
    """Delete a file that nobody holds; whether it is gone."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except (BlockingIOError, FileNotFoundError):
        return False
    finally:
        os.close(number)
    return True
