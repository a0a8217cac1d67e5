"""Splits by shares: they hold in every class, added pictures move hardly any, and samples of a name stay together."""

from pathlib import Path

import numpy as np
import pytest

from foreseen.data.open_source import SourceOptions, open_source
from foreseen.data.source import Blob, SourceSample, Splits
from foreseen.data.split_fractions import divide, parse_fractions
from foreseen.data.subsets import cut_fractions
from foreseen.errors import BadInput

SHARES = {"train": 0.8, "validation": 0.1, "test": 0.1}


def cut(labels: list[int], names: list[str], seed: int = 0, shares: dict[str, float] = SHARES) -> dict[str, set[str]]:
    classes = [f"class {number}" for number in range(max(labels) + 1)]
    found = cut_fractions(np.array(labels), names, shares, classes, seed)
    assert sorted(np.concatenate([*found.values()]).tolist()) == [*range(len(names))]
    return {split: {names[sample] for sample in samples} for split, samples in found.items()}


def named(count: int, tag: str = "") -> list[str]:
    return [f"{tag}{number}.jpg" for number in range(count)]


def test_shares_hold_in_every_class_and_for_the_unlabelled() -> None:
    labels = [*[0] * 100, *[1] * 50, *[-1] * 1000]
    found = cut(labels, named(1150))
    of = dict(zip(named(1150), labels, strict=True))
    for label, count in ((0, 100), (1, 50), (-1, 1000)):
        for split, share in SHARES.items():
            assert abs(sum(of[name] == label for name in found[split]) - share * count) < 2


def test_many_small_classes_together_come_out_right_and_none_is_without_training() -> None:
    labels = [number // 3 for number in range(3000)] + [1000 + number for number in range(100)]
    found = cut(labels, named(3100))
    for split, share in SHARES.items():
        assert abs(len(found[split]) - share * 3000) < 120, split
    of = dict(zip(named(3100), labels, strict=True))
    assert {of[name] for name in found["train"]} == {*range(1100)}


def test_pictures_that_are_added_move_hardly_any_other() -> None:
    labels, names = [0, 1] * 500, named(1000)
    before = cut(labels, names)
    after = cut([*labels, *[0] * 20, *[2] * 5], [*names, *named(25, "more ")])
    moved = sum(len(before[split] - after[split]) for split in SHARES)
    assert moved <= 10
    other_order = cut(labels[::-1], names[::-1])
    assert before == other_order
    assert sum(len(before[split] & cut(labels, names, seed=1)[split]) for split in ("validation", "test")) < 60


def test_samples_of_one_picture_stay_together() -> None:
    names = named(60) * 2
    found = cut([0] * 120, names)
    assert len(found["train"] | found["validation"] | found["test"]) == 60
    assert not found["train"] & found["validation"]
    assert not (found["train"] | found["validation"]) & found["test"]


def test_a_source_without_splits_is_divided_and_one_of_several_is_chosen(picture_folder: Path) -> None:
    found = open_source(str(picture_folder), SourceOptions(labels="folder")).read()
    parts = divide(found, None, {"a": 0.5, "b": 0.5}, 0)
    assert [*parts] == ["a", "b"]
    everything = [sample.name for part in parts.values() for sample in part]
    assert sorted(everything) == [sample.name for sample in found.splits["train"]]
    with pytest.raises(BadInput, match="--split x and --split-fractions both name the splits"):
        divide(found, "x", {"a": 0.5, "b": 0.5}, 0)
    named = Splits({"train": found.splits["train"], "test": []}, are_named=True, classes=found.classes)
    with pytest.raises(BadInput, match="the source has the splits train, test: .* choose the one to divide by --split"):
        divide(named, None, {"a": 0.5, "b": 0.5}, 0)
    assert [*divide(named, "train", {"a": 0.5, "b": 0.5}, 0)] == ["a", "b"]


def test_a_share_that_is_no_picture_is_refused() -> None:
    samples = [SourceSample(f"{number}.jpg", Blob("x", 1)) for number in range(3)]
    with pytest.raises(BadInput, match=r"--split-fractions test=0\.0001 of 3 pictures is none: give it more"):
        divide(Splits({"train": samples}, are_named=False), None, {"train": 0.9999, "test": 0.0001}, 0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("train=0.8,test=0.3", r"the shares of --split-fractions sum to 1\.1, they must sum to 1"),
        ("train=0.5,train=0.5", "names 'train' twice"),
        ("train=80%,test=20%", "has 'train=80%', it must be of NAME=SHARE between commas"),
        ("train", "has 'train', it must be of NAME=SHARE"),
        ("train=1", "has 'train=1', it must be .* between 0 and 1"),
        ("../x=0.5,y=0.5", r"has '\.\./x=0\.5'"),
        ("train=nan,y=0.5", "has 'train=nan'"),
        ("", "has ''"),
    ],
)
def test_shares_that_make_no_sense_are_refused_with_a_sentence(text: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        parse_fractions(text)


def test_thirds_are_three_shares() -> None:
    assert parse_fractions("a=0.333333, b=0.333333,c=0.333334") == {"a": 0.333333, "b": 0.333333, "c": 0.333334}
