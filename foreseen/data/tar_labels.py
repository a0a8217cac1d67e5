"""Labels that stand in a tar: in a member `KEY.cls` or a field of `KEY.json`, as whole numbers or names of classes."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from foreseen.data.tar_samples import TarSamples
from foreseen.errors import BadInput
from foreseen.files import parse_json, read_text

CLASSES_FILE = "classes.txt"
MAX_JSON = 4 << 20

_MAX_CLS = 1 << 10
_MAX_CLASSES = 1_000_000
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")


class BadMember(ValueError):
    """A small member does not hold what its name promises; the message is the reason."""


@dataclass(frozen=True)
class LabelRule:
    """Where labels stand: `none`, `cls`, or `json:FIELD`."""

    extension: str | None
    field: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """The rule that a user names.

        Raises:
            BadInput: there is no such rule.
        """
        if text == "none":
            return cls(None)
        if text == "cls":
            return cls("cls")
        kind, _, field = text.partition(":")
        if kind != "json" or not field:
            raise BadInput(f"--labels is {text!r}, it must be cls, json:FIELD or none")
        return cls("json", field)

    def __str__(self) -> str:
        return "none" if self.extension is None else self.extension if self.field is None else f"json:{self.field}"


@dataclass(frozen=True)
class ShardLabels:
    """Labels of one tar before they are numbered over all tars.

    Attributes:
        texts: the different ones.
        codes: which of them each sample has, [N] int32, -1 where it has none.
    """

    texts: list[str]
    codes: NDArray[np.int32]


def read_json(descriptor: int, offset: int, size: int) -> dict[str, Any]:
    """The object that a json member holds.

    Raises:
        BadMember: it is too large, or no json object.
    """
    if size > MAX_JSON:
        raise BadMember(f"its json has {size:,} bytes, more than the {MAX_JSON:,} allowed")
    try:
        found = parse_json(os.pread(descriptor, size, offset))
    except ValueError as error:
        raise BadMember(f"its json cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise BadMember(f"its json holds a {type(found).__name__}, not an object")
    return found


def label_text(value: object) -> str | None:
    """A label as a text: whole numbers without sign and decimals, None for null, empty and -1.

    Raises:
        BadMember: it is neither a whole number nor a text.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise BadMember(f"its label {str(value)[:80]!r} is neither a whole number nor a name")
    text = str(value).strip()
    if _WHOLE.fullmatch(text):
        return None if (whole := _plain(text)) == "-1" else whole
    if not isinstance(value, str):
        raise BadMember(f"its label {text[:80]} is no whole number")
    if any(ord(letter) < 32 for letter in text):
        raise BadMember(f"its label {text[:80]!r} is no name of one line")
    return text or None


def _plain(text: str) -> str:
    """A whole number without sign, zeros before it and decimals; any other text as it is."""
    return str(int(text.partition(".")[0])) if _WHOLE.fullmatch(text) else text


def read_label(descriptor: int, samples: TarSamples, member: int, rule: LabelRule) -> str | None:
    """The label in one member, `cls` or json.

    Raises:
        BadMember: it holds none that makes sense.
    """
    offset, size = int(samples.offset[member]), int(samples.size[member])
    if rule.field is not None:
        return label_text(read_json(descriptor, offset, size).get(rule.field))
    if size > _MAX_CLS:
        raise BadMember(f"its cls has {size:,} bytes, more than the {_MAX_CLS:,} of a number or a name")
    try:
        return label_text(os.pread(descriptor, size, offset).decode("utf-8"))
    except UnicodeDecodeError:
        raise BadMember("its cls is no text") from None


def read_labels(file: Path, samples: TarSamples, rule: LabelRule) -> ShardLabels:
    """The labels of all samples of a tar.

    Raises:
        BadInput: a sample lacks the member, or its label makes no sense.
    """
    texts: dict[str, int] = {}
    codes = np.full(len(samples.keys), -1, dtype=np.int32)
    if rule.extension is None:
        return ShardLabels([], codes)
    with open(file, "rb", buffering=0) as tar:
        for number, member in enumerate(samples.members(rule.extension).tolist()):
            try:
                if member < 0:
                    raise BadMember(f"it has no member {rule.extension}")
                text = read_label(tar.fileno(), samples, member, rule)
            except BadMember as error:
                where = f"{file}: sample {samples.keys[number]} has no label that can be used"
                raise BadInput(f"{where} ({error}): change --labels {rule}, or give --labels none") from None
            if text is not None:
                codes[number] = texts.setdefault(text, len(texts))
    return ShardLabels(list(texts), codes)


def number_texts(
    texts: Iterable[str], where: str, classes: tuple[str, ...] | None = None
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Give each class a number: a whole number is a class number already, names are sorted.

    Args:
        texts: the labels that occur.
        where: what to call them in a message.
        classes: the names that there are; found by themselves if None.

    Returns:
        The number of each label, and the names of the classes.

    Raises:
        BadInput: some are numbers and some are names, or one is not among `classes`, or a number is out of bounds, or
            may as well be the name of another class.
    """
    found = sorted(set(texts))
    if not found:
        raise BadInput(f"{where} holds no label: name another place, or give --labels none")
    whole = [text for text in found if _WHOLE.fullmatch(text)]
    numbers = {_plain(name): number for number, name in enumerate(classes or ())}
    if classes is not None and set(found) <= numbers.keys():
        other = next((text for text in found if text in whole and numbers[text] != int(text)), None)
        if other is not None and len(whole) == len(found) and all(0 <= int(text) < len(classes) for text in whole):
            raise BadInput(
                f"{where} has the label {other}, which may be the class of that number, {classes[int(other)]!r}, or "
                f"that of this name, number {numbers[other]}: give the classes names that are no numbers"
            )
        return numbers, classes
    if whole and len(whole) < len(found):
        name = next(text for text in found if text not in set(whole))
        raise BadInput(f"{where} mixes numbers ({whole[0]!r}) and names ({name!r}): write all labels in one way")
    if not whole:
        if classes is not None:
            unknown = next(text for text in found if text not in set(classes))
            raise BadInput(f"{where} has a class {unknown!r} that the set does not have: {_some(classes)}")
        return {name: number for number, name in enumerate(found)}, tuple(found)
    counted = [int(text) for text in whole]
    limit = _MAX_CLASSES if classes is None else len(classes)
    if (wrong := next((number for number in counted if not 0 <= number < limit), None)) is not None:
        known = "" if classes is None else f" (there are {limit} classes)"
        raise BadInput(f"{where} has the label {wrong}, it must lie in [0, {limit - 1}]{known}")
    classes = classes or tuple(str(number) for number in range(max(counted) + 1))
    return dict(zip(whole, counted, strict=True)), classes


def read_classes(file: Path) -> tuple[str, ...]:
    """Names of classes, one a line, in the order of their numbers.

    Raises:
        BadInput: it cannot be read, or names a class twice or none.
    """
    try:
        names = tuple(line.strip() for line in read_text(file).removeprefix("\ufeff").splitlines())
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}): give a file with one class name a line") from None
    except UnicodeDecodeError:
        raise BadInput(f"{file} is not UTF-8 text: give a file with one class name a line") from None
    if not names or not all(names) or len(set(names)) < len(names):
        raise BadInput(f"{file} must name a class on each line, and none twice")
    return names


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
