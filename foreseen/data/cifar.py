"""CIFAR-10 and CIFAR-100 from their official files, which are pickles, without running what a pickle can.

A file is read only if it has the md5 that torchvision knows of the official one. Whatever class or function it names,
it gets a stand-in that does nothing and keeps what it is given, so the bytes of its array come out and nothing else
happens. torchvision itself loads them with an unrestricted `pickle.load`.
"""

import os
import pickle
from typing import Any

import numpy as np

from foreseen.errors import BadInput

_SIDE = 32


class Cifar:
    """One split, with the attributes that torchvision's class has: data [N, 32, 32, 3] uint8, targets, classes.

    Args:
        kind: torchvision's class, for the names and checksums of the files.
        root, train, download: as that class takes them.

    Raises:
        RuntimeError: a file is missing or not the official one.
    """

    def __init__(self, kind: Any, root: str, train: bool, download: bool) -> None:
        from torchvision.datasets.utils import check_integrity, download_and_extract_archive

        folder = os.path.join(root, kind.base_folder)
        files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]

        def wrong() -> str | None:
            return next((name for name, md5 in files if not check_integrity(os.path.join(folder, name), md5)), None)

        if download and wrong() is not None:
            download_and_extract_archive(kind.url, root, filename=kind.filename, md5=kind.tgz_md5)
        if (name := wrong()) is not None:
            raise RuntimeError(f"{os.path.join(folder, name)} is missing or not the official one")
        batches = [_load(os.path.join(folder, name)) for name, _ in (kind.train_list if train else kind.test_list)]
        pixels = [np.frombuffer(_array_bytes(batch[b"data"]), dtype=np.uint8) for batch in batches]
        self.data = np.concatenate(pixels).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
        labels = b"labels" if b"labels" in batches[0] else b"fine_labels"
        self.targets = [int(label) for batch in batches for label in batch[labels]]
        names = _load(os.path.join(folder, kind.meta["filename"]))[kind.meta["key"].encode()]
        self.classes = [name.decode() for name in names]


class _StandIn:
    """In place of every class and function that a file names."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Nothing of any module is ever looked up."""
        return _StandIn


def _load(file: str) -> dict[bytes, Any]:
    try:
        with open(file, "rb") as data:
            found: dict[bytes, Any] = _Inert(data, encoding="bytes").load()
    except Exception as error:  # whatever stand-ins lead to
        raise BadInput(f"{file} cannot be read as a file of CIFAR: {error}") from None
    return found


def _array_bytes(array: Any) -> bytes:
    """The bytes of an array of numpy, the last part of the state that it was saved with."""
    state = array.state if isinstance(array, _StandIn) else None
    if not isinstance(state, tuple) or not state or not isinstance(state[-1], bytes):
        raise BadInput("a file of CIFAR holds its pictures in a way that is not known")
    return state[-1]
