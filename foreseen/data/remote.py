"""Shards behind a URL, through fsspec: many ranged reads at a time, faults that pass waited for, the rest a sentence.

Everything a file system needs is made in the process that uses it, at its first request: an event loop and its
connections do not survive being sent to a worker.
"""

import asyncio
import importlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cached_property, lru_cache
from typing import Any, BinaryIO, TypeVar

import fsspec
from fsspec.asyn import sync

from foreseen.data import network_faults
from foreseen.data.network_faults import may_pass, refusal
from foreseen.data.store import MAX_BYTES, Piece
from foreseen.data.urls import PROTOCOLS, join, protocol_of
from foreseen.errors import BadInput
from foreseen.masked import masked

T = TypeVar("T")
_GONE = (FileNotFoundError, PermissionError)

_IN_EXTRA = ("s3fs", "gcsfs", "aiohttp")  # of `pip install foreseen[remote]`
_CONNECT_S, _READ_S, _ANSWER_S = 10.0, 30.0, 120.0  # for a connection, the next bytes, and a whole answer
_AT_ONCE = 64  # requests under way in one process
_BLOCK = 8 << 20  # of a file that is fetched whole
_ASKED_SIZES = 256  # of files that cannot be listed


class RemoteStore:
    """The files below a URL.

    Args:
        url: of the folder; checked by `check_url`.
        options: of fsspec's file system, such as `endpoint_url`.
        made_at: when the run began to read, in seconds since 1970; a file written later has changed under it.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, made_at: float | None = None) -> None:
        self.url = url
        self._options = dict(options or {})
        self._made_at = time.time() if made_at is None else made_at
        self._ranges: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self.url, self._options, self._made_at)

    @property
    def place(self) -> str:
        """The URL without its credentials."""
        return masked(self.url)

    def pread(self, name: str, size: int, at: int) -> bytes:
        """See `Store`."""
        (data,) = self._fetch([Piece(name, size, at)])
        return data

    def read_many(self, pieces: Sequence[Piece]) -> Iterator[bytes | OSError]:
        """See `Store`: up to 64 requests and 64 MiB are under way at a time."""
        window: list[Piece] = []
        for piece in pieces:
            if window and (len(window) == _AT_ONCE or sum(p.size for p in window) + piece.size > MAX_BYTES):
                yield from self._fetch(window)
                window = []
            window.append(piece)
        if window:
            yield from self._fetch(window)

    def sizes(self, names: Sequence[str]) -> list[int | None]:
        """See `Store`. A bucket is listed; of a server that lists nothing, at most 256 files are asked for."""
        if self._protocol not in ("http", "https"):
            try:
                listed = self._wait_for(self.url, lambda: self._files._ls(self.url, detail=True))
            except BadInput as error:
                if not isinstance(error.__cause__, PermissionError):  # else reading is allowed and listing is not
                    raise
            else:
                found = {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in listed}
                return [found.get(name, -1) for name in names]
        asked = range(0, len(names), max(1, -(-len(names) // _ASKED_SIZES)))
        sizes: list[int | None] = [None] * len(names)
        for row, size in zip(asked, self._sizes_of([names[row] for row in asked]), strict=True):
            sizes[row] = size
        return sizes

    def size(self, name: str) -> int | None:
        """The size of a file now, -1 if it is not there; None where the server does not say."""
        return self._sizes_of([name])[0]

    def describe_change(self, name: str, size: int) -> str | None:
        """See `Store`."""
        (info,) = self._infos([name])
        if info is None:
            return "it is no longer there"
        if info["size"] not in (size, None):
            return f"it has {info['size']:,} bytes and not the {size:,} that were packed"
        written = _seconds(info.get("LastModified") or info.get("mtime") or info.get("updated"))
        if written is not None and written > self._made_at:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(written))
            tag = f", ETag {info['ETag']}" if info.get("ETag") else ""
            return f"another file of the same size has taken its place, last written at {when}{tag}"
        return None

    def forget(self, name: str) -> None:
        """See `Store`; nothing is kept here."""

    def expect(self, names: Sequence[str]) -> None:
        """See `Store`; ranged reads need no telling."""

    def has_ranges(self, name: str) -> bool:
        """Whether the server gives parts of a file; object stores do. Asked once, of any file."""
        if self._ranges is None:
            url = join(self.url, name)
            is_http = self._protocol in ("http", "https")
            self._ranges = not is_http or bool(self._wait_for(url, lambda: self._files.has_ranges(url)))
        return self._ranges

    def download(self, name: str, take: Callable[[bytes], object], begin_again: Callable[[], object]) -> None:
        """Hand over a whole file.

        Args:
            name: of the file.
            take: called with each chunk, in order.
            begin_again: called where a fault makes the file begin anew.

        Raises:
            BadInput: it is not there, or cannot be fetched.
        """
        url = join(self.url, name)
        size = self.size(name)
        if size == -1:
            raise refusal(url, FileNotFoundError(url), 1, 0.0)
        if size is None or not self.has_ranges(name):

            async def stream() -> None:
                begin_again()
                await self._files.stream(url, take)

            self._wait_for(url, stream, patience_s=None)
            return
        begin_again()
        starts = range(0, size, _BLOCK)
        for chunk in self.read_many([Piece(name, min(_BLOCK, size - at), at) for at in starts]):
            assert isinstance(chunk, bytes)
            take(chunk)

    def read_whole(self, name: str, limit: int) -> bytes:
        """A small file.

        Raises:
            FileNotFoundError: it is not there.
            BadInput: it has more than `limit` bytes, or cannot be fetched.
        """
        if self.size(name) == -1:
            raise FileNotFoundError(join(self.url, name))
        content = bytearray()

        def take(chunk: bytes) -> None:
            content.extend(chunk)
            if len(content) > limit:
                raise BadInput(f"{masked(join(self.url, name))} has more than {limit:,} bytes: it is no file of a set")

        self.download(name, take, content.clear)
        return bytes(content)

    @cached_property
    def _protocol(self) -> str:
        return protocol_of(self.url)

    @cached_property
    def _files(self) -> Any:
        return _file_system(self._protocol, self._options)

    def _fetch(self, window: Sequence[Piece]) -> list[bytes]:
        """All pieces at once; those that failed or came short are asked for again, a little later."""
        found = {row: b"" for row, piece in enumerate(window) if not piece.size}
        fault, failed, began = Exception(), "", time.monotonic()
        for tries, wait_s in enumerate((0.0, *network_faults.WAITS_S), start=1):
            time.sleep(wait_s)
            left = [row for row in range(len(window)) if row not in found]
            for row, answer in zip(left, self._ask([window[row] for row in left]), strict=True):
                if isinstance(answer, bytes) and self._is_whole(window[row], answer):
                    found[row] = answer
                    continue
                failed = join(self.url, window[row].name)
                fault = ConnectionError(f"{len(answer):,} bytes came") if isinstance(answer, bytes) else answer
                if not may_pass(fault):
                    if not isinstance(fault, _GONE) and self._is_whole(window[row], b""):
                        found[row] = b""  # object stores refuse a range that begins behind the end
                        continue
                    raise refusal(failed, fault, tries, time.monotonic() - began) from fault
            if len(found) == len(window):
                return [data for _, data in sorted(found.items())]
        raise refusal(failed, fault, len(network_faults.WAITS_S) + 1, time.monotonic() - began) from fault

    def _ask(self, pieces: Sequence[Piece]) -> list[bytes | Exception]:
        urls = [join(self.url, piece.name) for piece in pieces]
        starts, ends = [piece.at for piece in pieces], [piece.at + piece.size for piece in pieces]
        try:
            answers: list[bytes | Exception] = sync(
                self._files.loop, self._files._cat_ranges, urls, starts, ends, batch_size=_AT_ONCE, timeout=_ANSWER_S
            )
        except Exception as error:  # of all of them, such as that no credentials are found
            return [error] * len(pieces)
        return answers

    def _is_whole(self, piece: Piece, data: bytes) -> bool:
        """Whether an answer is all there is: short ones are, where the file has become shorter."""
        if len(data) >= piece.size:
            return len(data) == piece.size
        size = self.size(piece.name)
        return size is not None and size < piece.at + piece.size

    def _sizes_of(self, names: Sequence[str]) -> list[int | None]:
        return [-1 if info is None else info["size"] for info in self._infos(names)]

    def _infos(self, names: Sequence[str]) -> list[dict[str, Any] | None]:
        """What the server says of files; None for one that is not there."""

        async def one(url: str) -> dict[str, Any] | None:
            try:
                info: dict[str, Any] = await self._files._info(url)
            except FileNotFoundError:
                return None
            return None if info["type"] == "directory" else info

        async def all_of(urls: list[str]) -> list[dict[str, Any] | None]:
            return await asyncio.gather(*map(one, urls))

        found: list[dict[str, Any] | None] = []
        for first in range(0, len(names), _AT_ONCE):
            urls = [join(self.url, name) for name in names[first : first + _AT_ONCE]]
            found += self._wait_for(urls[0], lambda urls=urls: all_of(urls))  # type: ignore[misc]
        return found

    def _wait_for(self, url: str, make: Callable[[], Awaitable[T]], patience_s: float | None = _ANSWER_S) -> T:
        """The result of a coroutine that asks the server, made anew while its faults may pass."""
        began = time.monotonic()
        for tries, wait_s in enumerate((*network_faults.WAITS_S, None), start=1):
            try:
                answer: T = sync(self._files.loop, make, timeout=patience_s)
                return answer
            except BadInput:
                raise
            except Exception as error:
                if wait_s is None or not may_pass(error):
                    raise refusal(url, error, tries, time.monotonic() - began) from error
                time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")


@contextmanager
def open_sequential(url: str, options: Mapping[str, Any]) -> Iterator[BinaryIO]:
    """A file behind a URL, read from the front without asking for parts of it where the server has none."""
    files = _file_system(protocol_of(url), options)
    with files.open(url, "rb", block_size=0 if protocol_of(url) in ("http", "https") else _BLOCK) as file:
        yield file


@lru_cache(maxsize=16)
def _import(protocol: str) -> Any:
    """The class of a protocol's file system.

    Raises:
        BadInput: the package for it is not installed.
    """
    package = PROTOCOLS[protocol]
    try:
        importlib.import_module(package)
        if package == "aiohttp":
            return importlib.import_module("foreseen.data.http_ranges").HTTPRanges
        return fsspec.get_filesystem_class(protocol)
    except ImportError:
        install = "foreseen[remote]" if package in _IN_EXTRA else package
        raise BadInput(f"{protocol}:// needs the package {package}: pip install {install}") from None


def _file_system(protocol: str, options: Mapping[str, Any]) -> Any:
    """A file system of this process whose own retries are off: ours are the only ones."""
    made: dict[str, Any] = {"use_listings_cache": False, **options}
    if protocol in ("http", "https"):
        patience = importlib.import_module("foreseen.data.http_ranges").patient_client(_CONNECT_S, _READ_S)
        made["client_kwargs"] = patience | made.get("client_kwargs", {})
    if protocol in ("s3", "s3a"):
        patience = {"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "retries": {"max_attempts": 0}}
        made["config_kwargs"] = {"max_pool_connections": _AT_ONCE} | patience | made.get("config_kwargs", {})
    kind = _import(protocol)
    try:
        files = kind(**made)
    except (TypeError, ValueError, OSError) as error:
        raise BadInput(f"data.storage_options do not suit {protocol}:// ({masked(str(error))})") from None
    if protocol in ("s3", "s3a"):
        files.retries = 1
    return files


def _seconds(written: Any) -> float | None:
    """A time that a server gives, in seconds since 1970; None where it cannot be read."""
    if isinstance(written, str):
        try:
            written = parsedate_to_datetime(written) if "," in written else datetime.fromisoformat(written)
        except ValueError:
            return None
    return written.timestamp() if isinstance(written, datetime) else None
