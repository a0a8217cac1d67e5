"""Tars without an index: streamed with bounds, keyed by position, shells refused, and honest about resuming."""

import io
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foreseen.data import network_faults, stream
from foreseen.data.batch import Batch, BatchLayout
from foreseen.data.stream import StreamBuilder, TarStream, open_stream
from foreseen.data.urls import is_stream
from foreseen.data.views import Request, View
from foreseen.errors import BadInput
from tests.servers import Http, http_server

REQUEST = Request(views=(View("input", (16, 16)),))
Members = list[tuple[str, bytes]]


@pytest.fixture
def http(small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Http]:
    """A server of the small set's tars that gives no ranges."""
    monkeypatch.setattr(network_faults, "WAITS_S", (0.01, 0.01))
    folder = tmp_path / "served"
    folder.mkdir()
    for file in small_shards.glob("train-*.tar"):
        (folder / file.name).write_bytes(file.read_bytes())
    with http_server(folder) as server:
        server.ranges = False
        yield server


def opened(path: str, **more: Any) -> TarStream:
    return open_stream(path, {}, **({"samples": None, "run_samples": 100, "allow_shell": False} | more))


def feed(shards: TarStream, *, ranks: int = 1, rank: int = 0, buffer: int = 8, seed: int = 0) -> stream.StreamFeed:
    return StreamBuilder(shards, REQUEST, seed, shuffle_buffer=buffer).feed(BatchLayout(4 * ranks, 4, ranks), rank)


def batches(shards: TarStream, first: int, total: int, *, workers: int = 0, **more: Any) -> list[Batch]:
    return list(feed(shards, **more).batches(first, total, workers=workers, pin_memory=False))


def write_tar(file: Path, members: Members) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def names(shards: TarStream, url: int = 0) -> list[str]:
    return [name.rpartition(" ")[2] for name, _ in stream._read_tar(shards.urls[url], {})]


def test_tars_of_a_server_without_ranges_are_streamed(http: Http) -> None:
    shards = opened(f"{http.url}/train-{{000000..000003}}.tar")
    assert len(shards.urls) == 4
    found = batches(shards, 0, 10)
    assert torch.cat([batch.position for batch in found]).tolist() == list(range(40))
    assert len({batch.images["input"].sum().item() for batch in found}) == 10
    assert [batch.sample.tolist() for batch in found] == [[-1] * 4] * 10
    assert not any(batch.problems for batch in found)


def test_views_follow_from_the_position_and_the_stream_from_the_seed(http: Http) -> None:
    shards = opened(f"{http.url}/train-{{000000..000003}}.tar")
    one, two = batches(shards, 0, 5, workers=2), batches(shards, 0, 5, workers=2)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.images["input"], b.images["input"])
        assert torch.equal(a.key, b.key)
    later = batches(shards, 3, 5, workers=2)
    assert torch.equal(torch.cat([batch.key for batch in later]), torch.cat([batch.key for batch in one[3:]]))
    other = batches(shards, 0, 5, workers=2, seed=1)
    assert not torch.equal(one[0].images["input"], other[0].images["input"])


def test_ranks_and_workers_read_tars_of_their_own_for_as_many_steps(http: Http) -> None:
    shards = opened(f"{http.url}/train-{{000000..000003}}.tar")
    for rank in range(2):
        http.requests.clear()
        assert len(batches(shards, 0, 3, ranks=2, rank=rank, buffer=1)) == 3
        assert {name for _, name, _ in http.requests if name}
    passes = [
        [picture[0] for picture, _ in zip(feed(shards)._passes("s", share, 2), range(17), strict=False)]
        for share in range(2)
    ]
    assert not set(passes[0]) & set(passes[1])
    with pytest.raises(BadInput, match=r"names 4 tars for 5 ranks"):
        feed(shards, ranks=5)
    assert len(batches(opened(f"{http.url}/train-000000.tar"), 0, 3, workers=4)) == 3  # one worker is left


def test_resuming_is_said_to_be_best_effort(http: Http) -> None:
    (note,) = feed(opened(f"{http.url}/train-000000.tar")).notes
    assert "resuming is best-effort" in note


def test_a_shell_is_started_only_where_the_config_says_so(tmp_path: Path, small_shards: Path) -> None:
    mark = tmp_path / "mark"
    path = f"pipe:touch {mark}; cat {small_shards}/train-{{000000..000001}}.tar"
    assert is_stream(path)
    with pytest.raises(BadInput, match=r"would run a command in a shell; .*data\.allow_shell_urls=true"):
        opened(path)
    assert not mark.exists()
    shards = opened(path, allow_shell=True)
    assert len(shards.urls) == 2
    assert len(names(shards)) == 10
    assert mark.exists()
    with pytest.raises(BadInput, match=r"failed with exit code 3"):
        names(opened(f"pipe:cat {small_shards}/train-000000.tar; exit 3", allow_shell=True))


def test_no_file_or_chain_is_opened_by_a_url() -> None:
    for path in ("file:///etc/x.tar", "simplecache::http://h/x.tar", "http://a/x.tar::http://b/y.tar"):
        assert is_stream(path)
        with pytest.raises(BadInput, match="is no URL that is read from"):
            opened(path)


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(BadInput, match=r"give run\.steps, or data\.samples"):
        opened("http://host/x.tar", run_samples=None)
    assert len(opened("http://host/x.tar", samples=7)) == 7


