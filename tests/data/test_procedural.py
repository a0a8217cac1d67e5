"""What a user may rely on in procedural pets: the same bytes for the same seed, true annotations, no shortcut."""

import numpy as np
import pytest

from foreseen.data.procedural import BACKGROUND, BORDER, BREEDS, PET, draw_pet


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
    pets = [draw_pet(0, number, size=32) for number in range(120 + 600)]
    pixels = np.stack([pet.image for pet in pets]).reshape(len(pets), -1).astype(np.float32)
    labels = np.array([pet.label for pet in pets])
    known, asked = pixels[:120], pixels[120:]
    nearest = ((known**2).sum(1) - 2 * asked @ known.T).argmin(axis=1)
    assert (labels[nearest] == labels[120:]).mean() < 3 / 12


@pytest.mark.parametrize(
    ("number", "size", "words"), [(0, 16, "not size=16"), (0, 5000, "not size=5000"), (-1, 48, "number=-1")]
)
def test_impossible_requests_are_refused_in_a_sentence(number: int, size: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_pet(0, number, size=size)
