"""A set of torchvision as a source: its splits, labels and class names, as torchvision reads them from a folder.

Pictures that lie as files are packed with their bytes untouched; those in arrays become PNG. The sets are an explicit
list: each was looked at, and what reads it loads no pickle (CIFAR's own files are pickles, see `cifar.py`). Nothing is
downloaded unless that is asked for.
"""

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.cifar import Cifar
from foreseen.data.labels import number_labels, renumber_labels
from foreseen.data.source import Blob, FoundFile, Listing, Missing, SourceSample, Splits, digest_files, walk
from foreseen.errors import BadInput
from foreseen.files import expand_home

PREFIX = "torchvision:"
Arguments = Mapping[str, Any]


def _by_split(*names: str) -> dict[str, Arguments]:
    return {name: {"split": name} for name in names}


@dataclass(frozen=True)
class _Set:
    """How a set is opened: what its constructor is given for each of its splits, and what stands in for it, if any."""

    splits: Mapping[str, Arguments]
    opener: Callable[..., Any] | None = None
    can_download: bool = True


_BY_TRAIN: Mapping[str, Arguments] = {"train": {"train": True}, "test": {"train": False}}
_WHOLE: Mapping[str, Arguments] = {"train": {}}
SETS: Mapping[str, _Set] = {
    "CIFAR10": _Set(_BY_TRAIN, Cifar),
    "CIFAR100": _Set(_BY_TRAIN, Cifar),
    "CLEVRClassification": _Set(_by_split("train", "val", "test")),
    "Country211": _Set({"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}),
    "DTD": _Set(_by_split("train", "val", "test")),
    "EuroSAT": _Set(_WHOLE),
    "FashionMNIST": _Set(_BY_TRAIN),
    "FGVCAircraft": _Set(_by_split("train", "val", "test")),
    "Flowers102": _Set(_by_split("train", "val", "test")),
    "Food101": _Set(_by_split("train", "test")),
    "GTSRB": _Set(_by_split("train", "test")),
    "ImageFolder": _Set(_WHOLE, can_download=False),
    "Imagenette": _Set(_by_split("train", "val")),
    "KMNIST": _Set(_BY_TRAIN),
    "LFWPeople": _Set(_by_split("train", "test")),
    "MNIST": _Set(_BY_TRAIN),
    "OxfordIIITPet": _Set({"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "RenderedSST2": _Set(_by_split("train", "val", "test")),
    "SEMEION": _Set(_WHOLE),
    "StanfordCars": _Set(_by_split("train", "test"), can_download=False),
    "STL10": _Set(_by_split("train", "test", "unlabeled")),
    "SUN397": _Set(_WHOLE),
    "SVHN": _Set(_by_split("train", "test", "extra")),
    "USPS": _Set(_BY_TRAIN),
}


class TorchvisionSource:
    """A set of torchvision that lies in a folder.

    Args:
        place: NAME@DIR, the class in `torchvision.datasets` and the folder that it is given as `root`.
        labels: "none" leaves labels out; anything else takes the set's own.
        download: fetch it into the folder if it is not there.
    """

    def __init__(self, place: str, labels: str = "auto", download: bool = False) -> None:
        self.set_name, separator, folder = place.partition("@")
        if not separator or not folder:
            raise BadInput(f"{PREFIX}{place} names no folder: give {PREFIX}{place or 'NAME'}@DIR, where the set lies")
        if self.set_name not in SETS:
            near = get_close_matches(self.set_name, SETS, n=1, cutoff=0.7)
            hint = (
                f"did you mean {near[0]}?" if near else f"these are: {', '.join(SETS)}; others may be read as folders"
            )
            raise BadInput(f"{PREFIX}{self.set_name} is no set of torchvision that is read; {hint}")
        self.root, self.labels, self.download = expand_home(folder), labels, download
        if not download and not os.path.isdir(self.root):
            raise BadInput(f"{self.root} is not a folder: give {PREFIX}{self.set_name}@DIR, where the set lies")
        self._open_once = lru_cache(maxsize=1)(self._open)  # one split in memory at a time

    @property
    def name(self) -> str:
        """`torchvision:` and the set's name."""
        return PREFIX + self.set_name

    def digest(self) -> str:
        """Of names, sizes and times of all files below the folder."""
        return digest_files(walk(self.root))

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """List the splits that are there.

        Args:
            classes: class names of the set that they join; the set's own if None.

        Raises:
            BadInput: no split is there, or a class is not among `classes`.
        """
        found: dict[str, _Contents] = {}
        reasons: dict[str, str] = {}
        for split in SETS[self.set_name].splits:
            try:
                found[split] = _Contents.of(self._open_once(split))
            except BadInput:
                raise
            except (RuntimeError, OSError, ValueError, ImportError, KeyError) as error:
                reasons[split] = str(error).partition(". You can use")[0] or type(error).__name__
        if not found:
            hint = "give --download to `foreseen data pack`, or another folder"
            if not SETS[self.set_name].can_download:
                hint = "give the folder that has it"
            raise BadInput(f"{self.name} is not in {self.root} ({next(iter(reasons.values()))}): {hint}")
        numbers, classes = self._labels(found, classes)
        listings = {
            split: _Pictures(self.root, split, self._open_once, contents, numbers.get(split))
            for split, contents in found.items()
        }
        notes = [f"split {split!r} of {self.name} is passed over: {reason}" for split, reason in reasons.items()]
        is_named = len(SETS[self.set_name].splits) > 1
        return Splits(listings, is_named, classes if numbers else None, tuple(notes))

    def _open(self, split: str) -> Any:
        import torchvision

        described = SETS[self.set_name]
        kind = getattr(torchvision.datasets, self.set_name, None)
        if kind is None:
            raise BadInput(f"{self.name} is not in this torchvision, {torchvision.__version__}: install a newer one")
        arguments = {"root": str(self.root), **described.splits[split]}
        if described.can_download:
            arguments["download"] = self.download
        return kind(**arguments) if described.opener is None else described.opener(kind, **arguments)

    def _labels(
        self, found: Mapping[str, "_Contents"], classes: tuple[str, ...] | None
    ) -> tuple[dict[str, NDArray[np.int32]], tuple[str, ...] | None]:
        """Class number of each picture of each labelled split, and the names of the classes."""
        labelled = {split: contents for split, contents in found.items() if contents.is_labelled}
        if self.labels == "none" or not labelled:
            return {}, None
        names = next((contents.classes for contents in labelled.values() if contents.classes), None)
        if names is None:  # numbers without names
            texts = [None if label < 0 else str(label) for part in labelled.values() for label in part.labels.tolist()]
            every, classes = number_labels(texts, self.name, classes)
            ends = np.cumsum([len(part.labels) for part in labelled.values()])[:-1]
            return dict(zip(labelled, np.split(every, ends), strict=True)), classes
        known = classes or tuple(dict.fromkeys(name for part in labelled.values() for name in part.classes or ()))
        return {
            split: renumber_labels(part.labels.tolist(), part.classes or names, known, self.name)
            for split, part in labelled.items()
        }, known


@dataclass(frozen=True)
class _Contents:
    """What one split holds, without its pixels.

    Attributes:
        count: pictures.
        files: paths of the pictures, where they are files.
        labels: class number of each, [N]; -1 where it has none.
        classes: their names, if the set knows them.
    """

    count: int
    files: Sequence[str] | None
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None

    @property
    def is_labelled(self) -> bool:
        """Whether any picture has a label."""
        return bool((self.labels >= 0).any())

    @classmethod
    def of(cls, found: Any) -> "_Contents":
        """Look at an open set, by the attributes that its class uses."""
        files, labels = _files_and_labels(found)
        count = len(found.data) if files is None else len(files)
        numbers = np.full(count, -1)
        if labels is not None:
            numbers = np.array([-1 if label is None else int(label) for label in labels], dtype=np.int64)
        if len(numbers) != count:
            raise ValueError(f"it has {count:,} pictures and {len(numbers):,} labels")
        return cls(count, files, numbers, _class_names(found))


class _Pictures(Listing):
    """The samples of one split."""

    def __init__(
        self,
        root: Path,
        split: str,
        open_split: Callable[[str], Any],
        contents: _Contents,
        labels: NDArray[np.int32] | None,
    ) -> None:
        self._root, self._split, self._open_split = root, split, open_split
        self._contents, self._labels = contents, labels

    def __len__(self) -> int:
        return self._contents.count

    def sample(self, index: int) -> SourceSample:
        """A picture's file, or its pixels."""
        number = -1 if self._labels is None else int(self._labels[index])
        label = None if number < 0 else number
        if self._contents.files is None:
            if index >= len(self):
                raise IndexError(index)
            return SourceSample(f"{self._split}/{index:09d}.png", self._pixels(index), label)
        path = os.path.abspath(self._contents.files[index])
        root = os.path.abspath(self._root)
        name = os.path.relpath(path, root)
        if name.startswith(".."):
            return SourceSample(name, Missing(f"{path} lies outside {root}"), label)
        try:
            return SourceSample(name, Blob(path, FoundFile.look(Path(path)).size), label)
        except OSError:
            return SourceSample(name, Missing(f"the set names {name}, and there is no such file"), label)

    def _pixels(self, index: int) -> "Pixels":
        return Pixels(_upright(np.asarray(self._open_split(self._split).data[index])))


@dataclass(frozen=True, slots=True)
class Pixels:
    """A picture that is no file, [H, W] or [H, W, 3] uint8; read as PNG."""

    pixels: NDArray[np.uint8]

    @property
    def size(self) -> int:
        """Bytes of the pixels; the PNG has about as many at most."""
        return self.pixels.nbytes

    def read(self) -> bytes:
        """The PNG, the same for the same pixels."""
        out = io.BytesIO()
        Image.fromarray(self.pixels).save(out, "PNG")
        return out.getvalue()


def _upright(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    """Channels last, whichever way the set keeps them."""
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise BadInput(f"a picture of the set is an array of {pixels.dtype} {pixels.shape}, it must be uint8")
    if pixels.ndim == 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    return np.ascontiguousarray(pixels)


def _files_and_labels(found: Any) -> tuple[list[str] | None, Any]:
    """The paths of the pictures, None where they are arrays, and their labels, None where there are none."""
    if (pairs := _first(found, "samples", "_samples")) is not None:
        return [str(file) for file, _ in pairs], [label for _, label in pairs]
    if (paths := _first(found, "_image_files", "_images")) is not None:
        return [str(file) for file in paths], found._labels
    if isinstance(found.data, list):  # LFWPeople
        return [str(file) for file in found.data], found.targets
    return None, _first(found, "targets", "labels")


def _class_names(found: Any) -> tuple[str, ...] | None:
    names = getattr(found, "classes", None)
    if not names and (numbers := getattr(found, "class_to_idx", None)):
        names = sorted(numbers, key=numbers.get)
    if not names:
        return None
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _first(found: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(found, name, None)) is not None), None)
