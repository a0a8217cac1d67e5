import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foreseen.data.subsets import cut_test, labelled_subsets
from foreseen.errors import BadInput


def cut(labels, shots=None, seed=0, fraction=0.1):
    return labelled_subsets(np.asarray(labels), validation_fraction=fraction, shots=shots, seed=seed)


def many(per_class=50, classes=7):
    return np.random.default_rng(1).permutation(np.repeat(np.arange(classes), per_class))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.floats(0.01, 0.9), st.integers(0, 3))
def test_every_labelled_sample_is_in_exactly_one_part(labels, fraction, seed):
    labels = np.array(labels)
    if (labels < 0).all():
        with pytest.raises(BadInput, match="has a label"):
            cut(labels, fraction=fraction, seed=seed)
        return
    parts = cut(labels, fraction=fraction, seed=seed)
    assert sorted([*parts.train, *parts.validation]) == np.flatnonzero(labels >= 0).tolist()
    for label in set(labels[labels >= 0].tolist()):
        assert (labels[parts.train] == label).any()
        assert (labels[parts.validation] == label).any() or (labels == label).sum() == 1


def test_each_class_gives_its_share_to_validation():
    labels = many()
    assert np.bincount(labels[cut(labels).validation]).tolist() == [5] * 7
    assert np.bincount(labels[cut(labels, fraction=0.001).validation]).tolist() == [1] * 7


def test_more_shots_contain_fewer_and_leave_validation_alone():
    labels, before = many(), np.array([], dtype=np.int64)
    validation = cut(labels).validation
    for shots in (1, 2, 5, 45):
        parts = cut(labels, shots)
        assert np.bincount(labels[parts.train]).tolist() == [shots] * 7
        assert set(before) <= set(parts.train)
        assert np.array_equal(parts.validation, validation)
        before = parts.train
    assert np.array_equal(before, cut(labels).train)


def test_the_seed_chooses():
    labels = many()
    assert np.array_equal(cut(labels, 5, seed=1).train, cut(labels, 5, seed=1).train)
    one, other = set(cut(labels, 5, seed=1).train), set(cut(labels, 5, seed=2).train)
    assert len(one & other) < 15


def test_too_few_labels_are_refused_with_the_arithmetic():
    with pytest.raises(BadInput, match=r"class 1 has 3 training samples \(4 labelled, 1 of them .* data.shots .* to 3"):
        cut([0] * 10 + [1] * 4, shots=5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 20)), min_size=1, max_size=60), st.floats(0.01, 0.9))
def test_rows_of_one_picture_are_never_in_both_train_and_test(rows, fraction):
    labels, names = np.array([label for label, _ in rows]), [f"{number}.jpg" for _, number in rows]
    train, test = cut_test(labels, names, fraction)
    assert sorted([*train, *test]) == list(range(len(rows)))
    assert not {names[row] for row in train} & {names[row] for row in test}


def test_a_class_of_one_picture_in_many_rows_stays_in_train():
    train, test = cut_test(np.array([0, 0, 0, 1, 1]), ["a", "a", "a", "b", "c"], 0.5)
    assert train.tolist()[:3] == [0, 1, 2]
    assert len(test) == 1
