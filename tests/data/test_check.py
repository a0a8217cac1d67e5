"""Checks: each kind of damage is found, named by its shard and key, and nothing else is."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from foreseen.data.check import Findings, check_set, check_tars
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.manifest import read_manifest
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import Blob, SourceSample
from foreseen.data.tar_paths import by_split, find_tars
from foreseen.data.tars import scan_tar
from foreseen.errors import BadInput
from tests.pets_archives import jpeg, png
from tests.tars_of_others import make_tar, members_of, sound


@pytest.fixture(scope="session")
def masked_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two splits of pictures with label maps and labels, three samples a shard."""
    folder = tmp_path_factory.mktemp("masked")
    for split, numbers in (("train", range(9)), ("test", range(9, 13))):
        samples = []
        for number in numbers:
            blobs = []
            for name, data in ((f"{number}.jpg", jpeg(40 + number, 30)), (f"{number}.png", png(40 + number, 30))):
                (folder / name).write_bytes(data)
                blobs.append(Blob(str(folder / name), len(data)))
            samples.append(
                SourceSample(f"{number}.jpg", blobs[0], number % 2, {"note": number}, masks={"trimap.png": blobs[1]})
            )
        pack(samples, folder / "set", split, classes=["a", "b"], shard_samples=3, workers=1, licence="CC0")
    return folder / "set"


@pytest.fixture
def own(masked_shards: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(masked_shards, tmp_path / "own"))


def kinds(found: Findings) -> list[tuple[str, str, str]]:
    return [(fault.kind, fault.shard, fault.key) for fault in found.faults]


def change(file: Path, extension: str, how: Callable[[bytearray], object], nth: int = 0) -> None:
    """Change the bytes of a member in its place."""
    member = [member for member in scan_tar(file) if member.name.endswith(extension)][nth]
    content = bytearray(file.read_bytes())
    part = content[member.offset : member.offset + member.size]
    how(part)
    content[member.offset : member.offset + member.size] = part
    assert len(part) == member.size
    file.write_bytes(content)


