"""What a user may rely on in procedural pets: the same bytes for the same seed, true annotations, no shortcut."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foreseen.data.procedural import BACKGROUND, BORDER, BREEDS, PET, draw_pet, write_procedural_pets
from foreseen.data.shards import ShardSet
from foreseen.errors import BadInput


def test_the_same_seed_and_number_draw_the_same_bytes() -> None:
    for number in range(12):
        one, two = draw_pet(3, number), draw_pet(3, number)
        assert one.image.tobytes() == two.image.tobytes()
        assert one.mask.tobytes() == two.mask.tobytes()
        assert (one.head_box, one.label) == (two.head_box, two.label)


def test_no_two_pictures_are_alike() -> None:
    pictures = {draw_pet(seed, number).image.tobytes() for seed in range(3) for number in range(40)}
    assert len(pictures) == 3 * 40


def test_a_dozen_breeds_come_equally_often() -> None:
    assert len(set(BREEDS)) == 12
    assert np.bincount([draw_pet(0, number, size=32).label for number in range(60)]).tolist() == [5] * 12


@pytest.mark.parametrize("size", [32, 48, 129, 224])
def test_mask_and_head_box_agree_and_lie_in_the_picture(size: int) -> None:
    for number in range(24):
        pet = draw_pet(1, number, size=size)
        assert pet.image.shape == (size, size, 3)
        assert pet.image.dtype == pet.mask.dtype == np.uint8
        assert set(np.unique(pet.mask)) == {PET, BACKGROUND, BORDER}
        left, top, right, bottom = pet.head_box
        assert 0 <= left < right <= size
        assert 0 <= top < bottom <= size
        outside = pet.mask == PET
        outside[top:bottom, left:right] = False
        assert not outside.any()
        visible = (pet.mask[top:bottom, left:right] == PET).mean()
        assert visible > 0.25, f"the pet fills {visible:.0%} of its box in picture {number}"


def test_the_same_number_shows_the_same_pet_at_any_size() -> None:
    for number in range(12):
        small, large = draw_pet(0, number, size=32), draw_pet(0, number, size=128)
        np.testing.assert_allclose(np.array(large.head_box) / 4, small.head_box, atol=1.5)
        agrees = small.mask == large.mask.reshape(32, 4, 32, 4)[:, 2, :, 2]
        assert agrees.mean() > 0.9
        means = large.image.reshape(32, 4, 32, 4, 3).mean((1, 3))
        assert np.corrcoef(means.ravel(), small.image.ravel())[0, 1] > 0.9


def test_pixels_of_few_labelled_pictures_do_not_tell_the_breed() -> None:
    pets = [draw_pet(0, number, size=32) for number in range(480)]
    pixels = np.stack([pet.image for pet in pets]).reshape(len(pets), -1).astype(np.float32)
    labels = np.array([pet.label for pet in pets])
    accuracy = []
    for known in np.arange(480).reshape(4, 120):
        asked = np.setdiff1d(np.arange(480), known)
        distance = (pixels[known] ** 2).sum(1) - 2 * pixels[asked] @ pixels[known].T
        accuracy.append((labels[known][distance.argmin(axis=1)] == labels[asked]).mean())
    assert np.mean(accuracy) < 3 / 12


def read_members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


def test_the_written_set_opens_with_labels_masks_and_boxes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "pets"
    write_procedural_pets(out, train=24, test=12, size=32, seed=4, workers=1)
    train, test = ShardSet.open(out, "train"), ShardSet.open(out, "test")
    assert train.classes == test.classes == BREEDS
    assert (len(train), len(test)) == (24, 12)
    assert train.labels is not None
    assert np.bincount(train.labels).tolist() == [2] * 12
    members = read_members(out / "train-000000.tar")
    for sample in range(24):
        facts = json.loads(members[f"{sample:09d}.json"])
        pet = draw_pet(4, int(Path(facts["path"]).stem), size=32)
        assert facts["label"] == train.labels[sample] == pet.label
        assert facts["head_box"] == list(pet.head_box)
        np.testing.assert_array_equal(Image.open(io.BytesIO(members[f"{sample:09d}.trimap.png"])), pet.mask)
        pixels = np.asarray(Image.open(io.BytesIO(train.read(sample)))).astype(int)
        assert np.abs(pixels - pet.image).mean() < 4
    assert sorted(path.name for path in out.parent.iterdir()) == ["pets"], "something is left beside the set"


def test_the_set_depends_on_seed_and_sizes_and_not_on_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foreseen.data.procedural.PETS_PER_FILE", 12)
    write_procedural_pets(tmp_path / "one", train=12, test=12, size=32, seed=0, workers=1)
    write_procedural_pets(tmp_path / "two", train=24, test=12, size=32, seed=0, workers=2)
    write_procedural_pets(tmp_path / "three", train=12, test=12, size=32, seed=1, workers=1)
    one, two, three = (read_members(tmp_path / name / "test-000000.tar") for name in ("one", "two", "three"))
    assert one == two
    assert set(one.values()).isdisjoint(three.values())


def test_no_picture_is_in_train_and_test(tmp_path: Path) -> None:
    write_procedural_pets(tmp_path / "pets", train=24, test=24, size=32, seed=0, workers=1)
    train, test = (ShardSet.open(tmp_path / "pets", split) for split in ("train", "test"))
    assert {train.read(sample) for sample in range(24)}.isdisjoint(test.read(sample) for sample in range(24))


def test_a_set_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    for out, train, size, words in (("taken", 12, 32, "exists"), ("new", 0, 32, "train=0"), ("new", 12, 8, "size=8")):
        with pytest.raises(BadInput, match=words):
            write_procedural_pets(tmp_path / out, train=train, test=12, size=size, seed=0, workers=1)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("number", "size", "words"), [(0, 16, "not size=16"), (0, 5000, "not size=5000"), (-1, 48, "number=-1")]
)
def test_impossible_requests_are_refused_in_a_sentence(number: int, size: int, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        draw_pet(0, number, size=size)
