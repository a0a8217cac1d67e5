"""From what `data.path` says to a set that can be read, wherever its manifest, its index and its shards lie.

Of a set behind a URL the manifest is fetched at every start, and the index and labels once for each version of it, into
the cache of this machine, where they are memory-mapped like any other set's.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from foreseen.data.arrays import map_array
from foreseen.data.cache import cache_folder
from foreseen.data.manifest import FILE_NAME, Split, read_manifest
from foreseen.data.shards import INDEX_ROW, ShardSet, find_split, rows_digest
from foreseen.data.store import LocalStore, Store
from foreseen.data.urls import check_url, is_url
from foreseen.errors import BadInput
from foreseen.files import MAX_JSON_BYTES, expand_home, locked, write_atomically
from foreseen.masked import masked

_ARRAY_HEAD = 1024  # most bytes of a .npy file before its rows


@dataclass(frozen=True)
class Access:
    """How shards are reached; see the config's section `data`."""

    shards_at: str | None = None
    fetch: Literal["range", "shard"] = "range"
    cache_dir: Path | None = None
    cache_gb: float = 50.0
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    block_shards: int | None = None


def open_set(path: str | Path, split: str, access: Access, say: Callable[[str], None]) -> ShardSet:
    """Open one split of the packed set in a folder or behind a URL, and look whether its shards are there.

    Args:
        path: the folder or URL with the manifest.
        split: which.
        access: where the shards are, and how they are read.
        say: told in a line what is fetched, and what will be slow.

    Raises:
        BadInput: see `ShardSet.open`; or what is behind the URL is not reached, or is no packed set.
    """
    place = str(path)
    if is_url(place):
        check_url(place, "data.path")
        folder = _fetch_head(place, split, access.storage_options, say)
    else:
        folder = expand_home(path)
    shards_at = access.shards_at or (place if is_url(place) else None)
    store: Store | None = None
    if shards_at is not None and is_url(shards_at):
        check_url(shards_at, "data.shards_at")
        store = _remote_store(shards_at, folder, split, access, say)
    elif shards_at is not None:
        store = LocalStore(expand_home(shards_at))
    shards = ShardSet.open(folder, split, store, masked(place) if is_url(place) else str(folder))
    shards.check_sizes()
    return shards


def recall_set(place: str, split: str) -> ShardSet:
    """Open a set as it was last read here, for its index and labels; nothing is fetched.

    Args:
        place: its folder or URL, as a run recorded it.
        split: which.

    Raises:
        BadInput: it is no longer there.
    """
    if not is_url(place):
        return ShardSet.open(Path(place), split)
    versions = sorted(_head_folder(place).glob(f"*/{FILE_NAME}"), key=lambda file: file.stat().st_mtime)
    if not versions:
        raise BadInput(f"{place} is not in the cache of this machine, and is fetched only by a run that names it")
    from foreseen.data.remote import RemoteStore

    return ShardSet.open(versions[-1].parent, split, RemoteStore(place), place)


