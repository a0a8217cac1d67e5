"""The reader: any sample by number, damage named, and nothing in memory that need not be."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from foreseen.data import store
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.manifest import Manifest, Shard, Split, read_manifest, write_manifest
from foreseen.data.shards import INDEX_ROW, CorruptSample, ShardSet
from foreseen.errors import BadInput
from tests.pets_archives import png
from tests.tars_of_others import make_tar


@pytest.fixture
def own_shards(small_shards: Path, tmp_path: Path) -> Path:
    """A copy of the small set that a test may damage."""
    return Path(shutil.copytree(small_shards, tmp_path / "set"))


def members(folder: Path, split: str) -> list[bytes]:
    """The pictures of a split in order, read with the standard library."""
    found = []
    for file in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(file) as tar:
            found += [tar.extractfile(info).read() for info in tar if info.name.endswith(".jpg")]  # type: ignore[union-attr]
    return found


def test_any_sample_is_read_by_its_number(small_shards: Path) -> None:
    data = ShardSet.open(small_shards, "train")
    expected = members(small_shards, "train")
    assert len(data) == len(expected) == 37
    for sample in np.random.default_rng(0).permutation(37):
        assert data.read(int(sample)) == expected[sample]
    for sample in (-1, 37):
        with pytest.raises(IndexError):
            data.read(sample)


def test_labels_and_classes_belong_to_the_pictures(small_shards: Path, picture_folder: Path) -> None:
    data = ShardSet.open(small_shards, "train")
    assert data.classes == ("a", "b", "c")
    assert data.labels is not None
    assert data.labels.dtype == np.int32
    for sample in range(len(data)):
        folder = picture_folder / data.classes[data.labels[sample]]
        assert data.read(sample) in {file.read_bytes() for file in folder.iterdir()}


def test_a_copy_in_another_process_reads_the_same(small_shards: Path) -> None:
    data = ShardSet.open(small_shards, "train")
    data.read(3)
    sent = pickle.dumps(data)
    assert len(sent) < 1000, "the index must be mapped again, not sent"
    copy = pickle.loads(sent)
    assert copy.read(36) == data.read(36)
    assert copy.fingerprint == data.fingerprint


def test_threads_share_a_set_while_shards_are_closed_and_opened(
    small_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_MAX_OPEN_SHARDS", 1)
    data = ShardSet.open(small_shards, "train")
    expected = members(small_shards, "train")
    order = [int(i) for i in np.random.default_rng(0).integers(0, 37, 2000)]
    with ThreadPoolExecutor(4) as threads:
        assert all(read == expected[i] for i, read in zip(order, threads.map(data.read, order), strict=True))


def test_describe_names_shard_sample_and_key(small_shards: Path) -> None:
    assert ShardSet.open(small_shards, "train").describe(17) == "train-000001.tar: sample 7 (key 000000017)"


def test_the_fingerprint_follows_the_content_and_not_the_place(own_shards: Path, small_shards: Path) -> None:
    original = ShardSet.open(small_shards, "train").fingerprint
    assert ShardSet.open(own_shards, "train").fingerprint == original
    manifest = read_manifest(own_shards)
    changed = Split(**{**manifest.splits["train"].__dict__, "index_digest": "0" * 32})
    write_manifest(own_shards, Manifest({"train": changed}, manifest.classes))
    assert ShardSet.open(own_shards, "train").fingerprint != original


def test_a_flipped_bit_is_found(own_shards: Path) -> None:
    data = ShardSet.open(own_shards, "train")
    file = own_shards / "train-000002.tar"
    content = bytearray(file.read_bytes())
    at = content.index(data.read(24)) + 300
    content[at] ^= 4
    file.write_bytes(content)
    data = ShardSet.open(own_shards, "train")
    data.check_sizes()
    with pytest.raises(CorruptSample, match=r"train-000002\.tar: sample 4 \(key 000000024\) has changed"):
        data.read(24)
    data.read(23)


def test_a_truncated_or_missing_shard_is_named_before_anything_is_read(own_shards: Path) -> None:
    data = ShardSet.open(own_shards, "train")
    data.check_sizes()
    file = own_shards / "train-000003.tar"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(BadInput, match=r"train-000003\.tar has 1,000 bytes and not the"):
        data.check_sizes()
    with pytest.raises(BadInput, match=r"shard train-000003\.tar has changed under this run: it has 1,000 bytes"):
        data.read(36)
    (own_shards / "train-000001.tar").unlink()
    with pytest.raises(BadInput, match=r"train-000001\.tar is missing \(2 of 4 shards are wrong\)"):
        data.check_sizes()
    with pytest.raises(BadInput, match=r"train-000001\.tar is missing"):
        data.read(12)


def test_a_folder_that_is_no_set_gets_a_sentence(tmp_path: Path, own_shards: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        ShardSet.open(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="is empty"):
        ShardSet.open(tmp_path / "empty", "train")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").touch()
    with pytest.raises(BadInput, match=r"foreseen data pack"):
        ShardSet.open(tmp_path / "other", "train")
    with pytest.raises(BadInput, match="is a file"):
        ShardSet.open(tmp_path / "other" / "a.jpg", "train")
    with pytest.raises(BadInput, match=r"no split 'trian', it has test, train; did you mean train\?"):
        ShardSet.open(own_shards, "trian")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ('"format": "foreseen-shards"', '"format": "else"', "format is 'else'"),
        ('"version": 1', '"version": 2', "version is 2"),
        ('"train-000000.tar"', '"../../etc/passwd"', "not the name of a file"),
        ('"samples": 37', '"samples": 36', "its shards hold 37"),
        ('"index":', '"indeks":', "'index' is missing"),
        ("{", "", "cannot be used"),
    ],
)
def test_a_broken_manifest_gets_a_sentence(own_shards: Path, old: str, new: str, reason: str) -> None:
    file = own_shards / "manifest.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(BadInput, match=reason):
        ShardSet.open(own_shards, "train")


def test_a_broken_index_gets_a_sentence_and_no_pickle_is_loaded(own_shards: Path) -> None:
    file = own_shards / "train.index.npy"
    np.save(file, np.zeros(36, INDEX_ROW))
    with pytest.raises(BadInput, match=r"promises 37 rows"):
        ShardSet.open(own_shards, "train")
    np.save(file, np.array([{}] * 37, dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match=r"holds object\(37,\)"):
        ShardSet.open(own_shards, "train")
    file.unlink()
    with pytest.raises(BadInput, match=r"is missing"):
        ShardSet.open(own_shards, "train")


def test_a_hundred_million_samples_open_at_once_and_small(tmp_path: Path) -> None:
    samples, count = 100_000_000, 100_000
    entry = Split(
        samples=samples,
        shards=tuple(Shard(f"train-{i:06d}.tar", samples // count, 110_000_000 + i) for i in range(count)),
        image="jpg",
        index="train.index.npy",
        index_digest="0" * 32,
        labels="train.labels.npy",
        mean=None,
        std=None,
        source=None,
        licence=None,
        plan=None,
    )
    write_manifest(tmp_path, Manifest({"train": entry}))
    for name, dtype in ((entry.index, INDEX_ROW), ("train.labels.npy", np.dtype("<i4"))):
        np.lib.format.open_memmap(tmp_path / name, mode="w+", dtype=dtype, shape=(samples,))  # sparse on disk
    script = (
        "import re, sys, time; from pathlib import Path; from foreseen.data.shards import ShardSet\n"
        f"start = time.process_time(); data = ShardSet.open({str(tmp_path)!r}, 'train')\n"
        "spent = time.process_time() - start\n"
        "assert len(data) == 10**8 and 'torch' not in sys.modules and 'PIL' not in sys.modules\n"
        # The peak of this program alone: ru_maxrss of a child begins with what its parent had.
        "print(spent, int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) / 1024)"
    )
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, result.stdout.split())
    assert seconds < 1.5  # under 1 s where nothing else runs
    assert megabytes < 200


def test_the_facts_of_a_sample_are_those_of_its_json(tmp_path: Path, picture_folder: Path) -> None:
    from foreseen.data.pack import pack
    from foreseen.data.source import Blob, SourceSample

    files = sorted(picture_folder.rglob("*.jpg"))[:3]
    samples = [
        SourceSample(file.name, Blob(str(file), file.stat().st_size), number, {"note": "é" * (3000 * number)})
        for number, file in enumerate(files)
    ]
    pack(samples, tmp_path, "train", workers=1)
    data = ShardSet.open(tmp_path, "train")
    facts = [data.facts(sample) for sample in range(3)]
    assert {fact["path"]: len(fact["note"]) for fact in facts} == {file.name: 3000 * n for n, file in enumerate(files)}
    assert data.labels is not None
    assert [fact["label"] for fact in facts] == data.labels.tolist()
    for sample in (-1, 3):
        with pytest.raises(IndexError):
            data.facts(sample)


def test_a_sample_without_a_json_behind_its_picture_has_no_facts(own_shards: Path) -> None:
    data = ShardSet.open(own_shards, "train")
    shard = own_shards / "train-000000.tar"
    shard.write_bytes(shard.read_bytes().replace(b".json\0", b".text\0"))
    assert data.facts(0) == {}
    shard.write_bytes(shard.read_bytes()[:3000])
    assert data.facts(5) == {}


def test_the_start_of_a_picture_is_read_alone(small_shards: Path) -> None:
    data = ShardSet.open(small_shards, "train")
    assert data.read_start(3, 10) == data.read(3)[:10]
    assert data.read_start(3, 10**9) == data.read(3)
    assert data.sizes()[3] == len(data.read(3))


def test_facts_are_those_of_the_sample_where_the_json_stands_before_the_picture(tmp_path: Path) -> None:
    members = [
        (f"./v1.0/{number}.{extension}", data)
        for number in range(3)
        for extension, data in (("json", b'{"path": "\\u001b[2Jof %d"}' % number), ("png", png(9, 9)))
    ]
    file = make_tar(tmp_path / "before.tar", members)
    index_tars({"before": [file]}, tmp_path, IndexOptions(), workers=1)
    before = ShardSet.open(tmp_path, "before")
    assert [before.facts(sample) for sample in range(3)] == [{}, {}, {}], "what follows is of the next sample"
    assert before.shard_and_key(1) == ("before.tar", "./v1.0/1")
    assert before.name(1) == "before.tar: sample 1 (key ./v1.0/1)"
    members = [members[place] for place in (1, 0, 3, 2, 5, 4)]
    index_tars({"behind": [make_tar(tmp_path / "behind.tar", members)]}, tmp_path, IndexOptions(), workers=1)
    behind = ShardSet.open(tmp_path, "behind")
    assert [behind.facts(sample)["path"] for sample in range(3)] == [f"\x1b[2Jof {sample}" for sample in range(3)]
    assert behind.name(1) == "\\x1b[2Jof 1"


def test_the_limit_of_bytes_is_the_callers_for_the_second_look_too(own_shards: Path) -> None:
    manifest = json.loads((own_shards / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][3]["bytes"] = store.MAX_BYTES * 2
    (own_shards / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(own_shards / "train-000003.tar", store.MAX_BYTES * 2)
    index = np.load(own_shards / "train.index.npy")
    index["size"][36] = store.MAX_BYTES + 1
    np.save(own_shards / "train.index.npy", index)
    with pytest.raises(CorruptSample, match="has changed since it was packed"):
        ShardSet.open(own_shards, "train").read(36, max_bytes=store.MAX_BYTES * 2)
    with pytest.raises(CorruptSample, match="more than the 67,108,864 allowed"):
        ShardSet.open(own_shards, "train").read(36)