def test_only_pictures_are_taken_from_a_tar(http: Http, tmp_path: Path, small_shards: Path) -> None:
    picture = next(data for _, data in stream._read_tar(f"{http.url}/train-000000.tar", {}))
    write_tar(
        tmp_path / "served/odd.tar",
        [
            ("a.jpg", picture), ("a.pyd", b"no pickle"), ("a.json", b"{}"), ("a.mask.png", picture), ("b.txt", b"x"),
            ("sub/c.JPG", picture), ("d.png", b"broken"), ("e.jpg", picture), ("e.jpg", picture),
        ],
    )  # fmt: skip
    shards = opened(f"{http.url}/odd.tar")
    assert names(shards) == ["a.jpg", "sub/c.jpg", "d.png", "e.jpg"]
    problems = {problem for batch in batches(shards, 0, 3) for problem in batch.problems}
    assert {(problem.key, problem.reason) for problem in problems} == {
        (f"{http.url}/odd.tar: d.png", "it is text and no picture, it begins with 'broken'")
    }


def test_a_stream_that_breaks_is_opened_again_and_repeats_nothing(http: Http) -> None:
    url = f"{http.url}/train-000000.tar"
    whole = names(opened(url))
    left = ["truncate", "truncate", 500]
    http.fault = lambda name: left.pop() if left else None
    assert names(opened(url)) == whole
    http.fault = lambda name: "truncate"
    with pytest.raises(BadInput, match=r"train-000000\.tar (failed|is broken)"):
        names(opened(url))
    http.fault = lambda name: 403
    with pytest.raises(BadInput, match=r"is refused \(403"):
        names(opened(url))


def test_a_header_that_asks_for_gigabytes_is_refused(http: Http, tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.size, header.type = 1 << 33, tarfile.GNUTYPE_LONGNAME
    with open(tmp_path / "served/bomb.tar", "wb") as file:
        file.write(header.tobuf(format=tarfile.GNU_FORMAT))
        file.write(bytes(3 << 20))
    with pytest.raises(BadInput, match=r"a header of more than 1,048,576 bytes"):
        names(opened(f"{http.url}/bomb.tar"))


def test_a_picture_larger_than_any_may_be_is_passed_over(http: Http, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(stream, "MAX_BYTES", 1000)
    write_tar(tmp_path / "served/large.tar", [("a.jpg", bytes(3 << 20)), ("b.jpg", b"small")])
    assert names(opened(f"{http.url}/large.tar")) == ["b.jpg"]


def test_tars_without_a_picture_are_refused_and_not_read_for_ever(http: Http, tmp_path: Path) -> None:
    write_tar(tmp_path / "served/none.tar", [("a.txt", b"")])
    with pytest.raises(BadInput, match=r"no picture in http://.*/none\.tar"):
        batches(opened(f"{http.url}/none.tar"), 0, 1)
    (tmp_path / "served/page.tar").write_bytes(b"<html>" * 1000)
    with pytest.raises(BadInput, match=r"page\.tar is broken, or no plain tar"):
        batches(opened(f"{http.url}/page.tar"), 0, 1)


@pytest.mark.parametrize("damage", ["header", "cut"])
def test_a_tar_that_is_damaged_does_not_end_there_in_silence(damage: str, http: Http, tmp_path: Path) -> None:
    file = tmp_path / "served/train-000000.tar"
    content = bytearray(file.read_bytes())
    with tarfile.open(file) as tar:
        at = [member.offset for member in tar.getmembers()][7]
    content[at + 3] ^= 1
    file.write_bytes(content[: at + 100] if damage == "cut" else content)
    with pytest.raises(
        BadInput, match=r"train-000000\.tar is broken, or no plain tar \(.*at byte [\d,]+\), after 3 pict"
    ):
        names(opened(f"{http.url}/train-000000.tar"))


def test_a_tar_without_an_end_mark_is_whole(http: Http, tmp_path: Path) -> None:
    whole = names(opened(f"{http.url}/train-000000.tar"))
    file = tmp_path / "served/train-000000.tar"
    file.write_bytes(file.read_bytes().rstrip(b"\0") + bytes(-len(file.read_bytes().rstrip(b"\0")) % 512))
    assert names(opened(f"{http.url}/train-000000.tar")) == whole


def test_what_a_command_prints_behind_a_tar_takes_no_memory(small_shards: Path) -> None:
    shards = opened(f"pipe:cat {small_shards}/train-000000.tar; head -c 200000000 /dev/zero", allow_shell=True)
    tracemalloc.start()
    assert len(names(shards)) == 10
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 50_000_000


def test_a_pattern_that_names_more_tars_than_there_are_is_refused_before_it_is_written_out() -> None:
    with pytest.raises(BadInput, match="names more than 1,000,000 tars"):
        opened("http://host/{0..99999}-{0..99999}.tar")
    with pytest.raises(BadInput, match="is no pattern of tars"):
        opened("http://host/{0..9.tar")
