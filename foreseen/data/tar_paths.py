"""Which tars a user means by files, folders and brace patterns, and which splits their names say."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from braceexpand import braceexpand

from foreseen.data.folder import SPLIT_NAMES
from foreseen.data.source import entries, is_picture, walk
from foreseen.errors import BadInput
from foreseen.files import expand_home

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")

_MOST_TARS = 1_000_000
_MOST_LETTERS = 1 << 28  # in all their names
_DEEPEST = 20  # braces within braces
_SHOWN = 200  # letters of a pattern in a message
_RANGE = re.compile(r"(-?\d+|[A-Za-z])\.\.(-?\d+|[A-Za-z])(?:\.\.-?\d+)?")


def is_tar_name(name: str) -> bool:
    """Whether a name ends as a tar's does, compressed or not."""
    return name.lower().endswith((TAR_SUFFIX, *COMPRESSED_SUFFIXES))


def is_pattern(place: str) -> bool:
    """Whether a path that does not exist is a brace pattern, such as `train-{000..123}.tar`."""
    return "{" in place and "}" in place and not os.path.exists(place)


def holds_tars(place: str) -> bool:
    """Whether a path is a tar, a pattern of tars, or a folder with tars in it and no pictures anywhere below."""
    path = expand_home(place)
    if is_pattern(str(path)) or os.path.isfile(path):
        return is_tar_name(path.name)
    if not os.path.isdir(path) or not any(is_tar_name(name) for name, _ in entries(path)):
        return False
    return not any(is_picture(file.name) for file in walk(path))


def find_tars(places: Sequence[str], *, compressed: bool = True) -> list[Path]:
    """The tars at some places: files, folders (theirs are sorted) and brace patterns, in that order.

    Args:
        places: at least one.
        compressed: take compressed ones, too.

    Raises:
        BadInput: there are none at one of the places, one is missing, or two have the same file name.
    """
    found: list[Path] = []
    for place in places:
        path = expand_home(place)
        if is_pattern(str(path)):
            found += [_existing(Path(file)) for file in expand_braces(str(path))]
        elif os.path.isdir(path):
            names = sorted(name for name, _ in entries(path) if is_tar_name(name))
            names = [name for name in names if compressed or name.lower().endswith(TAR_SUFFIX)]
            if not names:
                raise BadInput(f"{path} holds no tars: give a folder of *{TAR_SUFFIX} files, or the files")
            found += [path / name for name in names]
        else:
            found.append(_existing(path))
    there: dict[str, Path] = {}
    for file in found:
        if (other := there.setdefault(file.name, file)) is not file:
            raise BadInput(f"{other} and {file} have the same file name, by which shards are known: rename one of them")
    return found


def check_apart(out: Path, files: Sequence[Path]) -> None:
    """Refuse to pack tars into the folder that they lie in: what is packed there replaces files of such names.

    Raises:
        BadInput: a tar lies in that folder.
    """
    if out.resolve() in {file.parent.resolve() for file in files}:
        raise BadInput(f"{out} is the folder of the tars themselves: give a new folder")


def by_split(files: Sequence[Path], split: str | None = None) -> tuple[dict[str, list[Path]], bool]:
    """Which split each tar belongs to.

    Args:
        files: tars.
        split: the one for all; None goes by names with a word such as train, val or test in them, if all have one.

    Returns:
        The tars of each split, `train` first; and whether their names say so.
    """
    words = [_split_word(file.name) for file in files]
    if split is not None or not all(words):
        return {split or "train": list(files)}, False
    found: dict[str, list[Path]] = {}
    for word, file in sorted(zip(words, files, strict=True), key=lambda pair: (pair[0] != "train", pair[0])):
        found.setdefault(str(word), []).append(file)
    return found, True


def _split_word(name: str) -> str | None:
    words = {word for word in re.split(r"[^a-z]+", name.lower()) if word in SPLIT_NAMES}
    return words.pop() if len(words) == 1 else None


def expand_braces(pattern: str) -> Iterator[str]:
    """The names that a pattern such as `train-{000..123}.tar` stands for, one by one.

    Raises:
        BadInput: they are too many, or it is no pattern.
    """
    shown = pattern if len(pattern) <= _SHOWN else f"{pattern[:_SHOWN]}…"
    try:
        if (count := _count(pattern)) > _MOST_TARS or count * len(pattern) > _MOST_LETTERS:
            raise BadInput(f"{shown} names more than {min(count - 1, _MOST_TARS):,} tars: give the folder")
        yield from braceexpand(pattern)  # one by one: where the first is missing the others are not made
    except (ValueError, IndexError) as error:
        if isinstance(error, BadInput):
            raise
        reason = str(error)[:_SHOWN]
        raise BadInput(f"{shown} is no pattern of tars such as train-{{000..123}}.tar: {reason}") from None


def _count(pattern: str) -> int:
    """How many names a pattern stands for, or a number above `_MOST_TARS`; the library would make a list of them first.

    Raises:
        ValueError: braces are nested too deeply, or a number is too long.
    """
    # Of each open brace: where its inside begins, names of the alternatives before this one, and of this one so far.
    stack = [(0, 0, 1)]
    at = 0
    while at < len(pattern):
        begin, before, names = stack[-1]
        if pattern[at] == "\\":
            at += 1
        elif pattern[at] == "{":
            if len(stack) > _DEEPEST:
                raise ValueError(f"its braces are nested more than {_DEEPEST} deep")
            stack.append((at + 1, 0, 1))
        elif pattern[at] == "," and len(stack) > 1:
            stack[-1] = (begin, before + names, 1)
        elif pattern[at] == "}" and len(stack) > 1:
            stack.pop()
            inside = before + names
            if inside == 1 and (found := _RANGE.fullmatch(pattern, begin, at)):
                first, last = (int(end) if end.lstrip("-").isdigit() else ord(end) for end in found.groups())
                inside = abs(last - first) + 1
            outer_begin, outer_before, outer = stack[-1]
            stack[-1] = (outer_begin, outer_before, min(outer * inside, _MOST_TARS + 1))
        at += 1
    return stack[0][2]


def _existing(path: Path) -> Path:
    if not os.path.isfile(path):
        raise BadInput(
            f"{path} does not exist: give a tar, a folder of tars, or a pattern such as train-{{000..123}}.tar"
        )
    return path
