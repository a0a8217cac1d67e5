"""Which tars a user means by files, folders and brace patterns, and which splits their names say."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

from braceexpand import braceexpand

from foreseen.data.folder import SPLIT_NAMES
from foreseen.data.source import entries, is_picture, walk
from foreseen.errors import BadInput

TAR_SUFFIX = ".tar"
COMPRESSED_SUFFIXES = (".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2")

_MOST_TARS = 1_000_000


def is_tar_name(name: str) -> bool:
    """Whether a name ends as a tar's does, compressed or not."""
    return name.lower().endswith((TAR_SUFFIX, *COMPRESSED_SUFFIXES))


def is_pattern(place: str) -> bool:
    """Whether a path that does not exist is a brace pattern, such as `train-{000..123}.tar`."""
    return "{" in place and "}" in place and not os.path.exists(place)


def holds_tars(place: str) -> bool:
    """Whether a path is a tar, a pattern of tars, or a folder with tars in it and no pictures anywhere below."""
    path = Path(place).expanduser()
    if is_pattern(str(path)) or path.is_file():
        return is_tar_name(path.name)
    if not path.is_dir() or not any(is_tar_name(name) for name, _ in entries(path)):
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
        path = Path(place).expanduser()
        if is_pattern(str(path)):
            found += [_existing(Path(file)) for file in expand_braces(str(path))]
        elif path.is_dir():
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


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern such as `train-{000..123}.tar` stands for.

    Raises:
        BadInput: they are too many, or it is no pattern.
    """
    ranges = re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)  # counted before the library makes a list of them
    if math.prod(abs(int(last) - int(first)) + 1 for first, last in ranges) > _MOST_TARS:
        raise BadInput(f"{pattern} names more than {_MOST_TARS:,} tars: give the folder")
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise BadInput(f"{pattern} is no pattern of tars such as train-{{000..123}}.tar: {error}") from None


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise BadInput(
            f"{path} does not exist: give a tar, a folder of tars, or a pattern such as train-{{000..123}}.tar"
        )
    return path
