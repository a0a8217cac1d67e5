"""A compressed tar to a plain one, in which members can be reached singly; a bomb does not fill the disk."""

import bz2
import errno
import gzip
import lzma
import os
import shutil
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from foreseen.data.tars import compression_of
from foreseen.errors import BadInput
from foreseen.files import open_regular

_CHUNK = 1 << 20
_XZ_MEMORY = 256 << 20  # an xz file says how much its reader must take, up to 4 GiB
_ALWAYS_ALLOWED = 1 << 30
_MOST_TIMES = 200  # pictures hardly shrink; a bomb does so a thousand times


class UnpackFolder:
    """A temporary folder that lasts as long as anything holds this, and is gone at the end of the process."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="foreseen-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def unpack_tar(file: Path, tar: Path) -> None:
    """Undo gzip, bzip2 or xz.

    Raises:
        BadInput: it is damaged, of another kind, or unpacks to more than 200 times its size or than the disk holds.
    """
    size = file.stat().st_size
    limit = max(_ALWAYS_ALLOWED, _MOST_TIMES * size)
    free = shutil.disk_usage(tar.parent).free
    written = 0
    try:
        with os.fdopen(open_regular(file), "rb") as source, open(tar, "wb") as out:
            for chunk in _chunks(source, file):
                written += len(chunk)
                if written > limit:
                    raise BadInput(f"{file} of {size:,} bytes unpacks to more than {limit:,}: it is no tar of pictures")
                if written > free:
                    raise OSError(errno.ENOSPC, "No space left on device")
                out.write(chunk)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise BadInput(f"{file} is damaged or incomplete ({error}): fetch it again") from None
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BadInput(
                f"{file} unpacks to more than the {free:,} bytes free in {tar.parent}: make room, or set TMPDIR"
            ) from None
        if error.errno is not None:
            raise
        raise BadInput(f"{file} is damaged or incomplete ({error}): fetch it again") from None  # BadGzipFile, of bz2


def _chunks(source: BinaryIO, file: Path) -> Iterator[bytes]:
    kind = compression_of(source.read(16))
    source.seek(0)
    if kind == "xz":
        yield from _xz_chunks(source)
    elif kind in ("gzip", "bzip2"):
        with gzip.open(source) if kind == "gzip" else bz2.open(source) as plain:
            while chunk := plain.read(_CHUNK):
                yield chunk
    else:
        raise BadInput(f"{file} is compressed by {kind or 'nothing that is known'}: unpack it first")


def _xz_chunks(source: BinaryIO) -> Iterator[bytes]:
    rest = source.read(_CHUNK)
    while rest:  # a file may hold several streams
        stream = lzma.LZMADecompressor(memlimit=_XZ_MEMORY)
        while not stream.eof:
            data = rest or (source.read(_CHUNK) if stream.needs_input else b"")
            if stream.needs_input and not data:
                raise EOFError("it ends within a stream")
            yield stream.decompress(data, _CHUNK)
            rest = b""
        rest = stream.unused_data.lstrip(b"\0") or source.read(_CHUNK).lstrip(b"\0")
