"""Which members of a tar are one sample, by webdataset's rule, and what stock readers would stumble over.

The key of a member is its name up to the first dot of its last part, folders included, the extension is the rest in
lower case: `a/cat.1.seg.PNG` is the member `1.seg.png` of the sample `a/cat`. Members of one key must stand together;
webdataset makes two samples of one that does not, and says nothing.

Members are columns of numbers here, not objects: a tar may hold a million.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from foreseen.data.tars import Member, Tar

# Of several pictures in a sample the first of these is the picture.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "gif", "tif", "tiff")
READ_EXTENSIONS = frozenset({*IMAGE_EXTENSIONS, "json", "cls"})
_SHOWN = 3

Kind = TypeVar("Kind", bound=Hashable)


@dataclass(frozen=True)
class Fault:
    """Something wrong.

    Attributes:
        kind: a word for what it is, the same for all of its kind.
        key: sample that it is about; empty where it is about a shard or a set.
        reason: a sentence.
        shard, split: where it is.
    """

    kind: str
    key: str
    reason: str
    shard: str = ""
    split: str = ""


@dataclass(frozen=True)
class TarSamples:
    """The samples of one tar, N of them with M members in all.

    Attributes:
        keys: of the samples, in the order in which they begin, [N].
        extensions: all that occur, [E].
        sample, extension: of each member, in the order of the tar, numbers of the two above, [M].
        offset, size: of each member's bytes, [M].
        hidden: members passed over since their name begins with a dot (`._cat.jpg` of macOS) or is `__…__`.
        nameless: members passed over since their name has no extension.
        skipped: links, devices and the like, by kind.
    """

    keys: Sequence[str]
    extensions: tuple[str, ...]
    sample: NDArray[np.int64]
    extension: NDArray[np.int64]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    hidden: int
    nameless: int
    skipped: dict[str, int]

    @cached_property
    def is_broken_up(self) -> NDArray[np.bool_]:
        """Which samples do not stand together, [N]."""
        runs = np.flatnonzero(np.diff(self.sample, prepend=-1))
        return np.bincount(self.sample[runs], minlength=len(self.keys)) > 1

    @cached_property
    def is_repeated(self) -> NDArray[np.bool_]:
        """Which samples have a member twice, [N]: two samples with one key, or a member that was added again."""
        codes, counts = np.unique(self.sample * max(1, len(self.extensions)) + self.extension, return_counts=True)
        found = np.zeros(len(self.keys), dtype=np.bool_)
        found[codes[counts > 1] // max(1, len(self.extensions))] = True
        return found

    @cached_property
    def member_sets(self) -> NDArray[np.int64]:
        """A number for which members each sample has, the same for equal sets, [N]."""
        weights = np.random.default_rng(0).integers(1 << 62, size=max(1, len(self.extensions)))
        sums = np.zeros(len(self.keys), dtype=np.int64)
        pairs = np.unique(self.sample * len(weights) + self.extension)
        np.add.at(sums, pairs // len(weights), weights[pairs % len(weights)])
        return sums

    def pictures(self, image: str | None = None) -> NDArray[np.int64]:
        """The member that is each sample's picture, -1 where there is none, [N].

        Args:
            image: its extension; None takes the first of `IMAGE_EXTENSIONS` that the sample has.
        """
        found = np.full(len(self.keys), -1, dtype=np.int64)
        for wanted in reversed(IMAGE_EXTENSIONS) if image is None else (image.lower(),):
            if wanted in self.extensions:
                (members,) = np.nonzero(self.extension == self.extensions.index(wanted))
                found[self.sample[members[::-1]]] = members[::-1]  # of the same extension twice the first counts
        return found

    def members(self, extension: str) -> NDArray[np.int64]:
        """The member of an extension of each sample, -1 where there is none, [N]."""
        return self.pictures(extension)

    def members_of(self, sample: int) -> list[int]:
        """All members of one sample, in the order of the tar."""
        begin, end = np.searchsorted(self._by_sample[0], [sample, sample + 1])
        return [int(member) for member in self._by_sample[1][begin:end]]

    @cached_property
    def _by_sample(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.argsort(self.sample, kind="stable")
        return self.sample[order], order

    def extensions_of(self, sample: int) -> list[str]:
        """The extensions of one sample's members."""
        return [self.extensions[self.extension[member]] for member in self.members_of(sample)]

    def unread(self) -> dict[str, int]:
        """Members that no reader of foreseen opens, by extension: pickles, weights, arrays, sound."""
        counts = np.bincount(self.extension, minlength=len(self.extensions))
        return {
            name: int(count)
            for name, count in zip(self.extensions, counts, strict=True)
            if name.rpartition(".")[2] not in READ_EXTENSIONS
        }

    def passed_over(self) -> dict[str, int]:
        """Everything in the tar that is never opened, by what it is."""
        found = {f"*.{extension}": count for extension, count in self.unread().items()}
        found |= {"hidden members": self.hidden, "members without extension": self.nameless}
        found |= {f"{kind}s" if kind != "unknown" else "odd members": count for kind, count in self.skipped.items()}
        found.pop("folders", None)
        return {what: count for what, count in found.items() if count}

    def faults(self, image: str | None = None) -> list[Fault]:
        """What makes stock readers and an index go wrong, a fault a sample."""
        found = []
        for number in np.flatnonzero(self.is_broken_up | self.is_repeated).tolist():
            key = self.keys[number]
            if not self.is_repeated[number]:
                found.append(Fault("scattered", key, "its members do not stand together"))
            elif self.is_broken_up[number]:
                found.append(
                    Fault("duplicate key", key, f"another sample has the same key (both have {self._twice(number)})")
                )
            else:
                found.append(Fault("duplicate member", key, f"it has two members {self._twice(number)}"))
        pictures = self.pictures(image)
        wanted = "picture" if image is None else f"member {image}"
        for number in np.flatnonzero(pictures < 0).tolist():
            has = ", ".join(self.extensions_of(number)[:_SHOWN])
            found.append(Fault("no picture", self.keys[number], f"it has no {wanted}, but {has}"))
        return found

    def several_pictures(self) -> int:
        """How many samples have members with different picture extensions, of which one is taken."""
        names = [number for number, name in enumerate(self.extensions) if name in IMAGE_EXTENSIONS]
        pairs = np.unique(
            self.sample[np.isin(self.extension, names)] * max(1, len(self.extensions))
            + self.extension[np.isin(self.extension, names)]
        )
        counts = np.bincount(pairs // max(1, len(self.extensions)), minlength=len(self.keys))
        return int((counts > 1).sum())

    def _twice(self, sample: int) -> str:
        counts = Counter(self.extensions_of(sample))
        return next(name for name, count in counts.items() if count > 1)


def group_members(tar: Tar) -> TarSamples:
    """Group the members of a tar into samples."""
    keys: dict[str, int] = {}
    extensions: dict[str, int] = {}
    kept: list[Member] = []
    sample: list[int] = []
    extension: list[int] = []
    hidden = nameless = 0
    for member in tar.members:
        begin = member.name.rfind("/") + 1
        dot = member.name.find(".", begin)
        if dot == begin or is_meta(member.name):
            hidden += 1
        elif dot < 0 or dot + 1 == len(member.name):
            nameless += 1
        else:
            kept.append(member)
            sample.append(keys.setdefault(member.name[:dot], len(keys)))
            extension.append(extensions.setdefault(member.name[dot + 1 :].lower(), len(extensions)))
    return TarSamples(
        keys=list(keys),
        extensions=tuple(extensions),
        sample=np.array(sample, dtype=np.int64),
        extension=np.array(extension, dtype=np.int64),
        offset=np.array([member.offset for member in kept], dtype=np.int64),
        size=np.array([member.size for member in kept], dtype=np.int64),
        hidden=hidden,
        nameless=nameless,
        skipped=tar.skipped,
    )


def regroup(samples: TarSamples) -> tuple[TarSamples, dict[int, str]]:
    """Make whole samples of those that do not stand together or have a member twice, where there is but one way.

    Scattered members come together. Samples with one key and the same members each are as many samples. Everything
    else stays one sample, in trouble.

    Returns:
        The samples, with a key as often as it has samples; and the reason of each that cannot be made out, by number.
    """
    keys, sample = list(samples.keys), samples.sample.copy()
    troubles: dict[int, str] = {}
    for number in np.flatnonzero(samples.is_broken_up | samples.is_repeated).tolist():
        pieces: list[list[int]] = []
        there: set[int] = set()  # extensions in the last piece
        last = -2
        for member in samples.members_of(number):
            extension = int(samples.extension[member])
            if member != last + 1 or extension in there:
                pieces.append([])
                there = set()
            pieces[-1].append(member)
            there.add(extension)
            last = member
        sets = [{samples.extensions[samples.extension[member]] for member in piece} for piece in pieces]
        if len(set().union(*sets)) == sum(map(len, sets)):
            continue
        if any(found != sets[0] for found in sets):
            has = "; ".join(", ".join(sorted(found)) for found in sets[:_SHOWN])
            troubles[number] = f"its members cannot be told apart: the tar has {has} under this key"
            continue
        for piece in pieces[1:]:
            sample[piece] = len(keys)
            keys.append(samples.keys[number])
    return replace(samples, keys=keys, sample=sample), troubles


def is_meta(name: str) -> bool:
    """Whether a name is one that webdataset keeps for itself: `__meta__`, or below such a folder."""
    first = name.partition("/")[0]
    return len(first) > 3 and first.startswith("__") and first.endswith("__")


def count_up(counts: Iterable[Mapping[Kind, int]]) -> dict[Kind, int]:
    """The sum of several counts, the most frequent first."""
    total: Counter[Kind] = Counter()
    for count in counts:
        total.update(count)
    return dict(total.most_common())


def name_some(names: Sequence[str]) -> str:
    """The first few of many names, for a sentence."""
    rest = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest
