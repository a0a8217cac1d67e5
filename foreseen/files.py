"""Files that are there whole or not at all, whatever happens to the process or the machine; and reading with care.

A path may lead to a pipe, on which opening waits for ever, or to a device, which never ends; a text may be larger than
memory, or nested deeper than any parser goes.
"""

import fcntl
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from foreseen.errors import BadInput

MAX_JSON_BYTES = 64 << 20  # a manifest of half a million shards
MAX_LINE = 1 << 20  # characters in a line of a table or a list


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write or replace a file so that a reader, or a crash, sees the old or the new one whole."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(part, "wb") as out:
        out.write(content.encode() if isinstance(content, str) else content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expand_home(path: str | Path) -> Path:
    """A path with the home folder in the place of `~`; as it is where there is no such user."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:  # a zero byte in the user's name
        return Path(path)


def open_regular(file: str | Path) -> int:
    """A descriptor for reading a regular file, or what a link to one leads to.

    Raises:
        BadInput: it is a folder, a pipe, a socket or a device.
        OSError: it cannot be opened.
    """
    refused = f"{file} is no regular file: pipes, devices and folders are not read"
    if not stat.S_ISREG(os.stat(file).st_mode):  # opening is an act already: tapes rewind
        raise BadInput(refused)
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # else a pipe put there now would hang
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadInput(refused)
    return descriptor


def sha256_of(file: str | Path) -> str:
    """The checksum of a regular file, as hexadecimal digits.

    Raises:
        BadInput: it is no regular file.
        OSError: it cannot be read.
    """
    with os.fdopen(open_regular(file), "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_text(file: Path, *, max_bytes: int = MAX_JSON_BYTES) -> str:
    """A small file of UTF-8 text.

    Raises:
        BadInput: it is no regular file, or larger.
        OSError: it cannot be read.
        UnicodeDecodeError: it is not UTF-8.
    """
    with os.fdopen(open_regular(file), "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > max_bytes:
            raise BadInput(f"{file} has {size:,} bytes, more than the {max_bytes:,} that such a file may have")
        return opened.read(max_bytes).decode()


def read_json(file: Path, *, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """What a small JSON file holds.

    Raises:
        BadInput: it is no regular file, larger, or no JSON.
        OSError: it cannot be read.
    """
    try:
        return parse_json(read_text(file, max_bytes=max_bytes))
    except ValueError as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{file} is no JSON that can be read: {error}") from None


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds; ValueError where it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def bounded_lines(text: IO[str], file: Path) -> Iterator[str]:
    """The lines of a text, each with its end; none is read that is longer than 1,048,576 characters.

    Raises:
        BadInput: there is such a line.
    """
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith("\n"):
            raise BadInput(f"{file} has a line of more than {MAX_LINE:,} characters: it is no table or list")
        yield line


@contextmanager
def locked(file: Path, *, waits: bool) -> Iterator[int | None]:
    """A file, made if need be, that no other process holds; None where one does and `waits` is False."""
    while True:
        number = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(number, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            if _is_at(file, number):
                yield number
                return
        finally:
            os.close(number)
        if not waits:  # it was renamed or deleted meanwhile
            yield None
            return


def _is_at(file: Path, number: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(number))
    except FileNotFoundError:
        return False
