"""Tensors out of files of `torch.save`, zip or legacy, without running what a pickle can.

Whole pickled modules (DALL·E's encoder and decoder) and checkpoints that hold arguments (BEiT's, MAE's) are refused by
`torch.load(weights_only=True)`, and without it they may run anything. Here nothing of any module is ever looked up: the
few names that describe a tensor get this file's own functions, every other one a stand-in that keeps what it is given.
What a file can cost is bounded before it is read: the program that a pickle is has at most 4 MiB, and only the
instructions of pickle protocol 2; dicts have short names and small numbers as keys, so that hashing one ends; nothing
that was checked can be changed by what comes later; no tensor is larger than the bytes that the file has for it.

Both formats: torch/serialization.py of torch 2.11.
"""

import os
import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, Any, ClassVar

import torch
from torch import Tensor

from foreseen.errors import BadInput
from foreseen.files import open_regular

MAX_PROGRAM = 4 << 20  # bytes; checkpoints of the largest ViTs with their optimizer need a tenth
_MAX_NAMES = 1000
_MAX_ARGUMENTS = 1_000_000
_MAX_NODES = 100_000
_MAX_NAME = 1000  # characters of a tensor's name, and of a part of it
_MAX_DEPTH = 100
_MAX_COUNT = 1 << 48
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# All that the pickler of torch.save writes.
_INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "POP", "POP_MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "REDUCE", "NEWOBJ",
    "BUILD", "BINPERSID",
}  # fmt: skip
_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


class StandIn:
    """In place of whatever else a file names; `state` is what it was made with, or what was put into it."""

    def __new__(cls, *arguments: Any) -> "StandIn":
        """Keep the arguments; nothing happens."""
        made = super().__new__(cls)
        made.state = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = arguments

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Closed:
    """Its state is not a file's to set: pickle would write into the dictionary of any object without this method."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it changes what was checked")


@dataclass(frozen=True)
class _Storage(_Closed):
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class StoredTensor(_Closed):
    """A tensor that a file holds, not read yet.

    Attributes:
        shape: its sizes.
        dtype: of its values.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    _stride: tuple[int, ...]
    _first: int
    _storage: _Storage
    _file: "_TorchFile"

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """Read it.

        Raises:
            BadInput: the file ends before it does.
        """
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=self.dtype)
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self._stride, strict=True))
        data = self._file.read(self._storage, self._first, span)
        return torch.frombuffer(data, dtype=self.dtype).as_strided(self.shape, self._stride).clone()


class _Known(_Closed):
    """One of the functions that this file has in place of torch's."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _OrderedDict(dict[Any, Any]):
    """Of a state dict, which carries version numbers of its modules as an attribute."""

    def __setstate__(self, state: Any) -> None:
        pass


def _put(into: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep an entry. Keys of other kinds are passed over: to hash tuples of tuples may take for ever, or the stack."""
    if (isinstance(key, str) and len(key) <= _MAX_NAME) or (isinstance(key, int) and abs(key) < _MAX_COUNT):
        into[key] = value


