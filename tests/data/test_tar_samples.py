"""Members to samples: webdataset's rule, and everything that its readers stumble over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreseen.data.tar_paths import by_split, find_tars, holds_tars
from foreseen.data.tar_samples import TarSamples, group_members, regroup
from foreseen.data.tars import read_tar
from foreseen.errors import BadInput
from tests.tars_of_others import make_tar


def group(tmp_path: Path, *names: str) -> TarSamples:
    return group_members(read_tar(make_tar(tmp_path / "a.tar", [(name, name.encode()) for name in names])))


def as_dict(samples: TarSamples) -> list[tuple[str, list[str]]]:
    return [(key, samples.extensions_of(number)) for number, key in enumerate(samples.keys)]


ODD_NAMES = [
    "a.jpg", "a.SEG.png", "b.c/d.jpg", "b.c/d.e.json", "./f.jpg", "g h é.jpeg", "noextension", "__meta__",
    "__x__/y.jpg", "/abs/i.jpg", "../up/j.jpg",
]  # fmt: skip


def test_keys_and_extensions_are_those_of_webdataset(tmp_path: Path) -> None:
    samples = group(tmp_path, *ODD_NAMES)
    script = """
import json, sys, webdataset
samples = webdataset.WebDataset(sys.argv[1:], shardshuffle=False, empty_check=False)
print(json.dumps([[s["__key__"], [name for name in s if not name.startswith("__")]] for s in samples]))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.tar")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout)
    assert [list(pair) for pair in as_dict(samples)] == found
    assert (samples.hidden, samples.nameless) == (2, 1)


def test_hidden_and_appledouble_members_are_passed_over(tmp_path: Path) -> None:
    samples = group(tmp_path, "d/._a.jpg", "d/a.jpg", "._b.jpg", ".DS_Store")
    assert as_dict(samples) == [("d/a", ["jpg"])]
    assert samples.passed_over() == {"hidden members": 3}


def test_a_dot_in_a_folder_is_no_extension(tmp_path: Path) -> None:
    assert as_dict(group(tmp_path, "v1.0/a.jpg", "v1.0/b")) == [("v1.0/a", ["jpg"])]


def test_scattered_keys_duplicate_keys_and_members_are_told_apart(tmp_path: Path) -> None:
    names = ["a.jpg", "b.jpg", "a.cls", "c.jpg", "c.cls", "d.jpg", "c.jpg", "c.cls", "e.jpg", "e.cls", "e.jpg", "f.cls"]
    faults = group(tmp_path, *names).faults()
    assert [(fault.key, fault.kind) for fault in faults] == [
        ("a", "scattered"), ("c", "duplicate key"), ("e", "duplicate member"), ("f", "no picture"),
    ]  # fmt: skip
    assert faults[1].reason == "another sample has the same key (both have jpg)"
    assert faults[3].reason == "it has no picture, but cls"


def test_the_picture_is_the_jpg_before_others_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    samples = group(tmp_path, "a.png", "a.jpg", "b.webp", "b.png", "c.tiff", "d.JPEG", "d.seg.png")

    def taken(image: str | None = None) -> list[str | None]:
        found = samples.pictures(image).tolist()
        return [None if member < 0 else samples.extensions[samples.extension[member]] for member in found]

    assert taken() == ["jpg", "png", "tiff", "jpeg"]
    assert taken("png") == ["png", "png", None, None]
    assert samples.several_pictures() == 2
    assert [fault.reason for fault in samples.faults("seg.png")][:1] == ["it has no member seg.png, but png, jpg"]


def test_members_that_nobody_reads_are_counted_and_named(tmp_path: Path) -> None:
    samples = group(tmp_path, "a.jpg", "a.pyd", "a.pkl", "b.jpg", "b.pkl", "b.pth", "b.json", "b.cls")
    assert samples.unread() == {"pyd": 1, "pkl": 2, "pth": 1}


def test_samples_with_other_members_have_another_number(tmp_path: Path) -> None:
    sets = group(tmp_path, "a.jpg", "a.cls", "b.cls", "b.jpg", "c.jpg", "d.jpg", "d.json").member_sets
    assert sets[0] == sets[1]
    assert len(set(sets.tolist())) == 3


def test_what_can_be_sorted_out_in_one_way_is(tmp_path: Path) -> None:
    samples, troubles = regroup(
        group(
            tmp_path, "a.jpg", "b.jpg", "a.cls", "b.cls", "c.jpg", "c.cls", "c.jpg", "c.cls", "d.jpg", "d.jpg", "d.cls"
        )
    )
    assert as_dict(samples) == [
        ("a", ["jpg", "cls"]), ("b", ["jpg", "cls"]), ("c", ["jpg", "cls"]), ("d", ["jpg", "jpg", "cls"]),
        ("c", ["jpg", "cls"]),
    ]  # fmt: skip
    assert list(troubles) == [3]
    assert troubles[3] == "its members cannot be told apart: the tar has jpg; cls, jpg under this key"


def test_a_large_tar_takes_no_object_a_member(tmp_path: Path) -> None:
    samples = group(tmp_path, *(f"{n:05d}.{extension}" for n in range(2000) for extension in ("jpg", "json")))
    assert len(samples.keys) == 2000
    assert (samples.pictures() == range(0, 4000, 2)).all()
    assert not samples.faults()


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train-000.tar", "val-000.tar", "train-001.tar"], {"train": 2, "val": 1}),
        (["imagenet1k-validation-00.tar.gz", "imagenet1k-train-00.tar.gz"], {"train": 1, "validation": 1}),
        (["a.tar", "val-0.tar"], {"train": 2}),
        (["train-test-0.tar", "test-0.tar"], {"train": 2}),
        (["trainer.tar"], {"train": 1}),
    ],
)
def test_splits_are_named_where_all_file_names_say_one(names: list[str], splits: dict[str, int]) -> None:
    found, _ = by_split([Path(name) for name in names])
    assert {split: len(files) for split, files in found.items()} == splits
    assert next(iter(found)) == "train"


def test_tars_are_found_in_folders_by_name_and_by_patterns(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "c.tgz", "notes.txt"):
        (tmp_path / name).touch()
    assert [file.name for file in find_tars([str(tmp_path)])] == ["b-0.tar", "b-1.tar", "c.tgz"]
    assert [file.name for file in find_tars([str(tmp_path / "b-{1..0}.tar")])] == ["b-1.tar", "b-0.tar"]
    assert holds_tars(str(tmp_path))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jpg").touch()
    assert not holds_tars(str(tmp_path)), "pictures with a tar beside them are a folder of pictures"
    for place, sentence in (
        (tmp_path / "b-{0..2}.tar", r"b-2\.tar does not exist"),
        (tmp_path / "d", "holds no tars"),
        (tmp_path / "{0..99999999}.tar", "names more than 1,000,000 tars"),
    ):
        with pytest.raises(BadInput, match=sentence):
            find_tars([str(place)])
    with pytest.raises(BadInput, match="have the same file name"):
        find_tars([str(tmp_path / "b-0.tar"), str(tmp_path)])
