"""Labels as people write them, to class numbers: names are sorted, whole numbers keep their order."""

import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from foreseen.errors import BadInput

_WHOLE = re.compile(r"[+-]?\d{1,1000}(\.0*)?")  # spreadsheets write 3 as 3.0 where a cell of the column is empty


def number_labels(
    values: Sequence[str | None],
    where: str,
    classes: tuple[str, ...] | None = None,
    place: Callable[[int], str] = lambda index: f"row {index}",
) -> tuple[NDArray[np.int32], tuple[str, ...]]:
    """Give each class a number.

    Args:
        values: one label a sample; None, an empty one and, among whole numbers, -1 mean unlabelled.
        where: what to call the column in a message.
        classes: the names that there are; those that occur if None.
        place: what to call the place of the value of an index in a message.

    Returns:
        Class number of each sample, [N] int32, -1 where unlabelled; and the names of the classes.

    Raises:
        BadInput: no sample has a label, or some are numbers and some are names, or one is not among `classes`.
    """
    texts = ["" if value is None else value.strip() for value in values]
    written = [text for text in texts if text]
    if not written:
        raise BadInput(f"{where} holds no label: fill it in, or name another column")
    are_numbers = [_WHOLE.fullmatch(text) is not None for text in written]
    if all(are_numbers):
        whole = [int(text.partition(".")[0]) if text else -1 for text in texts]
        texts = ["" if number == -1 else str(number) for number in whole]
        names = [str(number) for number in sorted({*whole} - {-1})]
    elif any(are_numbers):
        number, name = written[are_numbers.index(True)], written[are_numbers.index(False)]
        raise BadInput(
            f"{where} mixes numbers ({place(texts.index(number))}: {number!r}) and names ({place(texts.index(name))}: "
            f"{name!r}): write all labels as names, or all as whole numbers"
        )
    else:
        names = sorted(set(written))
    if not names:
        raise BadInput(f"{where} holds no label but -1, which means unlabelled: fill it in, or name another column")
    classes = classes or tuple(names)
    if unknown := [name for name in names if name not in set(classes)]:
        raise BadInput(f"{where} has a class {unknown[0]!r} that the set does not have: {', '.join(classes)}")
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers.get(text, -1) for text in texts], dtype=np.int32), classes


def renumber_labels(
    values: Sequence[int | None], names: Sequence[str], classes: tuple[str, ...], where: str
) -> NDArray[np.int32]:
    """Numbers that count the names of one split, as numbers of the classes of all; None and negative ones become -1.

    Raises:
        BadInput: a number counts no name, or one of a class that is not among `classes`.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    found = np.array([-1 if value is None or value < 0 else value for value in values], dtype=np.int64)
    for value in np.unique(found[found >= 0]).tolist():
        if value >= len(names):
            raise BadInput(f"{where} holds the label {value}, and names but {len(names)} classes")
        if names[value] not in numbers:
            raise BadInput(f"{where} has a class {names[value]!r} that the set does not have: {', '.join(classes)}")
    table = np.array([*(numbers.get(name, -1) for name in names), -1], dtype=np.int32)
    return table[found]
