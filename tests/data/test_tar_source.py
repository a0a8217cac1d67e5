"""Tars as a source of `pack` and of `data.path`, and what `repair` makes of damaged ones."""

import io
import json
import os
import shutil
import tarfile
import tracemalloc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foreseen.commands.data import pack as pack_command
from foreseen.data.check import check_set
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.manifest import read_manifest
from foreseen.data.open_source import SourceOptions, open_source
from foreseen.data.pack import Summary, pack
from foreseen.data.repair import repair
from foreseen.data.shards import ShardSet
from foreseen.data.source import Splits
from foreseen.data.table import Columns
from foreseen.data.tar_source import TarSource
from foreseen.data.tars import scan_tar
from foreseen.data.unpack_tar import unpack_tar
from foreseen.errors import BadInput
from tests.pets_archives import jpeg, png
from tests.tars_of_others import make_tar, members_of, sound


def read(place: Path | str, **options: Any) -> Splits:
    return open_source(str(place), SourceOptions(**options)).read()


def pack_all(place: Path | str, out: Path, **options: Any) -> dict[str, Summary]:
    found = read(place, **options)
    return {
        split: pack(samples, out, split, classes=found.classes, workers=1) for split, samples in found.splits.items()
    }


def contents(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Members of every sample by extension, by the name in its json."""
    found: dict[str, dict[str, bytes]] = {}
    for file in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(file) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                found.setdefault(f"{file.name}/{key}", {})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return {json.loads(members["json"])["path"]: members for members in found.values()}


def mend(src: Path, out: Path, **options: Any) -> tuple[dict[str, Summary], list[str]]:
    said: list[str] = []
    summaries = repair(
        str(src), out, workers=1, say=said.append, progress=lambda _: nullcontext(lambda *_: None), **options
    )
    return {summary.split: summary for summary in summaries}, said


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"])
def test_tars_are_packed_with_labels_facts_and_label_maps(suffix: str, tmp_path: Path) -> None:
    mode = {"tar": "w", "gz": "w:gz", "tgz": "w:gz", "xz": "w:xz", "bz2": "w:bz2"}[suffix.rpartition(".")[2]]
    for split, numbers in (("train", range(5)), ("val", range(5, 8))):
        sound(tmp_path / "tars" / f"{split}-0{suffix}", numbers, mode=mode)
    found = pack_all(tmp_path / "tars", tmp_path / "set", keep=None)
    assert {split: summary.samples for split, summary in found.items()} == {"train": 5, "val": 3}
    packed = contents(tmp_path / "set", "train")
    assert sorted(packed) == [f"train-0{suffix}/s/{number:03d}.jpg" for number in range(5)]
    for number in range(5):
        members = packed[f"train-0{suffix}/s/{number:03d}.jpg"]
        assert members["jpg"] == jpeg(40 + number, 30)
        assert members["seg.png"] == png(40 + number, 30)
        facts = json.loads(members["json"])
        assert (facts["label"], facts["breed"], facts["note"]) == (number % 3, "abc"[number % 3], number)
        assert (facts["width"], facts["height"]) == (40 + number, 30), "what the tar says of the size is not believed"
    assert not check_set(tmp_path / "set", workers=1).faults


def test_labels_are_chosen_by_a_field_by_cls_or_not_at_all(tmp_path: Path) -> None:
    file = sound(tmp_path / "a.tar", range(4))
    assert read(file).classes == ("0", "1", "2")
    assert read(file, columns=Columns(label="breed")).classes == ("a", "b", "c")
    assert read(file, columns=Columns(label="note")).classes == ("0", "1", "2", "3")
    assert read(file, labels="none").classes is None
    (tmp_path / "classes.txt").write_text("cat\ndog\nnewt\n")
    assert read(file).classes == ("cat", "dog", "newt")
    with pytest.raises(BadInput, match=r"has no column 'colour', it has breed, width, note"):
        read(file, columns=Columns(label="colour"))
    with pytest.raises(BadInput, match="--labels folder is for folders of pictures"):
        read(file, labels="folder")


def test_a_field_with_a_usual_name_is_the_label_where_there_is_no_cls(tmp_path: Path) -> None:
    members = [m for n in range(3) for m in members_of(n, json=json.dumps({"species": "cat", "id": n}).encode())]
    assert read(make_tar(tmp_path / "a.tar", members)).classes == ("cat",)
    assert read(make_tar(tmp_path / "b.tar", members_of(0))).classes is None


def test_one_tar_with_a_split_in_its_name_and_patterns_are_read(tmp_path: Path) -> None:
    for number in range(3):
        sound(tmp_path / f"a-{number}.tar", range(number * 4, number * 4 + 4))
    assert {split: len(rows) for split, rows in read(tmp_path / "a-{0..2}.tar").splits.items()} == {"train": 12}
    sound(tmp_path / "my-test.tar", range(2))
    assert list(read(tmp_path / "my-test.tar").splits) == ["test"]


def test_scattered_members_come_together_and_what_cannot_be_told_apart_is_left_out(tmp_path: Path) -> None:
    scattered = [member for number in range(4) for member in members_of(number, number % 2)]
    twice = [*members_of(9, 1), ("s/009.jpg", jpeg(99, 30))]
    file = make_tar(tmp_path / "a.tar", scattered[::2] + scattered[1::2] + twice)
    found = read(file)
    assert found.notes == ("5 keys were scattered or stood twice: their members are sorted out",)
    summary = pack_all(file, tmp_path / "set")["train"]
    assert summary.samples == 4
    assert [(name, reason[:34]) for name, reason in summary.unreadable] == [
        ("a.tar/s/009", "its members cannot be told apart: ")
    ]


def test_samples_without_a_picture_or_with_a_broken_json_are_named(tmp_path: Path) -> None:
    members = members_of(0, json=b'{"a": 1}') + members_of(1, json=b"{") + [("s/002.json", b"{}")]
    summary = pack_all(make_tar(tmp_path / "a.tar", members), tmp_path / "set")["train"]
    assert summary.samples == 1
    assert dict(summary.unreadable)["a.tar/s/002"] == "it has no picture, but json"
    assert dict(summary.unreadable)["a.tar/s/001"].startswith("its json cannot be read")


def test_a_png_of_another_size_is_no_label_map(tmp_path: Path) -> None:
    members = [member for n in range(3) for member in members_of(n, thumb__png=png(10, 10))]
    summary = pack_all(make_tar(tmp_path / "a.tar", members), tmp_path / "set")["train"]
    assert (summary.samples, summary.unreadable) == (3, [])
    assert {tuple(sorted(sample)) for sample in contents(tmp_path / "set", "train").values()} == {("jpg", "json")}


def test_links_are_never_followed_and_names_never_opened(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(jpeg(50, 50))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("s/000.jpg", str(tmp_path / "secret.jpg"), "../secret.jpg"):
            info = tarfile.TarInfo(name)
            info.size = len(jpeg(40, 30))
            tar.addfile(info, io.BytesIO(jpeg(40, 30)))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            info = tarfile.TarInfo("s/link.jpg")
            info.type, info.linkname = kind, str(tmp_path / "secret.jpg")
            tar.addfile(info)
    found = read(tmp_path / "a.tar")
    assert {sample.image.read() for sample in found.splits["train"]} == {jpeg(40, 30)}
    assert "2 links" in found.notes[0]


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreseen.data.unpack_tar._ALWAYS_ALLOWED", 1 << 20)
    for kind in ("gz", "bz2", "xz"):
        file = make_tar(tmp_path / f"a.tar.{kind}", [("a.jpg", bytes(30_000_000))], f"w:{kind}")
        with pytest.raises(BadInput, match=r"a\.tar\.\w+ of [\d,]+ bytes unpacks to more than"):
            unpack_tar(file, tmp_path / "out.tar")
        assert (tmp_path / "out.tar").stat().st_size < 10_000_000


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_a_compressed_tar_that_is_cut_or_garbled_is_a_sentence(kind: str, tmp_path: Path) -> None:
    file = sound(tmp_path / f"a.tar.{kind}", range(5), mode=f"w:{kind}")
    content = file.read_bytes()
    for damaged in (content[: len(content) // 2], content[:60] + bytes(200) + content[260:], b"not compressed"):
        file.write_bytes(damaged)
        with pytest.raises(BadInput, match=rf"a\.tar\.{kind} is (damaged or incomplete|compressed by nothing)"):
            read(file)


def test_a_truncated_tar_is_refused_with_the_remedy_and_salvaged_by_repair(tmp_path: Path) -> None:
    file = sound(tmp_path / "a.tar", range(6))
    os.truncate(file, scan_tar(file)[18].offset + 5)
    with pytest.raises(BadInput, match=r"truncated: s/004\.json .* `foreseen data repair \S+ OUT` keeps what is whole"):
        read(file)
    found, _ = mend(file, tmp_path / "out")
    assert (found["train"].samples, [name for name, _ in found["train"].unreadable]) == (4, ["a.tar/s/004", "a.tar"])
    assert {tuple(sorted(members)) for members in contents(tmp_path / "out", "train").values()} == {
        ("jpg", "json", "seg.png")
    }, "for the one that lost its label map, the others do not lose theirs"


def test_labels_survive_the_damage_of_a_few_of_their_members(tmp_path: Path) -> None:
    file = make_tar(tmp_path / "a.tar", [member for number in range(6) for member in members_of(number, number % 2)])
    content = bytearray(file.read_bytes())
    content[scan_tar(file)[3].offset - 500] ^= 1  # the header of 001.cls
    file.write_bytes(content)
    found, _ = mend(file, tmp_path / "out")
    assert dict(found["train"].unreadable)["a.tar/s/001"] == "it has no cls, which most of its damaged tar have"
    labels = ShardSet.open(tmp_path / "out", "train").labels
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1]


def test_further_fields_are_chosen_and_those_of_packing_are_renamed(tmp_path: Path) -> None:
    facts = json.dumps({"breed": "cat", "path": "x\n.jpg", "width": 7, "score": float("nan"), "id": 3}).encode()
    file = make_tar(tmp_path / "a.tar", [member for n in range(2) for member in members_of(n, json=facts)])

    def kept(name: str, **options: Any) -> dict[str, Any]:
        pack_all(file, tmp_path / name, **options)
        (facts,) = {
            members["json"] for members in contents(tmp_path / name, "train").values() if b"000.jpg" in members["json"]
        }
        found: dict[str, Any] = json.loads(facts, parse_constant=pytest.fail)
        return {key: value for key, value in found.items() if key not in ("path", "width", "height", "label")}

    assert kept("all", keep=None) == {"source_path": "x\n.jpg", "source_width": 7, "score": None, "id": 3}
    assert kept("one", keep=("id",)) == {"id": 3}
    assert kept("none") == {}
    with pytest.raises(BadInput, match=r"has no column 'idd' to keep; did you mean id\?"):
        read(file, keep=("idd",))


def test_shards_of_a_set_keep_class_names_and_paths_when_they_are_packed_again(damaged: Path, tmp_path: Path) -> None:
    found = pack_all(tmp_path / "whole", tmp_path / "again", keep=None)
    assert {split: summary.samples for split, summary in found.items()} == {"train": 8, "val": 4}
    assert read_manifest(tmp_path / "again").classes == ("a", "b", "c")
    assert read(tmp_path / "whole").licence == "CC0"
    for split in ("train", "val"):
        assert contents(tmp_path / "again", split) == contents(tmp_path / "whole", split)


def test_shards_that_join_a_set_with_other_classes_are_counted_by_name(damaged: Path, tmp_path: Path) -> None:
    joined = ("c", "x", "b", "a")
    found = open_source(str(tmp_path / "whole"), SourceOptions()).read(joined)
    assert found.classes == joined
    for sample in found.splits["train"]:
        number = int(sample.name.partition("/s/")[2].partition(".")[0])
        assert joined[sample.label or 0] == "abc"[number % 3]
    with pytest.raises(BadInput, match="has a class 'b' that the set does not have"):
        open_source(str(tmp_path / "whole"), SourceOptions()).read(("a", "c"))


def test_nothing_is_packed_into_the_folder_of_the_tars(damaged: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    sound(whole / "other-000000.tar", range(3))
    before = {file.name: file.read_bytes() for file in whole.iterdir()}
    for src in (whole / "other-000000.tar", f"{whole}/other-{{000000..000000}}.tar"):
        with pytest.raises(BadInput, match="is the folder of the tars themselves"):
            mend(src, whole)  # type: ignore[arg-type]
        with pytest.raises(BadInput, match="is the folder of the tars themselves"):
            pack_command(str(src), whole, split="other", overwrite=True)
    assert {file.name: file.read_bytes() for file in whole.iterdir()} == before


def test_many_different_extensions_cost_no_more_than_few(tmp_path: Path) -> None:
    members = [m for n in range(5000) for m in ((f"{n}.jpg", jpeg(8, 8)), (f"{n}.{n:04d}.png", b"x"))]
    file = make_tar(tmp_path / "tars" / "a.tar", members)
    tracemalloc.start()
    assert not read(file).splits["train"][0].masks
    index_tars({"train": [file]}, tmp_path / "tars", IndexOptions(), workers=1)
    assert not check_set(tmp_path / "tars", workers=1, decode=False).faults
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100_000_000, "an array of all samples for each extension takes 200 MB"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A packed set of two splits, with damage of four kinds."""
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        sound(tmp_path / "tars" / f"{split}-0.tar", numbers)
    found = read(tmp_path / "tars", columns=Columns(label="breed"))
    for split, samples in found.splits.items():
        pack(samples, tmp_path / "set", split, classes=found.classes, workers=1, licence="CC0", source="here",
             shard_samples=4)  # fmt: skip
    shutil.copytree(tmp_path / "set", tmp_path / "whole")
    file = tmp_path / "set" / "train-000000.tar"
    members = {member.name: member for member in scan_tar(file)}
    content = bytearray(file.read_bytes())
    content[members["000000000.jpg"].offset + 300] ^= 1
    content[members["000000001.json"].offset] = ord("[")
    content[members["000000002.jpg"].offset - 500] ^= 1  # its header
    file.write_bytes(content)
    file = tmp_path / "set" / "train-000001.tar"
    os.truncate(file, scan_tar(file)[3].offset - 512)
    return tmp_path / "set"


def test_repair_keeps_what_is_whole_with_its_bytes_facts_and_splits(damaged: Path, tmp_path: Path) -> None:
    found, said = mend(damaged, tmp_path / "out")
    assert {split: (summary.samples, len(summary.unreadable)) for split, summary in found.items()} == {
        "train": (2, 4), "val": (4, 0),
    }  # fmt: skip
    assert said == ["train-000001.tar has lost 3 of its 4 samples"]
    reasons = " ".join(reason for _, reason in found["train"].unreadable)
    for part in ("crc32 differs", "its json cannot be read", "its header at byte", "it has no picture"):
        assert part in reasons
    for split in ("train", "val"):
        before, after = contents(tmp_path / "whole", split), contents(tmp_path / "out", split)
        assert all(before[name] == members for name, members in after.items())
        one, other = (read_manifest(folder).splits[split] for folder in (tmp_path / "whole", tmp_path / "out"))
        assert (one.licence, one.source, one.image) == (other.licence, other.source, other.image)
    assert read_manifest(tmp_path / "out").classes == ("a", "b", "c")
    assert not check_set(tmp_path / "out", workers=1).faults
    lines = (tmp_path / "out" / "train.unreadable.txt").read_text().splitlines()
    assert len(lines) == 4


def test_repairing_a_sound_set_changes_no_member(damaged: Path, tmp_path: Path) -> None:
    mend(tmp_path / "whole", tmp_path / "out")
    for split in ("train", "val"):
        assert contents(tmp_path / "whole", split) == contents(tmp_path / "out", split)


def test_a_set_whose_manifest_is_broken_is_read_from_its_tars(damaged: Path, tmp_path: Path) -> None:
    (tmp_path / "whole" / "manifest.json").write_text("{")
    found, said = mend(tmp_path / "whole", tmp_path / "out")
    assert {split: summary.samples for split, summary in found.items()} == {"train": 8, "val": 4}
    assert "class names, checksums and licence in it are lost" in said[0]
    labels = ShardSet.open(tmp_path / "out", "train").labels
    assert labels is not None
    assert sorted(labels.tolist()) == [0, 0, 0, 1, 1, 1, 2, 2]
    assert "seg.png" in next(iter(contents(tmp_path / "out", "train").values()))


def test_repair_drops_missing_shards_by_name_and_never_writes_over_its_source(damaged: Path, tmp_path: Path) -> None:
    (damaged / "train-000001.tar").unlink()
    found, said = mend(damaged, tmp_path / "out")
    assert said == ["1 shards of train are missing, such as train-000001.tar with 4 samples"]
    assert found["train"].samples == 1
    with pytest.raises(BadInput, match="is the source itself"):
        mend(damaged, damaged)


def test_repairing_indexed_tars_keeps_labels_and_uses_their_checksums(tmp_path: Path) -> None:
    file = sound(tmp_path / "tars" / "a.tar", range(6))
    index_tars({"train": [file]}, tmp_path / "index", IndexOptions(checksums=True), classes=("x", "y", "z"), workers=1)
    content = bytearray(file.read_bytes())
    content[800] ^= 1
    file.write_bytes(content)
    found, _ = mend(tmp_path / "index", tmp_path / "out", shards_at=tmp_path / "tars")
    assert (found["train"].samples, [reason for _, reason in found["train"].unreadable]) == (
        5, ["its picture is not the one that was packed or indexed (crc32 differs)"],
    )  # fmt: skip
    data = ShardSet.open(tmp_path / "out", "train")
    assert data.classes == ("x", "y", "z")
    assert data.labels is not None
    assert np.bincount(data.labels).tolist() == [1, 2, 2]


def test_the_digest_follows_the_tars_and_not_the_place(tmp_path: Path) -> None:
    file = sound(tmp_path / "one" / "a.tar", range(3))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    digest = TarSource([str(tmp_path / "one")]).digest()
    assert digest == TarSource([str(tmp_path / "two")]).digest()
    sound(file, range(4))
    assert digest != TarSource([str(tmp_path / "one")]).digest()


def test_one_garbled_label_costs_one_sample_and_not_the_repair(tmp_path: Path) -> None:
    members = [member for number in range(4) for member in members_of(number, ("cat", "dog")[number % 2])]
    file = make_tar(tmp_path / "tars" / "a.tar", members)
    index_tars({"train": [file]}, tmp_path / "tars", IndexOptions(), workers=1)
    content = bytearray(file.read_bytes())
    content[scan_tar(file)[3].offset] = ord("f")
    file.write_bytes(content)
    found, _ = mend(tmp_path / "tars", tmp_path / "out")
    assert found["train"].unreadable == [("a.tar/s/001", "its label is 'fog', which is no class of the set")]
    assert found["train"].samples == 3


def test_class_names_beside_the_tars_are_part_of_the_digest(tmp_path: Path) -> None:
    sound(tmp_path / "a.tar", range(3))
    before = TarSource([str(tmp_path)]).digest()
    (tmp_path / "classes.txt").write_text("x\ny\nz\n")
    assert TarSource([str(tmp_path)]).digest() != before
