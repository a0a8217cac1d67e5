"""Files of weights that others publish: safetensors, or what torch.save wrote; names and shapes first, values later."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from foreseen.errors import BadInput
from foreseen.files import sha256_of
from foreseen.handoff.inert_pickle import read_tensors

_WRAPPERS = ("model", "state_dict", "module")  # what checkpoints call the weights among the rest


class Stored(Protocol):
    """A tensor in a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    def load(self) -> Tensor:
        """Read it."""


@dataclass(frozen=True)
class _InSafetensors:
    shape: tuple[int, ...]
    name: str
    path: Path

    def load(self) -> Tensor:
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class WeightFile:
    """A file of weights, opened.

    Attributes:
        path: of the file.
        tensors: by name; of a checkpoint those of its model, without the name that it has there.
    """

    path: Path
    tensors: Mapping[str, Stored]

    @property
    def state(self) -> dict[str, Tensor]:
        """All of them, read."""
        return {name: tensor.load() for name, tensor in self.tensors.items()}

    def describe(self) -> dict[str, str]:
        """Its name and checksum, for a lineage."""
        return {"name": self.path.name, "sha256": sha256_of(self.path)}


def open_weights(path: str | Path) -> WeightFile:
    """Open a file of weights; no code in it runs.

    Raises:
        BadInput: it is not there, is neither safetensors nor of torch.save, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"{path} is no file")
    tensors = _safetensors(path) if path.suffix == ".safetensors" else read_tensors(path)
    for wrapper in _WRAPPERS:
        inside = {n.removeprefix(f"{wrapper}."): t for n, t in tensors.items() if n.startswith(f"{wrapper}.")}
        if inside:
            return WeightFile(path, inside)
    return WeightFile(path, tensors)


def _safetensors(path: Path) -> dict[str, Stored]:
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return {name: _InSafetensors(tuple(file.get_slice(name).get_shape()), name, path) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read as safetensors: {error}") from None