def flip(data: bytearray) -> None:
    data[len(data) // 2] ^= 4


def test_a_sound_set_is_sound(masked_shards: Path) -> None:
    seen: list[tuple[int, int]] = []
    found = check_set(masked_shards, workers=1, progress=lambda *n: seen.append(n))
    assert (found.faults, found.notes, found.without_checksum) == ([], [], 0)
    assert found.splits["train"][:2] == (3, 9)
    assert seen[-1] == (13, 13)
    assert check_set(masked_shards, split="test", workers=1).splits.keys() == {"test"}
    assert not check_set(masked_shards, workers=2, decode=False).faults


def test_a_flipped_bit_is_found_with_and_without_decoding(own: Path) -> None:
    change(own / "train-000001.tar", ".jpg", flip)
    for decode in (True, False):
        assert kinds(check_set(own, workers=1, decode=decode)) == [("checksum", "train-000001.tar", "000000003")]


def test_shards_that_are_missing_cut_or_strangers_are_found(own: Path) -> None:
    (own / "train-000000.tar").unlink()
    members = scan_tar(own / "train-000001.tar")
    os.truncate(own / "train-000001.tar", members[5].offset + 10)
    shutil.copy(own / "test-000000.tar", own / "test-000007.tar")
    (own / ".packing-val").mkdir()
    found = check_set(own, workers=1)
    assert sorted(kinds(found)) == [
        ("index", "train-000001.tar", ""),
        ("members", "train-000001.tar", "000000004"),
        ("missing", "train-000000.tar", ""),
        ("size", "train-000001.tar", ""),
        ("stray", "", ""),
        ("stray", "test-000007.tar", ""),
        ("truncated", "train-000001.tar", ""),
    ]


def test_facts_that_contradict_each_other_are_found(own: Path) -> None:
    change(own / "train-000000.tar", ".json", lambda data: data.__setitem__(slice(0, 1), b"["))
    file = own / "train-000001.tar"
    labels = {member.name: json.loads(file.read_bytes()[member.offset :][: member.size])["label"]
              for member in scan_tar(file) if member.name.endswith("json")}  # fmt: skip
    old = labels["000000003.json"]
    change(file, ".json", lambda data: data.__setitem__(slice(None), data.replace(b'"label": %d' % old, b'"label": 7')))
    change(own / "train-000002.tar", ".json", lambda data: data.__setitem__(slice(None), data.replace(b"30", b"31")))
    stored = np.load(own / "test.labels.npy")
    stored[1] = 5
    np.save(own / "test.labels.npy", stored)
    found = check_set(own, workers=1)
    assert kinds(found) == [
        ("json", "test-000000.tar", "000000001"),
        ("label", "test-000000.tar", "000000001"),
        ("json", "train-000000.tar", "000000000"),
        ("json", "train-000001.tar", "000000003"),
        ("json", "train-000002.tar", "000000006"),
    ]
    assert found.faults[1].reason == "its label is 5, and there are 2 classes"
    assert found.faults[3].reason == f"its json has the label 7, the labels file {old}"
    assert found.faults[4].reason.startswith("its json says")


def test_label_maps_that_are_broken_or_of_another_size_are_found(own: Path) -> None:
    change(own / "train-000000.tar", ".png", flip)
    change(own / "train-000001.tar", ".png", lambda data: data.__setitem__(slice(16, 24), b"\0\0\xff\xff" * 2))
    found = check_set(own, workers=1)
    assert [kind for kind, *_ in kinds(found)] == ["mask", "mask"]
    assert "trimap.png is 65535 x 65535 pixels" in found.faults[1].reason or "trimap.png" in found.faults[1].reason


def test_a_changed_or_broken_index_is_found(own: Path) -> None:
    index = np.load(own / "train.index.npy")
    index["offset_512"][4] += 1
    np.save(own / "train.index.npy", index)
    found = check_set(own, workers=1)
    assert kinds(found) == [
        ("index", "", ""), ("index", "train-000001.tar", ""), ("index", "train-000001.tar", "000000004"),
    ]  # fmt: skip
    assert "has changed since it was written" in found.faults[0].reason
    (own / "train.index.npy").write_bytes(b"no array")
    assert ("index", "", "") in kinds(check_set(own, workers=1))


def test_the_same_picture_in_two_splits_is_found_and_a_like_checksum_is_not_enough(own: Path, tmp_path: Path) -> None:
    data = ShardSet.open(own, "train").read(4)
    (tmp_path / "again.jpg").write_bytes(data)
    sample = SourceSample("again.jpg", Blob(str(tmp_path / "again.jpg"), len(data)), 0)
    pack([sample], own, "val", classes=["a", "b"], workers=1)
    found = check_set(own, workers=1)
    assert kinds(found) == [("leak", "train-000001.tar", "000000004")]
    assert found.faults[0].reason.endswith("is again.jpg of val, byte for byte")
    assert not check_set(own, split="val", workers=1).faults


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """Tars of others with an index without checksums."""
    for name, numbers in (("train-0", range(10)), ("val-0", range(20, 25))):
        sound(tmp_path / "tars" / f"{name}.tar", numbers)
    index_tars(by_split(find_tars([str(tmp_path / "tars")]))[0], tmp_path / "tars", IndexOptions(), workers=1)
    return tmp_path / "tars"


def test_an_indexed_set_is_checked_by_what_was_looked_up(indexed: Path) -> None:
    found = check_set(indexed, workers=1)
    assert (found.faults, found.without_checksum) == ([], 15)
    change(indexed / "val-0.tar", ".cls", lambda data: data.__setitem__(0, ord("1")))
    change(indexed / "train-0.tar", ".jpg", lambda data: data.__setitem__(slice(0, 9), b"<html>   "))
    assert kinds(check_set(indexed, workers=1)) == [
        ("picture", "train-0.tar", "s/000"), ("label", "val-0.tar", "s/020"),
    ]  # fmt: skip


def test_writing_checksums_keeps_the_fingerprint_so_that_runs_go_on(indexed: Path) -> None:
    before = ShardSet.open(indexed, "train")
    found = check_set(indexed, workers=1, write_checksums=True)
    assert found.notes[0] == "wrote the checksums of 10 samples of train into train.index.npy"
    after = ShardSet.open(indexed, "train")
    assert after.fingerprint == before.fingerprint
    assert read_manifest(indexed).splits["train"].index_digest != read_manifest(indexed).splits["train"].first_digest
    assert (after.picture_digests() & np.uint64(0xFFFFFFFF)).all()
    assert check_set(indexed, workers=1).without_checksum == 0
    change(indexed / "train-0.tar", ".jpg", flip)
    assert [kind for kind, *_ in kinds(check_set(indexed, workers=1, decode=False))] == ["checksum"]


def test_no_checksum_is_written_of_what_is_damaged(indexed: Path) -> None:
    change(indexed / "train-0.tar", ".jpg", lambda data: data.__setitem__(slice(0, 9), b"<html>   "))
    found = check_set(indexed, workers=1, write_checksums=True)
    assert found.without_checksum == 10
    assert "the checksums of train were not written, since it has faults" in found.notes


def test_a_writing_of_checksums_that_was_killed_is_no_damage(indexed: Path) -> None:
    manifest = (indexed / "manifest.json").read_bytes()
    check_set(indexed, workers=1, write_checksums=True)
    (indexed / "manifest.json").write_bytes(manifest)
    assert not check_set(indexed, workers=1).faults
    index = np.load(indexed / "train.index.npy")
    index["size"][0] += 1
    np.save(indexed / "train.index.npy", index)
    assert ("index", "", "") in kinds(check_set(indexed, workers=1))


def test_tars_elsewhere_are_found_where_the_user_says(indexed: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for file in indexed.iterdir():
        if file.suffix != ".tar":
            file.rename(tmp_path / "out" / file.name)
    assert [kind for kind, *_ in kinds(check_set(tmp_path / "out", workers=1))] == ["missing", "missing"]
    assert not check_set(tmp_path / "out", shards_at=indexed, workers=1).faults
    with pytest.raises(BadInput, match="--shards-at is the folder"):
        check_set(tmp_path / "out", shards_at=tmp_path / "no", workers=1)


def test_tars_without_an_index_are_checked_for_their_structure(tmp_path: Path) -> None:
    sound(tmp_path / "a.tar", range(4))
    members = members_of(0, 1) + members_of(1, 1)
    make_tar(tmp_path / "b.tar", [members[0], members[2], members[1], members[3]])
    found = check_tars(find_tars([str(tmp_path)]), workers=1)
    assert not found.is_indexed
    assert kinds(found) == [("scattered", "b.tar", "s/000"), ("scattered", "b.tar", "s/001")]
    assert [note.split(":")[0] for note in found.notes] == [
        "2 samples have other members than cls, jpg, json, seg.png", "2 keys stand in several shards, such as in b.tar",
    ]  # fmt: skip


def test_pickles_are_counted_and_never_opened(tmp_path: Path) -> None:
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "run").encode() + b"'\ntR."
    make_tar(tmp_path / "a.tar", members_of(0, 1, pkl=evil, pyd=evil, pth=evil))
    index_tars({"train": [tmp_path / "a.tar"]}, tmp_path, IndexOptions(), workers=1)
    found = check_set(tmp_path, workers=1)
    assert (found.faults, found.notes) == ([], ["never opened of train: 1 *.pkl, 1 *.pyd, 1 *.pth"])
    assert not (tmp_path / "run").exists()


def test_a_writing_of_checksums_that_was_killed_is_finished_by_the_next(indexed: Path) -> None:
    manifest = (indexed / "manifest.json").read_bytes()
    check_set(indexed, workers=1, write_checksums=True)
    finished = (indexed / "manifest.json").read_bytes()
    (indexed / "manifest.json").write_bytes(manifest)
    check_set(indexed, workers=1, write_checksums=True)
    assert (indexed / "manifest.json").read_bytes() == finished


def test_no_checksum_is_written_into_a_set_that_was_made_anew_meanwhile(indexed: Path) -> None:
    def index_again(done: int, total: int) -> None:
        if done == total:
            make_tar(indexed / "train-0.tar", members_of(0, 1))
            index_tars({"train": [indexed / "train-0.tar"]}, indexed, IndexOptions(), workers=1, overwrite=True)

    found = check_set(indexed, workers=1, write_checksums=True, progress=index_again)
    assert "the checksums of train were not written, since it was packed anew meanwhile" in found.notes
    assert len(ShardSet.open(indexed, "train")) == 1
