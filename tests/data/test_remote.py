"""Sets behind URLs read as they do from a disk; servers that fail, lie or change are survived or named."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreseen.data import network_faults, remote
from foreseen.data.open_set import Access, open_set, recall_set
from foreseen.data.shards import CorruptSample, ShardSet
from foreseen.data.urls import check_url, is_url, join
from foreseen.errors import BadInput
from foreseen.masked import masked, masked_argument, masked_options
from tests.servers import Http, http_server, s3_server, upload

FETCHES = ["range", "shard"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(network_faults, "WAITS_S", (0.01, 0.02))
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture
def own_shards(small_shards: Path, tmp_path: Path) -> Path:
    """A copy of the small set that a test may damage."""
    return Path(shutil.copytree(small_shards, tmp_path / "set"))


@pytest.fixture
def http(own_shards: Path) -> Iterator[Http]:
    with http_server(own_shards) as server:
        yield server


def keys(endpoint: str) -> dict[str, Any]:
    return {"endpoint_url": endpoint, "key": "a-key", "secret": "a-secret"}


@pytest.fixture
def bucket(s3: str, own_shards: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    return upload(own_shards, s3, f"bucket-{abs(hash(request.node.nodeid))}", "sets/small")


def opened(url: str, said: list[str] | None = None, **access: Any) -> ShardSet:
    return open_set(url, "train", Access(**access), ([] if said is None else said).append)


def pictures(shards: ShardSet) -> list[bytes]:
    found = list(shards.read_many(range(len(shards))))
    assert all(isinstance(data, bytes) for data in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("fetch", FETCHES)
def test_a_set_in_a_bucket_is_the_set_on_the_disk(fetch: str, bucket: str, s3: str, small_shards: Path) -> None:
    local, found = ShardSet.open(small_shards, "train"), opened(bucket, fetch=fetch, storage_options=keys(s3))
    assert pictures(found) == [local.read(sample) for sample in range(37)]
    assert (found.fingerprint, found.labels_fingerprint) == (local.fingerprint, local.labels_fingerprint)
    assert found.describe(17) == local.describe(17)
    assert (found.place, found.address) == (bucket, bucket)
    assert pickle.loads(pickle.dumps(found)).read(36) == local.read(36)


@pytest.mark.parametrize("fetch", FETCHES)
def test_a_set_behind_http_is_the_set_on_the_disk(fetch: str, http: Http, small_shards: Path) -> None:
    local, found = ShardSet.open(small_shards, "train"), opened(http.url, fetch=fetch)
    assert pictures(found) == [local.read(sample) for sample in range(37)]
    assert found.read(5) == local.read(5)


def test_the_index_is_fetched_once_and_the_manifest_at_every_start(http: Http) -> None:
    said: list[str] = []
    opened(http.url, said)
    opened(http.url, said)
    gets = [name for method, name, asked in http.requests if method == "GET" and asked != "bytes=0-0"]
    assert gets.count("train.index.npy") == 1
    assert gets.count("manifest.json") == 2
    assert sum("fetching the index" in line for line in said) == 1


def test_a_set_that_was_published_anew_is_noticed(http: Http, own_shards: Path) -> None:
    opened(http.url)
    manifest = (own_shards / "manifest.json").read_text()
    (own_shards / "manifest.json").write_text(manifest.replace('"licence": null', '"licence": "CC0"'))
    said: list[str] = []
    assert opened(http.url, said).licence == "CC0"
    assert any("published anew" in line for line in said)


def test_an_index_that_is_not_the_manifests_is_refused(http: Http, own_shards: Path) -> None:
    file = own_shards / "train.index.npy"
    index = np.load(file)
    index["crc32"][3] += 1
    np.save(file, index)
    with pytest.raises(BadInput, match=r"train\.index\.npy is not the one that manifest\.json names"):
        opened(http.url)
    file.write_bytes(bytes(100_000))
    with pytest.raises(BadInput, match=r"more than the 444 bytes"):
        opened(http.url)


def test_samples_of_a_batch_are_asked_for_together_and_come_in_order(
    http: Http, small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local, found = ShardSet.open(small_shards, "train"), opened(http.url)
    windows: list[int] = []
    ask = remote.RemoteStore._ask

    def counted(self: remote.RemoteStore, pieces: Any) -> Any:
        windows.append(len(pieces))
        return ask(self, pieces)

    monkeypatch.setattr(remote.RemoteStore, "_ask", counted)
    order = np.random.default_rng(0).permutation(37).tolist()
    assert list(found.read_many(order)) == [local.read(sample) for sample in order]
    assert windows == [37]


def test_shards_may_lie_elsewhere_than_the_manifest(http: Http, small_shards: Path, tmp_path: Path) -> None:
    head = tmp_path / "head"
    head.mkdir()
    for name in ("manifest.json", "train.index.npy", "train.labels.npy"):
        shutil.copy(small_shards / name, head)
    local = ShardSet.open(small_shards, "train")
    for place in (http.url, str(small_shards)):
        assert pictures(opened(str(head), shards_at=place)) == [local.read(sample) for sample in range(37)]
    with pytest.raises(BadInput, match=r"train-000000\.tar is missing \(4 of 4"):
        opened(str(head))


def test_faults_that_pass_are_waited_for(http: Http, small_shards: Path) -> None:
    found = opened(http.url)
    failed: set[tuple[str, str]] = set()

    def once(what: int | str) -> Any:
        def fault(name: str) -> int | str | None:
            if (name, str(what)) in failed or not name.endswith(".tar"):
                return None
            failed.add((name, str(what)))
            return what

        return fault

    local = ShardSet.open(small_shards, "train")
    for what in (500, 503, 429, "truncate", "close"):
        http.fault = once(what)
        assert pictures(found) == [local.read(sample) for sample in range(37)], what
    assert len(failed) == 5 * 4


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (403, r"train-000001\.tar is refused \(403; .*credentials in the environment"),
        (404, r"train-000001\.tar is not there \(404\)"),
        (400, r"train-000001\.tar cannot be read \(400"),
        (500, r"train-000001\.tar failed \(500.*3 times in \d s: .* goes on from the last checkpoint"),
        ("truncate", r"train-000001\.tar failed \(.*not completed.*\), 3 times"),
    ],
)
def test_faults_that_stay_are_told_in_a_sentence(what: int | str, sentence: str, http: Http) -> None:
    found = opened(http.url)
    http.fault = lambda name: what if name == "train-000001.tar" else None
    with pytest.raises(BadInput, match=sentence):
        pictures(found)


def test_a_server_that_hangs_is_given_up(http: Http, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_READ_S", 0.2)
    monkeypatch.setattr(network_faults, "WAITS_S", ())
    found = opened(http.url)
    http.fault = lambda name: "hang"
    with pytest.raises(BadInput, match=r"gave no answer in time, 1 times"):
        found.read(3)


def test_a_server_that_is_not_there_is_told_in_a_sentence(http: Http) -> None:
    for url in ("http://127.0.0.1:9/set", "http://user:secret@127.0.0.1:9/set?token=hidden"):
        with pytest.raises(BadInput, match=r"127\.0\.0\.1:9/set/manifest\.json.* failed .*look at the server") as error:
            opened(url)
        assert "secret" not in str(error.value)
        assert "hidden" not in str(error.value)


def test_a_folder_without_a_manifest_says_what_else_can_be_done(http: Http, own_shards: Path) -> None:
    (own_shards / "manifest.json").unlink()
    with pytest.raises(BadInput, match=r"no manifest\.json.*`foreseen data index`.*NAME-\{000000\.\.000009\}\.tar"):
        opened(http.url)


def test_s3_faults_are_told_in_a_sentence(bucket: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadInput, match=r"no-such-bucket/x has no manifest"):
        opened("s3://no-such-bucket/x", storage_options=keys(s3))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(BadInput, match=r"is refused .*AWS_ACCESS_KEY_ID"):
        opened(bucket, storage_options={"endpoint_url": s3, "profile": None})


def test_a_server_without_ranges_is_read_in_whole_shards(http: Http, small_shards: Path) -> None:
    http.ranges = False
    said: list[str] = []
    found = opened(http.url, said)
    local = ShardSet.open(small_shards, "train")
    assert pictures(found) == [local.read(sample) for sample in range(37)]
    assert any("gives no parts of files, so shards are fetched whole" in line for line in said)
    assert sum(name == "train-000000.tar" and method == "GET" for method, name, _ in http.requests) <= 3


def test_a_server_that_stops_giving_ranges_never_sends_a_whole_shard_for_a_sample(http: Http) -> None:
    found = opened(http.url)
    http.ranges = False
    with pytest.raises(BadInput, match="cannot be read"):
        found.read(3)


@pytest.mark.parametrize("fetch", FETCHES)
def test_a_flipped_sample_is_replaced_and_a_changed_shard_is_named(fetch: str, http: Http, own_shards: Path) -> None:
    shard = own_shards / "train-000002.tar"
    content = bytearray(shard.read_bytes())
    content[content.index(opened(http.url).read(24)) + 300] ^= 4
    shard.write_bytes(content)
    os.utime(shard, (1, 1))
    found = opened(http.url, fetch=fetch)
    with pytest.raises(CorruptSample, match=r"train-000002\.tar: sample 4 \(key 000000024\) has changed"):
        found.read(24)
    assert [type(data) for data in found.read_many([23, 24, 25])] == [bytes, CorruptSample, bytes]


def test_a_shard_that_changes_under_a_run_is_named(bucket: str, s3: str, own_shards: Path) -> None:
    import boto3

    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    name, prefix = bucket.removeprefix("s3://").split("/", 1)
    found = opened(bucket, storage_options=keys(s3))
    content = (own_shards / "train-000003.tar").read_bytes()
    client.put_object(Bucket=name, Key=f"{prefix}/train-000003.tar", Body=content[:1000])
    with pytest.raises(
        BadInput, match=r"shard train-000003\.tar has changed under this run: it has 1,000 bytes and not"
    ):
        found.read(36)
    time.sleep(1.1)  # S3 tells whole seconds
    client.put_object(Bucket=name, Key=f"{prefix}/train-000003.tar", Body=bytes(len(content)))
    with pytest.raises(BadInput, match=r"another file of the same size has taken its place, last written at .*ETag"):
        found.read(36)
    client.delete_object(Bucket=name, Key=f"{prefix}/train-000003.tar")
    with pytest.raises(BadInput, match=r"train-000003\.tar is not there \(404\)"):
        found.read(36)
    with pytest.raises(BadInput, match=r"train-000003\.tar is missing"):
        opened(bucket, storage_options=keys(s3))


def test_a_damaged_copy_in_the_cache_is_fetched_again(http: Http, small_shards: Path, tmp_path: Path) -> None:
    found = opened(http.url, fetch="shard", cache_dir=tmp_path / "shards")
    expected = ShardSet.open(small_shards, "train").read(3)
    assert found.read(3) == expected
    (copy,) = (tmp_path / "shards").glob("*/train-000000.tar")
    copy.write_bytes(bytes(copy.stat().st_size))
    assert found.read(3) == expected


def test_a_set_read_before_is_recalled_without_a_request(http: Http) -> None:
    fingerprint = opened(http.url).fingerprint
    http.requests.clear()
    assert recall_set(http.url, "train").fingerprint == fingerprint
    assert not http.requests
    with pytest.raises(BadInput, match="not in the cache"):
        recall_set("s3://never/read", "train")


@pytest.mark.parametrize(
    "url",
    ["file:///etc", "simplecache::s3://b/x", "s3://a::s3://b", "ftp://host/x", "pipe:cat x", "memory://x", "data:x::y"],
)
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    assert is_url(url)
    with pytest.raises(BadInput, match="is no URL that is read from"):
        check_url(url, "data.path")


def test_a_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    remote._import.cache_clear()
    monkeypatch.setitem(remote.PROTOCOLS, "s3", "no_such_package")
    monkeypatch.setitem(remote.PROTOCOLS, "gs", "no_such_package")
    with pytest.raises(BadInput, match=r"^az:// needs the package adlfs: pip install adlfs"):
        opened("az://container/x")
    with pytest.raises(BadInput, match=r"s3:// needs the package no_such_package: pip install"):
        opened("s3://bucket/x")
    monkeypatch.setattr(remote, "_IN_EXTRA", ("no_such_package",))
    with pytest.raises(BadInput, match=r"pip install foreseen\[remote\]"):
        opened("gs://bucket/x")


def test_no_name_leads_out_of_the_folder() -> None:
    assert join("http://host/set", "%2e%2e%2fsecret.tar") == "http://host/set/%252e%252e%252fsecret.tar"
    assert join("http://host/set/?sig=a/b", "a b#?.tar") == "http://host/set/a%20b%23%3F.tar?sig=a/b"
    assert join("s3://bucket/set/", "train-000000.tar") == "s3://bucket/set/train-000000.tar"


def test_credentials_are_masked() -> None:
    assert masked("get https://me:pw@host/a?X-Sig=abc&b=c failed") == "get https://***@host/a?X-Sig=***&b=*** failed"
    shown = masked_options(
        {"endpoint_url": "http://u:p@h", "secret": "s", "client_kwargs": {"headers": "h", "verify": False}}
    )
    assert shown == {
        "endpoint_url": "http://***@h",
        "secret": "***",
        "client_kwargs": {"headers": "***", "verify": False},
    }
    assert masked_argument("data.storage_options.secret=s") == "data.storage_options.secret=***"
    assert masked_argument("data.storage_options={key: s}") == "data.storage_options=***"
    assert masked_argument("data.storage_options.anon=true") == "data.storage_options.anon=true"


def test_labels_that_are_not_the_manifests_are_refused_and_not_kept(http: Http, own_shards: Path) -> None:
    file = own_shards / "train.labels.npy"
    labels = np.load(file)
    np.save(file, np.roll(labels, 1))
    with pytest.raises(BadInput, match=r"train\.labels\.npy is not the one that manifest\.json names"):
        opened(http.url)
    np.save(file, labels[1:])
    with pytest.raises(BadInput, match=r"train\.labels\.npy cannot be used"):
        opened(http.url)
    np.save(file, labels)
    found = opened(http.url).labels
    assert found is not None
    assert found.tolist() == labels.tolist()


def test_a_set_without_a_digest_of_its_labels_is_read(http: Http, own_shards: Path) -> None:
    manifest = json.loads((own_shards / "manifest.json").read_text())
    for split in manifest["splits"].values():
        del split["labels_digest"]
    (own_shards / "manifest.json").write_text(json.dumps(manifest))
    assert opened(http.url).labels is not None
