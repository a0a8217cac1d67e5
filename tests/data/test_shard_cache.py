"""The cache of whole shards: bounded whoever uses it, shared, and sound after kills and on full disks."""

import errno
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from foreseen.data import network_faults
from foreseen.data.remote import RemoteStore
from foreseen.data.shard_cache import CachedStore, locked, make_cache_folder
from foreseen.data.store import Piece
from foreseen.errors import BadInput
from tests.servers import Http, http_server

SIZE, COUNT = 100_000, 12


def content(number: int) -> bytes:
    return bytes([number + 1]) * SIZE


@pytest.fixture
def http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Http]:
    """A server of twelve files of 100 kB."""
    monkeypatch.setattr(network_faults, "WAITS_S", (0.01,))
    (tmp_path / "files").mkdir()
    for number in range(COUNT):
        (tmp_path / "files" / f"{number}.tar").write_bytes(content(number))
    with http_server(tmp_path / "files") as server:
        yield server


def cache(http: Http, folder: Path, limit: int, *, ahead: bool = False) -> CachedStore:
    make_cache_folder(folder, "set")
    sizes = {f"{number}.tar": SIZE for number in range(COUNT)}
    return CachedStore(RemoteStore(http.url), folder, "set", limit, sizes, fetches_ahead=ahead)


def held(folder: Path) -> int:
    """Bytes in the cache at one moment: space is taken and given back under this lock; a rename changes no inode."""
    with locked(folder / ".lock", waits=True):
        found = [file.stat() for file in (folder / "set").iterdir()]
    return sum({facts.st_ino: facts.st_size for facts in found}.values())


def names(folder: Path) -> set[str]:
    return {file.name for file in (folder / "set").iterdir()}


def fetched(http: Http) -> list[str]:
    return [name for method, name, asked in http.requests if method == "GET" and asked != "bytes=0-0"]


def test_a_shard_is_fetched_once_and_those_used_longest_ago_go_first(http: Http, tmp_path: Path) -> None:
    store = cache(http, tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2, 0, 3):
        assert store.pread(f"{number}.tar", 5, 10) == content(number)[:5]
        time.sleep(0.01)
    assert names(tmp_path / "cache") == {"0.tar", "2.tar", "3.tar"}
    assert fetched(http) == ["0.tar", "1.tar", "2.tar", "3.tar"]


def test_pieces_of_many_shards_come_in_their_order_from_a_cache_of_one(http: Http, tmp_path: Path) -> None:
    store = cache(http, tmp_path / "cache", SIZE)
    pieces = [Piece(f"{number}.tar", 3, 7) for number in (4, 2, 4, 0, 2)]
    assert [data[0] - 1 for data in store.read_many(pieces)] == [4, 2, 4, 0, 2]  # type: ignore[index]
    assert len(fetched(http)) == 3  # shard by shard
    assert held(tmp_path / "cache") <= SIZE


def test_a_shard_larger_than_the_cache_is_refused_with_the_arithmetic(http: Http, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"data\.cache_gb 5e-05 is too small: the shard 0\.tar alone has 0\.0001 GB"):
        cache(http, tmp_path / "cache", SIZE // 2).pread("0.tar", 1, 0)


def read_at_random(store: CachedStore, seed: int, wrong: Any) -> None:
    import random

    draw = random.Random(seed)
    for _ in range(60):
        number = draw.randrange(COUNT)
        pieces = [Piece(f"{number}.tar", 4, SIZE - 4), Piece(f"{(number + 1) % COUNT}.tar", 4, 0)]
        first, second = store.read_many(pieces)
        if (first, second) != (content(number)[:4], content((number + 1) % COUNT)[:4]):
            wrong.value += 1


def test_processes_share_a_cache_and_hold_its_bound(http: Http, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    store, wrong, most = cache(http, tmp_path / "cache", 4 * SIZE), context.Value("i", 0), 0
    processes = [context.Process(target=read_at_random, args=(store, seed, wrong)) for seed in range(3)]
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        try:
            most = max(most, held(tmp_path / "cache"))
        except FileNotFoundError:  # renamed while it was counted
            continue
        time.sleep(0.002)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert wrong.value == 0
    assert 2 * SIZE < most <= 4 * SIZE
    assert len(fetched(http)) < 3 * 120


def test_a_shard_that_is_read_is_never_deleted(http: Http, tmp_path: Path) -> None:
    store = cache(http, tmp_path / "cache", 2 * SIZE)
    with store._held("0.tar") as number:
        for other in (1, 2, 3):
            store.pread(f"{other}.tar", 1, 0)
        assert "0.tar" in names(tmp_path / "cache")
        assert os.pread(number, 1, 0) == b"\1"


def test_who_finds_all_shards_in_use_waits_and_the_bound_holds(http: Http, tmp_path: Path) -> None:
    store = cache(http, tmp_path / "cache", SIZE)
    with ThreadPoolExecutor(1) as threads:
        with store._held("0.tar"):
            waiting = threads.submit(store.pread, "1.tar", 1, 0)
            time.sleep(0.3)
            assert not waiting.done()
            assert held(tmp_path / "cache") <= SIZE
        assert waiting.result(20) == b"\2"


def fetch_slowly(store: CachedStore) -> None:
    store.pread("0.tar", 1, 0)


def test_what_a_killed_process_left_is_taken_over(http: Http, tmp_path: Path) -> None:
    store = cache(http, tmp_path / "cache", 2 * SIZE)
    http.fault = lambda name: "hang" if name == "0.tar" else None
    process = multiprocessing.get_context("spawn").Process(target=fetch_slowly, args=(store,))
    process.start()
    while not (tmp_path / "cache/set/0.tar.part").exists():
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    http.fault = lambda name: None
    assert store.pread("0.tar", 1, 0) == b"\1"
    assert names(tmp_path / "cache") == {"0.tar"}


def test_a_shard_of_another_size_than_the_manifest_says_is_refused(http: Http, tmp_path: Path) -> None:
    for size, found in ((SIZE + 1, "more"), (SIZE - 1, "99,999")):
        (tmp_path / "files/5.tar").write_bytes(bytes(size))
        with pytest.raises(BadInput, match=rf"shard 5\.tar has changed: it has {found} bytes and not the 100,000"):
            cache(http, tmp_path / "cache", 2 * SIZE).pread("5.tar", 1, 0)
    assert "5.tar" not in names(tmp_path / "cache")


def test_a_full_disk_is_a_sentence(http: Http, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(BadInput, match=r"the disk of data\.cache_dir .* is full .*: lower data\.cache_gb"):
        cache(http, tmp_path / "cache", 2 * SIZE).pread("0.tar", 1, 0)


def test_a_folder_that_cannot_be_written_is_a_sentence(http: Http, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"data\.cache_dir .* cannot be written"):
        cache(http, tmp_path / "file", SIZE)


def test_expected_shards_are_fetched_meanwhile(http: Http, tmp_path: Path) -> None:
    store = cache(http, tmp_path / "cache", 6 * SIZE, ahead=True)
    store.expect(["3.tar", "4.tar"])
    store.expect(["3.tar", "4.tar"])
    began = time.monotonic()
    while names(tmp_path / "cache") != {"3.tar", "4.tar"}:
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    assert sorted(fetched(http)) == ["3.tar", "4.tar"]
    assert store.pread("4.tar", 1, 0) == b"\5"
