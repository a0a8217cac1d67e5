"""HTTP through fsspec, but never more of a file than was asked for.

fsspec's own HTTP file system takes whatever a server answers to a ranged request. A server without ranges answers with
the whole file: gigabytes for every sample.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

_CHUNK = 1 << 20
_WITHOUT_HEAD = frozenset({405, 501})


class NoRanges(Exception):
    """The server answers a request for some bytes of a file with the whole file."""


class HTTPRanges(HTTPFileSystem):  # type: ignore[misc]
    """Ranged and whole reads with the sizes checked."""

    async def _cat_file(self, url: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        assert start is not None
        assert end is not None
        if start == end:
            return b""
        session = await self.set_session()
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        async with session.get(self.encode_url(url), headers=headers) as response:
            if response.status == 416:  # it ends before
                return b""
            self._raise_not_found_for_status(response, url)
            if response.status != 206:
                raise NoRanges(url)
            try:
                return bytes(await response.content.readexactly(end - start))
            except asyncio.IncompleteReadError as error:
                return error.partial

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        session = await self.set_session()
        headers = {"Accept-Encoding": "identity"}
        for method in (session.head, session.get):
            async with method(self.encode_url(url), headers=headers, allow_redirects=True) as response:
                if response.status in _WITHOUT_HEAD and method == session.head:
                    continue
                self._raise_not_found_for_status(response, url)
                length = response.headers.get("Content-Length")
                return {
                    "name": url,
                    "type": "file",
                    "size": int(length) if length is not None else None,
                    "LastModified": response.headers.get("Last-Modified"),
                    "ETag": response.headers.get("ETag"),
                }
        raise FileNotFoundError(url)

    async def has_ranges(self, url: str) -> bool:
        """Whether the server answers a request for one byte with one byte."""
        session = await self.set_session()
        headers = {"Range": "bytes=0-0", "Accept-Encoding": "identity"}
        async with session.get(self.encode_url(url), headers=headers) as response:
            self._raise_not_found_for_status(response, url)
            return bool(response.status == 206)

    async def stream(self, url: str, take: Callable[[bytes], object]) -> None:
        """Hand over a whole file in chunks."""
        session = await self.set_session()
        async with session.get(self.encode_url(url), headers={"Accept-Encoding": "identity"}) as response:
            self._raise_not_found_for_status(response, url)
            async for chunk in response.content.iter_chunked(_CHUNK):
                take(chunk)


def patient_client(connect_s: float, read_s: float) -> dict[str, Any]:
    """Arguments of aiohttp's session: time limits for each wait, none for the whole, the environment's proxies.."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_s, sock_read=read_s)
    return {"timeout": timeout, "trust_env": True}
