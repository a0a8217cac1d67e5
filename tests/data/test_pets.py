"""Oxford-IIIT Pet: the splits, labels, boxes and trimaps of the archives, and what happens when they are not right."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foreseen.data import pets
from foreseen.data.manifest import read_manifest
from foreseen.data.pets import pack_pets
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput
from tests.pets_archives import XML, jpeg, make_archives, png


def read_samples(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """Members of each sample by the picture's name."""
    samples: dict[str, dict[str, bytes]] = {}
    for file in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(file) as tar:
            for info in tar:
                key, extension = info.name.split(".", 1)
                samples.setdefault(file.name + key, {})[extension] = tar.extractfile(info).read()  # type: ignore[union-attr]
    return {json.loads(sample["json"])["name"]: sample for sample in samples.values()}


def test_the_archives_become_two_splits_with_all_that_is_known(tmp_path: Path) -> None:
    archives = make_archives(tmp_path / "archives")
    summaries = pack_pets(tmp_path / "set", archives, workers=1)
    assert [(summary.split, summary.samples) for summary in summaries] == [("train", 3), ("test", 1)]
    manifest = read_manifest(tmp_path / "set")
    assert manifest.classes == ("Abyssinian", "great pyrenees")
    assert manifest.splits["test"].licence == "CC BY-SA 4.0"
    samples = read_samples(tmp_path / "set", "train")
    assert {frozenset(sample) for sample in samples.values()} == {frozenset({"jpg", "json", "trimap.png"})}
    assert json.loads(samples["Abyssinian_1"]["json"]) == {
        "path": "images/Abyssinian_1.jpg",
        "width": 80,
        "height": 60,
        "label": 0,
        "name": "Abyssinian_1",
        "breed": "Abyssinian",
        "species": "cat",
        "head_box": [20, 10, 60, 40],
    }
    assert samples["Abyssinian_1"]["jpg"] == jpeg(80, 60)
    assert samples["Abyssinian_1"]["trimap.png"] == png(80, 60)
    assert json.loads(samples["great_pyrenees_2"]["json"])["head_box"] is None
    labels = ShardSet.open(tmp_path / "set", "test").labels
    assert labels is not None
    assert labels.tolist() == [1]
    assert not list((tmp_path / "set").glob(".*")), "a work folder is left"


def test_shrinking_scales_trimap_and_box(tmp_path: Path) -> None:
    pack_pets(tmp_path / "set", make_archives(tmp_path / "archives"), max_side=40, workers=1)
    sample = read_samples(tmp_path / "set", "train")["Abyssinian_1"]
    facts = json.loads(sample["json"])
    assert (facts["width"], facts["height"], facts["head_box"]) == (40, 30, [10, 5, 30, 20])
    trimap = np.asarray(Image.open(io.BytesIO(sample["trimap.png"])))
    assert trimap.shape == (30, 40)
    assert set(trimap.ravel()) == {1, 2, 3}


def test_a_png_under_the_name_jpg_is_converted_as_in_the_official_archive(tmp_path: Path) -> None:
    archives = make_archives(tmp_path / "archives", {"images/Abyssinian_3.jpg": jpeg(82, 60, "PNG")})
    train, _ = pack_pets(tmp_path / "set", archives, workers=1)
    assert (train.converted, train.samples) == (1, 3)