def _fetch_head(url: str, split: str, options: Mapping[str, Any], say: Callable[[str], None]) -> Path:
    """Bring manifest, index and labels of a split here, unless this version of them is; returns their folder."""
    from foreseen.data.remote import RemoteStore

    remote = RemoteStore(url, options)
    try:
        content = remote.read_whole(FILE_NAME, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise BadInput(
            f"{remote.place} has no {FILE_NAME}, so it is no packed set: index tars that others made with "
            "`foreseen data index` and name their place in data.shards_at, or stream them, "
            f"data.path={remote.place.rstrip('/')}/NAME-{{000000..000009}}.tar"
        ) from None
    versions = _head_folder(masked(url))
    folder = versions / hashlib.blake2b(content, digest_size=8).hexdigest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(versions / ".lock", waits=True):
            if not (folder / FILE_NAME).exists():
                write_atomically(folder / FILE_NAME, content)
                if any(other != folder and other.is_dir() for other in versions.iterdir()):
                    say(f"{remote.place} has been published anew since it was last read here")
            entry = find_split(read_manifest(folder).splits, split, remote.place)
            _fetch_arrays(remote, entry, folder, say)
    except OSError as error:
        raise BadInput(
            f"the cache {versions} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can"
        ) from error
    return folder


def _fetch_arrays(remote: Any, entry: Split, folder: Path, say: Callable[[str], None]) -> None:
    if not (folder / entry.index).exists():
        say(f"fetching the index of {entry.samples:,} samples from {remote.place}, once")
        _fetch_array(remote, entry.index, folder, INDEX_ROW, entry.samples, entry.index_digest)
    if entry.labels is not None and not (folder / entry.labels).exists():
        _fetch_array(remote, entry.labels, folder, np.dtype("<i4"), entry.samples, entry.labels_digest)


def _fetch_array(remote: Any, name: str, folder: Path, dtype: np.dtype[Any], samples: int, digest: str | None) -> None:
    """Bring an array here if it is the one that the manifest names."""
    part = _fetch_file(remote, name, folder, samples * dtype.itemsize)
    try:
        found = rows_digest(map_array(part, dtype, samples))
    except BadInput as error:
        raise BadInput(f"{remote.place}: {name} cannot be used: {error}") from None
    if digest not in (None, found):
        raise BadInput(
            f"{remote.place}: {name} is not the one that {FILE_NAME} names (its digest differs), as while a set is "
            "being published: try again later, or publish the set again"
        )
    part.rename(folder / name)


def _fetch_file(remote: Any, name: str, folder: Path, size: int) -> Path:
    """Fetch a .npy file with `size` bytes of rows, or refuse it as soon as it has more; returns where it is for now."""
    part = folder / f".{name}.part"
    with open(part, "wb") as out:

        def begin_again() -> None:
            out.seek(0)
            out.truncate()

        def take(chunk: bytes) -> None:
            if out.tell() + len(chunk) > size + _ARRAY_HEAD:
                raise BadInput(f"{remote.place}: {name} has more than the {size:,} bytes that {FILE_NAME} promises")
            out.write(chunk)

        remote.download(name, take, begin_again)
    return part


def _remote_store(url: str, folder: Path, split: str, access: Access, say: Callable[[str], None]) -> Store:
    from foreseen.data.remote import RemoteStore
    from foreseen.data.shard_cache import CachedStore, make_cache_folder

    remote = RemoteStore(url, access.storage_options)
    entry = find_split(read_manifest(folder).splits, split, str(folder))
    if not entry.shards:
        return remote
    fetch = access.fetch
    if fetch == "range" and not remote.has_ranges(entry.shards[0].name):
        say(f"{remote.place}: the server gives no parts of files, so shards are fetched whole (data.fetch=shard)")
        fetch = "shard"
    if fetch == "range":
        return remote
    root = expand_home(access.cache_dir) if access.cache_dir else cache_folder() / "shards"
    key = _name_of(masked(url), entry.index_digest)
    make_cache_folder(root, key)
    limit = int(access.cache_gb * 1e9)
    block = (access.block_shards or 0) * max(shard.bytes for shard in entry.shards)
    for note in _notes(entry, access, limit, block):
        say(note)
    sizes = {shard.name: shard.bytes for shard in entry.shards}
    return CachedStore(remote, root, key, limit, sizes, fetches_ahead=0 < 2 * block <= limit)


def _notes(entry: Split, access: Access, limit: int, block: int) -> list[str]:
    """What will be slow, with the arithmetic."""
    total = sum(shard.bytes for shard in entry.shards)
    have = f"data.cache_gb {access.cache_gb:g}"
    if total <= limit:
        return []
    if access.block_shards is None:
        return [
            f"{have} holds {limit / total:.0%} of the {total / 1e9:.3g} GB of shards, and data.order full takes every "
            f"sample from any shard: nearly each will fetch a shard of {total / len(entry.shards) / 1e9:.2g} GB "
            "anew; set data.order=block, or data.fetch=range, or a larger data.cache_gb"
        ]
    if 2 * block > limit:
        needed = f"{access.block_shards} shards of up to {block / access.block_shards / 1e9:.2g} GB"
        fits = "a block does not fit" if block > limit else "the next block is not fetched ahead"
        return [
            f"{have} holds less than two blocks of {needed}, so {fits}: set data.cache_gb to {2 * block / 1e9:.3g}, or "
            "lower data.block_shards"
        ]
    return []


def _head_folder(place: str) -> Path:
    return cache_folder() / "remote" / _name_of(place)


def _name_of(place: str, *more: str) -> str:
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", place.partition("://")[2].partition("?")[0]).strip("-.")
    return f"{slug[-64:].strip('-.')}-{hashlib.blake2b(repr((place, *more)).encode(), digest_size=8).hexdigest()}"
