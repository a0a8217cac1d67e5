"""An index for tars that others made: what it says, what it refuses, and that it touches nothing."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from foreseen.data.index_tars import Indexed, IndexOptions, index_tars
from foreseen.data.manifest import read_manifest
from foreseen.data.shards import ShardSet
from foreseen.data.tar_labels import LabelRule, number_texts
from foreseen.data.tar_paths import by_split, find_tars
from foreseen.errors import BadInput
from tests.pets_archives import jpeg
from tests.tars_of_others import make_tar, members_of, sound


def index(folder: Path, out: Path | None = None, labels: str | None = None, **options: object) -> list[Indexed]:
    more = {key: options.pop(key) for key in ("classes", "overwrite", "workers", "progress") if key in options}
    rule = None if labels is None else LabelRule.parse(labels)
    splits, _ = by_split(find_tars([str(folder)]))
    return index_tars(splits, out or folder, IndexOptions(labels=rule, **options), **({"workers": 1} | more))  # type: ignore[arg-type]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of two splits, 25 samples in all."""
    for name, numbers in (("train-0", range(10)), ("train-1", range(10, 20)), ("val-0", range(20, 25))):
        sound(tmp_path / "tars" / f"{name}.tar", numbers)
    return tmp_path / "tars"


def test_every_sample_is_read_by_its_number_in_the_order_of_the_tars(tars: Path) -> None:
    before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tars.iterdir()}
    found = index(tars)
    assert [(one.split, one.entry.samples, one.labels) for one in found] == [("train", 20, "cls"), ("val", 5, "cls")]
    data = ShardSet.open(tars, "train")
    data.check_sizes()
    assert [data.read(number) for number in range(20)] == [jpeg(40 + number, 30) for number in range(20)]
    assert data.labels is not None
    assert data.labels.tolist() == [number % 3 for number in range(20)]
    assert data.classes == ("0", "1", "2")
    assert data.describe(13) == "train-1.tar: sample 3 (key s/013)"
    assert {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in tars.glob("*.tar")} == before
    assert ShardSet.open(tars, "val").mean is None


def test_labels_by_name_come_from_a_json_field_and_numbers_keep_their_value(tars: Path) -> None:
    index(tars, labels="json:breed")
    data = ShardSet.open(tars, "val")
    assert data.classes == ("a", "b", "c")
    assert data.labels is not None
    assert data.labels.tolist() == [number % 3 for number in range(20, 25)]
    index(tars, labels="json:note", overwrite=True)
    assert ShardSet.open(tars, "val").labels.tolist() == list(range(20, 25))  # type: ignore[union-attr]
    index(tars, labels="cls", classes=("x", "y", "z"), overwrite=True)
    assert ShardSet.open(tars, "val").classes == ("x", "y", "z")
    index(tars, labels="none", overwrite=True)
    assert ShardSet.open(tars, "val").labels is None


@pytest.mark.parametrize(
    ("label", "rule", "sentence"),
    [
        ("cat", "cls", r"--labels cls of .* mixes numbers \('0'\) and names \('cat'\)"),
        ("-7", "cls", r"has the label -7, it must lie in \[0, 999999\]"),
        ("9999999", "cls", "has the label 9999999"),
        ("x" * 2000, "cls", r"sample s/002 has no label .*its cls has 2,000 bytes, more than the 1,024"),
        ("0", "json:breed", r"sample s/002 has no label .*it has no member json"),
    ],
)
def test_labels_that_make_no_sense_are_refused(label: str, rule: str, sentence: str, tmp_path: Path) -> None:
    facts = json.dumps({"breed": "a"}).encode()
    members = members_of(0, 0, json=facts) + members_of(1, 1, json=facts) + members_of(2, label)
    make_tar(tmp_path / "a.tar", members)
    with pytest.raises(BadInput, match=sentence):
        index(tmp_path, labels=rule)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"], "a refusal leaves nothing"