def test_after_a_kill_between_the_splits_only_the_missing_one_is_packed(tmp_path: Path) -> None:
    archives, out = make_archives(tmp_path / "archives"), tmp_path / "set"

    def stop_at_test(what: str) -> object:
        if what == "test":
            raise KeyboardInterrupt
        return lambda done, total: None

    with pytest.raises(KeyboardInterrupt):
        pack_pets(out, archives, workers=1, progress=stop_at_test)  # type: ignore[arg-type]
    assert list(read_manifest(out).splits) == ["train"]
    with pytest.raises(BadInput, match=r"has the split 'train' with --max-side None, not 40"):
        pack_pets(out, archives, workers=1, max_side=40)
    assert [summary.split for summary in pack_pets(out, archives, workers=1)] == ["test"]
    with pytest.raises(BadInput, match="already has the splits train and test"):
        pack_pets(out, archives, workers=1)
    assert len(pack_pets(out, archives, workers=1, overwrite=True)) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images/Abyssinian_3.jpg": None}, r"no images/Abyssinian_3\.jpg, which trainval\.txt lists"),
        ({"annotations/trimaps/Abyssinian_3.png": None}, r"no annotations/trimaps/Abyssinian_3\.png"),
        ({"annotations/test.txt": None}, r"no annotations/test\.txt"),
        ({"annotations/test.txt": b"one two three\n"}, r"a line 'one two three'"),
        ({"annotations/test.txt": b"pug_1 1 2 1\n"}, r"gives class 1 to 'Abyssinian' and to 'pug'"),
        ({"annotations/test.txt": b"Abyssinian_1 5 1 1\n"}, r"gives class|classes"),
        ({"annotations/xmls/Abyssinian_1.xml": b"<annotation>"}, r"Abyssinian_1\.xml is no annotation"),
        ({"annotations/xmls/Abyssinian_1.xml": XML.format("").encode()}, r"Abyssinian_1\.xml is no annotation"),
    ],
)
def test_archives_that_are_not_right_are_refused_and_nothing_is_left(
    changes: dict[str, bytes | None], message: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        pack_pets(tmp_path / "set", make_archives(tmp_path / "archives", changes), workers=1)
    assert not (tmp_path / "set").exists()


def test_a_truncated_or_missing_archive_is_named(tmp_path: Path) -> None:
    archives = make_archives(tmp_path / "archives")
    file = archives / "images.tar.gz"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(BadInput, match=r"images\.tar\.gz is damaged or incomplete"):
        pack_pets(tmp_path / "set", archives, workers=1)
    file.unlink()
    with pytest.raises(BadInput, match=r"images\.tar\.gz does not exist: --from must be"):
        pack_pets(tmp_path / "set", archives, workers=1)
    assert not (tmp_path / "set").exists()


def test_a_download_is_compared_with_the_official_checksums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archives = make_archives(tmp_path / "archives")
    monkeypatch.setattr(pets, "URL", archives.as_uri() + "/")
    with pytest.raises(BadInput, match=r"has the md5 [0-9a-f]+, not 5c4f3ee8e5d25df40f4fd59a7f44e54c"):
        pack_pets(tmp_path / "set", workers=1)
    assert not (tmp_path / "set").exists()
    sums = {name: hashlib.md5((archives / name).read_bytes()).hexdigest() for name in pets.MD5}
    monkeypatch.setattr(pets, "MD5", sums)
    assert [summary.samples for summary in pack_pets(tmp_path / "set", workers=1)] == [3, 1]
    monkeypatch.setattr(pets, "URL", "file:///nowhere/")
    with pytest.raises(BadInput, match=r"cannot be downloaded .*: fetch it otherwise and give --from"):
        pack_pets(tmp_path / "other", workers=1)


@pytest.mark.slow
def test_the_real_archives(pets_archives: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    train, test = pack_pets(out, pets_archives, max_side=160)
    assert (train.samples, train.unreadable, test.samples, test.unreadable) == (3680, [], 3669, [])
    assert train.shrunk > 3000
    boxes, breeds = 0, {}
    for split in ("train", "test"):
        data = ShardSet.open(out, split)
        assert data.classes is not None
        assert data.labels is not None
        assert len(data.classes) == 37
        assert np.bincount(data.labels).min() >= 88
        for sample in read_samples(out, split).values():
            facts = json.loads(sample["json"])
            assert max(facts["width"], facts["height"]) <= 160
            assert Image.open(io.BytesIO(sample["jpg"])).size == (facts["width"], facts["height"])
            assert Image.open(io.BytesIO(sample["trimap.png"])).size == (facts["width"], facts["height"])
            assert data.classes[facts["label"]] == facts["breed"]
            assert (facts["species"] == "cat") == facts["breed"][0].isupper()
            breeds[facts["breed"]] = facts["species"]
            if facts["head_box"]:
                boxes += 1
                xmin, ymin, xmax, ymax = facts["head_box"]
                assert 0 <= xmin < xmax <= facts["width"]
                assert 0 <= ymin < ymax <= facts["height"]
    assert boxes == 3671
    assert list(breeds.values()).count("cat") == 12