class _Inert(pickle._Unpickler):
    """Reads the program of a file; knows a few names and looks up nothing.

    It is the reader in Python, whose instructions can be replaced: the one in C hashes whatever a program makes a key.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, program: bytes, file: "_TorchFile") -> None:
        super().__init__(BytesIO(program), encoding="utf-8")
        self._file = file
        self._left = _MAX_ARGUMENTS
        self._names: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): _Known(self._ordered_dict),
            ("torch._utils", "_rebuild_tensor"): _Known(self._tensor),
            ("torch._utils", "_rebuild_tensor_v2"): _Known(self._tensor),
            ("torch._utils", "_rebuild_parameter"): _Known(lambda data, *_: data),
        }

    def find_class(self, module: str, name: str) -> Any:
        """A known function, the type of a storage, or a stand-in; nothing of any module is looked up."""
        if module in ("torch", "torch.cuda") and name in _STORAGES:
            return _STORAGES[name]
        found = self._names.get((module, name))
        if found is None:
            if len(self._names) > _MAX_NAMES:
                raise ValueError(f"it names more than {_MAX_NAMES} classes")
            found = self._names[module, name] = type("StandIn", (StandIn,), {})
        return found

    def persistent_load(self, pid: Any) -> Any:
        """A storage; or, in legacy files, a module's class with its source."""
        if not isinstance(pid, tuple) or not pid:
            raise ValueError("it refers to something that is no storage")
        if pid[0] == "module":
            return pid[1]
        _, dtype, key, _, numel, *view = pid
        if pid[0] != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or any(view):
            raise ValueError("it has a storage of a kind that is not known")
        return self._file.storage(_Storage(dtype, key, _count(numel)))

    def _ordered_dict(self, items: Any = ()) -> _OrderedDict:
        pairs = list(items.items() if isinstance(items, dict) else items)
        self._spend(len(pairs))
        made = _OrderedDict()
        for key, value in pairs:
            _put(made, key, value)
        return made

    def _spend(self, values: int) -> None:
        """What is called copies what it is called with, which may be little in the file and called very often."""
        self._left -= values
        if self._left < 0:
            raise ValueError(f"its calls have more than {_MAX_ARGUMENTS:,} arguments")

    def _set_one(self: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        if isinstance(self.stack[-1], dict):  # else it is a stand-in for a mapping of another kind
            _put(self.stack[-1], key, value)

    def _set_many(self: Any) -> None:
        items = self.pop_mark()
        if isinstance(self.stack[-1], dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                _put(self.stack[-1], key, value)

    def _call(self: Any) -> None:
        arguments = self.stack.pop()
        if not isinstance(arguments, tuple):
            raise ValueError("it calls something with no tuple of arguments")
        self._spend(1 + len(arguments))
        self.stack[-1] = self.stack[-1](*arguments)

    dispatch[pickle.SETITEM[0]] = _set_one
    dispatch[pickle.SETITEMS[0]] = _set_many
    dispatch[pickle.REDUCE[0]] = dispatch[pickle.NEWOBJ[0]] = _call

    def _tensor(self, storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        if not isinstance(storage, _Storage) or len(shape) != len(stride) or len(shape) > 16:
            raise ValueError("it has a tensor of a kind that is not known")
        shape, stride = tuple(map(_count, shape)), tuple(map(_count, stride))
        last = _count(first) + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
        if prod(shape) > storage.numel or (0 not in shape and last >= storage.numel):
            raise ValueError(f"it has a tensor of {shape} in a storage of {storage.numel:,} values")
        return StoredTensor(shape, storage.dtype, stride, first, storage, self._file)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        # Of tuples within tuples the words may be without end.
        shown = str(value)[:40] if isinstance(value, int | float) else f"a {type(value).__name__}"
        raise ValueError(f"it has {shown} where a size is due")
    return value


class _TorchFile:
    """One file: where its program and the bytes of its storages lie."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}  # of a storage's bytes: offset and size, by its key
        self._storages: dict[str, _Storage] = {}
        with os.fdopen(open_regular(path), "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            if file.read(4) == b"PK\x03\x04":
                self.contents = self._read_zip(file)
            else:
                file.seek(0)
                self.contents = self._read_legacy(file)
        for storage in self._storages.values():
            if self._places.get(storage.key, (0, -1))[1] != storage.numel * storage.dtype.itemsize:
                raise ValueError(f"the bytes of storage {storage.key[:40]} are not there, or not as many as it says")

    def storage(self, storage: _Storage) -> _Storage:
        """Note a storage that the program refers to; every mention must agree."""
        if self._storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"it describes storage {storage.key[:40]} in two ways")
        return storage

    def read(self, storage: _Storage, first: int, count: int) -> bytearray:
        """So many values of a storage."""
        size = count * storage.dtype.itemsize
        with os.fdopen(open_regular(self._path), "rb") as file:
            file.seek(self._places[storage.key][0] + first * storage.dtype.itemsize)
            data = bytearray(file.read(size))
        if len(data) != size:
            raise BadInput(f"{self._path} ends within a tensor; it is damaged")
        return data

    def _read_zip(self, file: IO[bytes]) -> Any:
        with zipfile.ZipFile(file) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            programs = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
            if len(programs) != 1:
                raise ValueError("it is a zip without one data.pkl in it")
            prefix = programs[0].removesuffix("data.pkl")
            order = entries.get(f"{prefix}byteorder")
            if any(entry and entry.compress_type != zipfile.ZIP_STORED for entry in (order, entries[programs[0]])):
                raise ValueError("it is compressed, which torch.save does not do")
            if order and archive.open(order).read(8) != b"little":
                raise ValueError("its numbers are not little-endian")
            if entries[programs[0]].file_size > MAX_PROGRAM:
                raise ValueError(f"its pickle is larger than {MAX_PROGRAM:,} bytes")
            program = archive.open(programs[0]).read(MAX_PROGRAM)
        for name, entry in entries.items():
            if name.startswith(f"{prefix}data/"):
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError("its tensors are compressed")
                file.seek(entry.header_offset)
                header = file.read(30)
                names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
                place = entry.header_offset + 30 + names
                if place + entry.file_size > self.size:
                    raise ValueError("it ends within a tensor")
                self._places[name.removeprefix(f"{prefix}data/")] = place, entry.file_size
        (length,) = _ends(program, 1)
        return _Inert(program[:length], self).load()

    def _read_legacy(self, file: IO[bytes]) -> Any:
        start = file.read(MAX_PROGRAM)
        bounds = [0, *_ends(start, 5)]
        parts = [start[begin:end] for begin, end in pairwise(bounds)]
        magic, protocol, system, contents, keys = (_Inert(part, self).load() for part in parts)
        if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not system.get("little_endian"):
            raise ValueError("it is neither a zip nor a legacy file of torch.save with little-endian numbers")
        place = bounds[-1]
        for key in keys:
            if not isinstance(key, str) or key not in self._storages:
                raise ValueError("it lists a storage that no tensor has")
            storage = self._storages[key]
            file.seek(place)
            if int.from_bytes(file.read(8), "little") != storage.numel:
                raise ValueError(f"storage {key[:40]} has another size than it says")
            size = storage.numel * storage.dtype.itemsize
            if place + 8 + size > self.size:
                raise ValueError("it ends within a tensor")
            self._places[key] = place + 8, size
            place += 8 + size
        return contents


def _ends(data: bytes, count: int) -> list[int]:
    """Where each of the first `count` pickles in `data` ends, if they hold nothing but what torch.save writes."""
    source, ends = BytesIO(data), []
    for _ in range(count):
        for instruction, argument, _place in pickletools.genops(source):
            if instruction.name not in _INSTRUCTIONS:
                raise ValueError(f"it has the instruction {instruction.name}, which torch.save does not write")
            if instruction.name == "LONG_BINPUT" and int(argument or 0) > len(data):
                raise ValueError("it asks for a table larger than itself")
        ends.append(source.tell())
    return ends


def read_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """What a file of torch.save holds: the tensors of a pickled module or of dicts within dicts, by dotted names.

    Names of a module are those of its state dict. Lists, and whatever else is in the file, are passed over.

    Raises:
        BadInput: it is no such file, it is damaged, or it holds more than it could have been saved with.
    """
    path = Path(path)
    try:
        file = _TorchFile(path)
        found = dict(_walk(file.contents))
        if sum(tensor.nbytes for tensor in found.values()) > 2 * file.size:
            raise ValueError("its tensors are larger than it is")
    except Exception as error:  # whatever stand-ins and damaged files lead to
        what = str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}"
        raise BadInput(f"{path} cannot be read as a file of torch.save: {what[:300]}") from None
    return found


def _walk(contents: Any) -> Iterator[tuple[str, StoredTensor]]:
    nodes = [("", contents, 0)]
    seen = 0
    while nodes:
        name, node, depth = nodes.pop()
        seen += 1
        if seen > _MAX_NODES or depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        if isinstance(node, StoredTensor):
            yield name, node
            continue
        for key, child in _children(node):
            if not isinstance(key, str) or len(name) + len(key) > _MAX_NAME:
                continue
            nodes.append((f"{name}.{key}" if name else key, child, depth + 1))


def _children(node: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, StandIn) and isinstance(node.state, Mapping):
        for kind in ("_parameters", "_buffers", "_modules"):
            held = node.state.get(kind)
            if isinstance(held, dict):
                yield from held.items()