@pytest.mark.parametrize("value", ["true", "1.5", "[1]", '"two\\nlines"', "1e400"])
def test_json_labels_are_whole_numbers_or_names(value: str, tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", members_of(0, json=f'{{"label": {value}}}'.encode()))
    with pytest.raises(BadInput, match=r"sample s/000 has no label that can be used \(its label"):
        index(tmp_path, labels="json:label")


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 10, "3", '{"label": ' + "9" * 5000 + "}", "\x80"])
def test_a_json_that_is_none_is_a_sentence(text: str, tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", members_of(0, json=text.encode("latin-1")))
    with pytest.raises(BadInput, match=r"has no label that can be used \(its json"):
        index(tmp_path, labels="json:label")


def test_unlabelled_samples_are_minus_one(tmp_path: Path) -> None:
    facts = [b'{"label": 1}', b'{"label": null}', b"{}", b'{"label": -1}', b'{"label": ""}']
    make_tar(tmp_path / "a.tar", [member for n, fact in enumerate(facts) for member in members_of(n, json=fact)])
    index(tmp_path, labels="json:label")
    assert ShardSet.open(tmp_path, "train").labels.tolist() == [1, -1, -1, -1, -1]  # type: ignore[union-attr]


def test_scattered_and_duplicate_keys_are_refused_with_names_and_the_remedy(tmp_path: Path) -> None:
    members = [member for number in range(6) for member in members_of(number, 0)]
    make_tar(tmp_path / "a.tar", members[::2] + members[1::2])
    with pytest.raises(
        BadInput, match=r"6 scattered \(s/000, s/001, s/002 and 3 more: .*`foreseen data repair \S+ OUT`"
    ):
        index(tmp_path)
    make_tar(tmp_path / "a.tar", members + members[:2])
    with pytest.raises(BadInput, match=r"1 duplicate key \(s/000: another sample has the same key"):
        index(tmp_path)
    make_tar(tmp_path / "a.tar", members)
    with pytest.raises(BadInput, match=r"6 no picture .*it has no member png, but jpg, cls\): give another --image"):
        index(tmp_path, image="png")
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(BadInput, match=r"is truncated.*`foreseen data repair \S+ OUT` makes a clean copy"):
        index(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a.tar"]


def test_the_index_may_lie_elsewhere_and_never_says_where_the_tars_are(tars: Path, tmp_path: Path) -> None:
    index(tars, tmp_path / "elsewhere", checksums=True)
    index(tars, checksums=True)
    assert sorted(file.name for file in (tmp_path / "elsewhere").iterdir()) == [
        "manifest.json", "train.index.npy", "train.labels.npy", "val.index.npy", "val.labels.npy",
    ]  # fmt: skip
    assert str(tmp_path) not in (tmp_path / "elsewhere" / "manifest.json").read_text()
    assert read_manifest(tmp_path / "elsewhere") == read_manifest(tars)


def test_a_folder_that_cannot_be_written_names_the_remedy(tars: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(BadInput, match="cannot be written: give --out DIR"):
        index(tars)


def test_workers_change_nothing_and_progress_is_told(tars: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    index(tars, tmp_path / "one", checksums=True, statistics=True, progress=lambda *n: seen.append(n))
    index(tars, tmp_path / "two", checksums=True, statistics=True, workers=2)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_checksums_and_statistics_are_those_of_the_pictures(tars: Path) -> None:
    index(tars, checksums=True, statistics=True)
    data = ShardSet.open(tars, "train")
    assert (data.picture_digests() & np.uint64(0xFFFFFFFF)).all()
    assert data.mean == pytest.approx([(40 + 9.5) / 255, 30 / 255, 90 / 255], abs=0.01)
    file = tars / "train-0.tar"
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="crc32 differs"):
        ShardSet.open(tars, "train").read(0)


def test_a_split_that_exists_is_replaced_only_when_asked(tars: Path) -> None:
    index(tars)
    with pytest.raises(BadInput, match="already has a split 'train'.*--overwrite"):
        index(tars)
    index(tars, overwrite=True)


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    members = members_of(0, 1, pkl=b"x") + members_of(1, 1) + [("s/001.png", b""), ("s/._1.jpg", b"")]
    make_tar(tmp_path / "a.tar", members)
    (found,) = index(tmp_path)
    assert found.notes == (
        "never opened: 1 *.pkl, 1 hidden members",
        "1 samples have several pictures: one is read, jpg before png; --image EXT chooses",
    )


@pytest.mark.parametrize("names", [("0", "2", "1"), ("1", "2", "3"), ("001", "002", "003")])
def test_a_number_that_is_the_name_of_another_class_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(BadInput, match=r"has the label [12], which may be the class of that number, '\d+', or that of"):
        number_texts(["1", "2"], "cls of here", names)
    assert number_texts(["1", "2"], "cls of here", ("0", "1", "2"))[0]["2"] == 2
    assert number_texts(["10", "20"], "cls of here", ("10", "20"))[0]["20"] == 1, (
        "names, since there are no such numbers"
    )
