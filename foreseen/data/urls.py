"""Which texts are URLs, and which of those shards are read from."""

import re
from urllib.parse import quote

from foreseen.errors import BadInput
from foreseen.masked import masked

# Protocol: the package that speaks it.
PROTOCOLS = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp",
    "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
}  # fmt: skip
SHELL = "pipe:"
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


def is_url(text: str) -> bool:
    """Whether a path is meant for a server or a shell: `s3://…`, `pipe:…`, or a chain of such."""
    return _URL.match(text) is not None or text.startswith(SHELL) or "::" in text


def is_stream(path: str) -> bool:
    """Whether `data.path` names tars, by URL, or a shell command, and no set."""
    return path.startswith(SHELL) or (is_url(path) and path.partition("?")[0].endswith(".tar"))


def protocol_of(url: str) -> str:
    """What stands before `://`, in small letters."""
    return url.partition("://")[0].lower()


def check_url(url: str, key: str) -> None:
    """Refuse a URL that no shards are read from.

    Args:
        url: as it was given.
        key: of the config that holds it, for the message.

    Raises:
        BadInput: a protocol that is not allowed, a chain of them, or no host.
    """
    found = _URL.match(url)
    if found is None or "::" in url or found[1].lower() not in PROTOCOLS:
        raise BadInput(
            f"{key} {masked(url)} is no URL that is read from: it must begin with "
            f"{', '.join(f'{name}://' for name in PROTOCOLS)} and hold no '::'; a path has no protocol at all"
        )
    if not url[found.end() :].strip("/"):
        raise BadInput(f"{key} {masked(url)} names no bucket or host")


def join(url: str, name: str) -> str:
    """The URL of a file in a folder; what follows a `?` stays at the end."""
    if protocol_of(url) not in ("http", "https"):
        return f"{url.rstrip('/')}/{name}"
    base, mark, query = url.partition("?")
    name = quote(name)  # so that no name leads out of the folder
    return f"{base.rstrip('/')}/{name}{mark}{query}"
