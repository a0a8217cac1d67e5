"""Sources packed behind the scenes: the pictures that a recipe names become shards, once.

The cache is XDG_CACHE_HOME/foreseen (or ~/.cache/foreseen). A packed source stands there under a name made from its
path, its digest and the options, so a source that has changed is packed anew, and a run on the older one is left alone.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from foreseen.data.open_source import SourceOptions, open_source, resolve
from foreseen.data.pack import Progress, pack
from foreseen.data.source import Part, SourceSample, Splits
from foreseen.data.subsets import cut_test
from foreseen.errors import BadInput
from foreseen.files import read_json, write_atomically

VALIDATION_NAMES = ("validation", "val", "valid")

_VERSION = 4  # of what packing a source gives
_NOTES = "notes.json"
_UNLABELLED = "test_unlabelled"


@dataclass(frozen=True)
class Packed:
    """A packed source.

    Attributes:
        path: folder of the set.
        notes: what its reader should know of its splits, in words.
        test_split: where its test pictures are; None if there are none.
    """

    path: Path
    notes: tuple[str, ...]
    test_split: str | None


def cache_folder() -> Path:
    """Where foreseen keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "foreseen"


def packed(
    src: str,
    options: SourceOptions,
    *,
    test_fraction: float,
    say: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Progress]],
) -> Packed:
    """The packed set of a source, from the cache or put there now.

    Args:
        src: a folder of pictures, a file that lists them, `hf:…` or `torchvision:…`.
        options: how it is read.
        test_fraction: share of each class that becomes the split `test` where the source names no test split and no
            validation split; 0 for none.
        say: told in a line what is packed and what was left out.
        progress: called with a split's name; what it answers is entered while that is packed.

    Raises:
        BadInput: the source cannot be read, has no readable pictures, or the cache cannot be written.
    """
    source = open_source(src, options)
    facts = [_VERSION, type(source).__name__, resolve(src), source.digest(), asdict(options), test_fraction]
    key = hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", source.name).strip("-.") or "source"
    folder = cache_folder() / f"packed-{slug[:64]}-{key}"
    if not folder.is_dir():
        with lock_cache(say):
            if not folder.is_dir():  # else another job has packed it meanwhile
                _pack(src, source.name, source.read(), folder, test_fraction, say, progress)
    found = read_json(folder / _NOTES)
    return Packed(folder, tuple(found["notes"]), found["test_split"])


def _pack(
    src: str,
    name: str,
    found: Splits,
    folder: Path,
    test_fraction: float,
    say: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Progress]],
) -> None:
    """Pack all splits beside the folder and rename that at the end; a killed packing goes on from where it was."""
    splits, test_split, notes = choose_test(src, found, test_fraction)
    part = folder.with_name(f"{folder.name}.part")
    total = sum(len(samples) for samples in splits.values())
    say(f"packing {total:,} pictures of {src} into {folder}, once")
    for note in found.notes:
        say(note)
    for split, samples in splits.items():
        with progress(split) as report:
            summary = pack(
                samples, part, split, classes=found.classes, source=name, licence=found.licence, keep=True,
                progress=report,
            )  # fmt: skip
        if summary.converted:
            say(f"{summary.converted:,} pictures of {split} are of other formats and were converted to {summary.image}")
        if summary.unreadable:
            first, reason = min(summary.unreadable)
            say(
                f"{len(summary.unreadable):,} pictures of {split} cannot be read and are left out, such as {first}: "
                f"{reason}; {folder / split}.unreadable.txt lists them all"
            )
    write_atomically(part / _NOTES, json.dumps({"source": src, "notes": notes, "test_split": test_split}, indent=1))
    part.rename(folder)


def choose_test(
    src: str, found: Splits, fraction: float
) -> tuple[dict[str, Sequence[SourceSample]], str | None, list[str]]:
    """Settle which samples are the test split: the source's own, its validation split, or a share cut from train.

    Where the source has labels, a test or validation split without any is no test split. Such a `test` gets another
    name, since what asks for "test" wants to judge by it.

    Returns:
        The splits, the name of the test split or None, and what was settled, in words.
    """
    splits = dict(found.splits)
    if found.classes is None:
        return splits, "test" if "test" in splits else None, []
    notes = []
    if "test" in splits:
        if _has_labels(splits["test"]):
            return splits, "test", []
        splits[_UNLABELLED] = splits.pop("test")
        notes = [f"the split test of {src} has no labels to judge by, and is called {_UNLABELLED}"]
    if name := next((name for name in VALIDATION_NAMES if name in splits and _has_labels(splits[name])), None):
        notes += [f"{src} has no split test: its {name} is read as the test split, once, at the end"]
        return splits, name, notes
    origin = "train" if "train" in splits else next(iter(splits))
    samples = splits[origin]
    labels = np.array([-1 if sample.label is None else sample.label for sample in samples])
    if not fraction or (labels < 0).all():
        return splits, None, notes
    train, test = cut_test(labels, [os.path.normpath(sample.name) for sample in samples], fraction)
    if not len(test):
        return splits, None, [*notes, f"no class of {src} has two pictures, so no test split is cut from it"]
    splits |= {origin: Part(samples, train), "test": Part(samples, test)}
    notes += [
        f"{src} has no test split: {fraction:g} of each class, {len(test):,} pictures, are set aside as one and never "
        "trained on (data.test_fraction)"
    ]
    if single := np.flatnonzero(np.bincount(labels[labels >= 0]) == 1).tolist():
        such = f"such as {found.classes[single[0]]!r}"
        notes.append(f"{len(single):,} classes of {src} have a single picture, {such}: it stays in {origin}")
    return splits, "test", notes


def _has_labels(samples: Sequence[SourceSample]) -> bool:
    return any(sample.label is not None for sample in samples)


@contextmanager
def lock_cache(say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time puts things into the cache, of all that share it; another one waits, and says so.

    Raises:
        BadInput: the cache cannot be written.
    """
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(cache / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    except OSError as error:
        raise BadInput(
            f"the cache {cache} cannot be written ({error.strerror}): set XDG_CACHE_HOME to a folder that can, or pack "
            "with `foreseen data pack`"
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise
            say(f"another process is writing into {cache}: waiting for it")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
