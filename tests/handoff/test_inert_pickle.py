"""Tensors come out of torch.save's files, whole modules too; and nothing that lies in them runs, or costs too much."""

import argparse
import contextlib
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foreseen.errors import BadInput
from foreseen.handoff import inert_pickle
from foreseen.handoff.inert_pickle import read_tensors
from tests.trust.payload import Canary

ZIP = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path)


def _save(what: Any, file: Path, zipped: bool) -> Path:
    torch.save(what, file, _use_new_zipfile_serialization=zipped)
    return file


class _Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("table", torch.arange(6).view(2, 3))
        self.res_path = nn.Sequential(OrderedDict(conv_1=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), norm=nn.BatchNorm2d(4)))
        self.up = nn.Upsample(scale_factor=2, mode="nearest")


@ZIP
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_a_pickled_module_gives_its_state_dict(zipped: bool, tmp_path: Path) -> None:
    module = _Block(0.5)
    found = read_tensors(_save(module, tmp_path / "a.pkl", zipped))
    expected = module.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        assert torch.equal(tensor.load(), expected[name])
        assert tensor.load().dtype == expected[name].dtype


@ZIP
def test_a_checkpoint_with_arguments_gives_its_weights_though_torch_refuses_it(zipped: bool, tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    kept = {"model": state, "args": argparse.Namespace(lr=1.0), "epoch": 3, "optimizer": {"groups": [torch.ones(2)]}}
    file = _save(kept, tmp_path / "a.pth", zipped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=True)
    found = read_tensors(file)
    assert found.keys() == {"model.weight", "model.bias"}
    assert torch.equal(found["model.weight"].load(), state["weight"])


@ZIP
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_every_usual_dtype_and_views_of_a_shared_storage(zipped: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = torch.arange(24).view(4, 6).to(dtype)
    kept = {"whole": base, "view": base[1:, ::2].t(), "scalar": base[0, 3], "empty": base[:0]}
    found = read_tensors(_save(kept, tmp_path / "a.pt", zipped))
    for name, tensor in kept.items():
        assert torch.equal(found[name].load(), tensor), name


@pytest.mark.parametrize("payload", ["checkpoint", "old_checkpoint"])
def test_a_payload_runs_in_torch_and_not_here(payload: str, canary: Canary, tmp_path: Path) -> None:
    file = tmp_path / "evil.pkl"
    file.write_bytes(getattr(canary, payload))
    torch.load(file, weights_only=False)
    assert canary.sang
    assert read_tensors(file) == {}
    assert not canary.sang


def test_a_payload_among_the_weights_leaves_the_weights(canary: Canary, tmp_path: Path) -> None:
    for zipped in (True, False):
        file = _save({"weight": torch.ones(3), "evil": canary, "more": [canary]}, tmp_path / "a.pth", zipped)
        found = read_tensors(file)
        assert {name: tensor.load().tolist() for name, tensor in found.items()} == {"weight": [1.0, 1.0, 1.0]}
    assert not canary.sang


def test_a_plain_pickle_is_refused_without_running(canary: Canary, tmp_path: Path) -> None:
    (tmp_path / "evil.pkl").write_bytes(canary.pickled)
    with pytest.raises(BadInput, match=r"cannot be read as a file of torch\.save"):
        read_tensors(tmp_path / "evil.pkl")
    assert not canary.sang


class _Calls:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self._call


@ZIP
@pytest.mark.parametrize(
    "hostile",
    [
        lambda folder: _Calls(os.makedirs, folder),
        lambda folder: _Calls(eval, f"__import__('os').makedirs({folder!r})"),
        lambda folder: _Calls(torch._utils._rebuild_parameter, _Calls(os.makedirs, folder), True, OrderedDict()),
        lambda folder: _Calls(OrderedDict, [("a", _Calls(os.makedirs, folder))]),
        lambda folder: {"module": _Calls(nn.ModuleList, [_Calls(os.makedirs, folder)])},
    ],
    ids=["a call", "code", "a parameter's data", "a dict's value", "a module's part"],
)
def test_nothing_named_is_called(zipped: bool, hostile: Callable[[str], Any], tmp_path: Path) -> None:
    folder = tmp_path / "called"
    file = _save({"evil": hostile(str(folder)), "weight": torch.ones(1)}, tmp_path / "a.pth", zipped)
    with contextlib.suppress(TypeError):  # what the call gives is no part of a module
        torch.load(file, weights_only=False)
    assert folder.exists()
    folder.rmdir()
    with contextlib.suppress(BadInput):
        assert "weight" in read_tensors(file)
    assert not folder.exists()


def _zip(program: bytes, file: Path, compression: int = zipfile.ZIP_STORED, **storages: bytes) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("a/data.pkl", program, zipfile.ZIP_STORED if storages else compression)
        for name, data in storages.items():
            archive.writestr(f"a/data/{name.removeprefix('_')}", data)
    return file


def _tensor_program(shape: tuple[int, ...], stride: tuple[int, ...], numel: int, first: int = 0) -> bytes:
    """A dict with one float32 tensor "w" in storage "0", as torch.save writes it, but for what it says of sizes."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value == "STORAGE" else None

    out = io.BytesIO()
    made = _Calls(torch._utils._rebuild_tensor_v2, "STORAGE", first, shape, stride, False, OrderedDict())
    Pickler(out, 2).dump({"w": made})
    return out.getvalue()


def test_the_test_programs_are_what_torch_writes(tmp_path: Path) -> None:
    data = torch.arange(6.0).numpy().tobytes()
    file = _zip(_tensor_program((2, 3), (3, 1), 6), tmp_path / "a.pth", _0=data)
    assert read_tensors(file)["w"].load().tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("shape", "stride", "numel", "first", "sentence"),
    [
        ((1 << 40,), (0,), 6, 0, "in a storage of 6 values"),  # a small storage, seen a million million times
        ((1 << 47, 1 << 47), (1, 1), 6, 0, "in a storage of 6 values"),
        ((2, 3), (3, 1), 6, 1, "in a storage of 6 values"),
        ((2, 3), (4, 1), 6, 0, "in a storage of 6 values"),
        ((2, -3), (3, 1), 6, 0, "-3 where a size is due"),
        ((2, 3), (-3, 1), 6, 5, "-3 where a size is due"),
        ((2, 3.5), (3, 1), 6, 0, "3.5 where a size is due"),
        ((2, 3), (3,), 6, 0, "tensor of a kind that is not known"),
        ((1 << 40,), (1,), 1 << 40, 0, "not there, or not as many as it says"),
        ((2, 3), (3, 1), 7, 0, "not there, or not as many as it says"),
    ],
)  # fmt: skip
def test_a_tensor_larger_than_its_bytes_is_refused(
    shape: Any, stride: Any, numel: int, first: int, sentence: str, tmp_path: Path
) -> None:
    file = _zip(_tensor_program(shape, stride, numel, first), tmp_path / "a.pth", _0=bytes(24))
    with pytest.raises(BadInput, match=sentence):
        read_tensors(file)


def test_compressed_tensors_are_refused(tmp_path: Path) -> None:
    program = _tensor_program((1 << 20,), (1,), 1 << 20)
    file = _zip(program, tmp_path / "a.pth", zipfile.ZIP_DEFLATED, _0=bytes(4 << 20))
    with pytest.raises(BadInput, match="its tensors are compressed"):
        read_tensors(file)


def test_many_views_of_one_storage_do_not_add_up_to_more_than_the_file(tmp_path: Path) -> None:
    base = torch.zeros(1 << 16)
    file = _save({str(number): base[number:] for number in range(50)}, tmp_path / "a.pth", True)
    with pytest.raises(BadInput, match="its tensors are larger than it is"):
        read_tensors(file)


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (pickle.dumps({"a": b"x"}, 4), "the instruction FRAME, which torch.save does not write"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        (b"\x80\x02cos\nsystem\n(i__builtin__\nint\n.", "the instruction INST"),
        (b"\x80\x02}r\xff\xff\xff\xff.", "a table larger than itself"),
        (b"\x80\x02}", "pickle exhausted"),
        (b"\x80\x02.", "cannot be read"),
        (b"\x80\x02}Q.", "refers to something that is no storage"),
        (b"\x80\x02(cposix\nsystem\nX\x05\x00\x00\x00falseo.", "the instruction OBJ"),
        # The state of one of the reader's own functions.
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x05\x00\x00\x00a____K\x01s\x86b.",
            "it changes what was checked",
        ),
    ],
)
def test_programs_that_torch_does_not_write_are_refused(program: bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        read_tensors(_zip(program, tmp_path / "a.pth"))


def test_a_program_is_bounded_in_size_names_and_nesting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested: dict[str, Any] = {}
    for _ in range(200):
        nested = {"a": nested}
    with pytest.raises(BadInput, match="nested too deeply"):
        read_tensors(_save(nested, tmp_path / "a.pth", True))
    twice: dict[str, Any] = {}
    for _ in range(60):
        twice = {"a": twice, "b": twice}
    with pytest.raises(BadInput, match="nested too deeply"):  # 2**60 paths lead to its end
        read_tensors(_save(twice, tmp_path / "a.pth", True))
    names = b"\x80\x02" + b"".join(b"cm\nn%d\n0" % number for number in range(2000)) + b"N."
    with pytest.raises(BadInput, match="more than 1000 classes"):
        read_tensors(_zip(names, tmp_path / "a.pth"))
    monkeypatch.setattr(inert_pickle, "MAX_PROGRAM", 100)
    with pytest.raises(BadInput, match="larger than 100 bytes"):
        read_tensors(_zip(b"\x80\x02" + b"N0" * 100 + b"N.", tmp_path / "a.pth"))


def _text(word: str) -> bytes:
    return b"X" + len(word).to_bytes(4, "little") + word.encode()


_DOUBLING = b"N" + b"\x85q\x00h\x00\x86" * 60  # a pair of the last pair, sixty times: 2**60 of them to hash or to write


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        (b"\x80\x02}" + _DOUBLING + b"Ns.", None),  # a key
        (b"\x80\x02}(" + _DOUBLING + b"Nu.", None),
        (b"\x80\x02ccollections\nOrderedDict\n](" + _DOUBLING + b"N\x86e\x85R.", None),
        (b"\x80\x02}" + b"N" + b"\x85" * 500_000 + b"Ns.", None),  # whose hash would be deeper than the stack
        (b"\x80\x02(" + _text("storage") + b"ctorch\nFloatStorage\n" + _text("0") + _text("cpu") + _DOUBLING + b"tQ.",
         "a tuple where a size is due"),
        # One list of 200,000, for each of 100,000 calls.
        (b"\x80\x02cm\nn\nq\x01(" + b"N" * 200_000 + b"tq\x02" + b"h\x01h\x02R" * 100_000 + b".",
         "calls have more than"),
        (b"\x80\x02ccollections\nOrderedDict\nq\x01](" + b"(K\x01Nt" * 50_000 + b"e\x85q\x02" + b"h\x01h\x02R" * 100_000
         + b".", "calls have more than"),
    ],
)  # fmt: skip
def test_small_programs_that_would_never_end_or_fill_memory_do_not(
    program: bytes, sentence: str | None, tmp_path: Path
) -> None:
    file = _zip(program, tmp_path / "a.pth")
    if sentence is None:
        assert read_tensors(file) == {}
    else:
        with pytest.raises(BadInput, match=sentence):
            read_tensors(file)


def test_long_names_are_not_multiplied(tmp_path: Path) -> None:
    """A key of a megabyte on the way to each of ten thousand tensors."""
    inner = {"k" * (1 << 20): torch.zeros(1), "w": torch.zeros(1)}
    found = read_tensors(_save({str(number): inner for number in range(10_000)}, tmp_path / "a.pth", True))
    assert found.keys() == {f"{number}.w" for number in range(10_000)}


@pytest.mark.parametrize(
    "state", [{"shape": (1 << 40,), "_stride": (0,)}, {"shape": (-(1 << 40),)}, {"_first": 1 << 20}, {"_file": None}]
)
def test_a_tensor_is_not_changed_after_it_was_checked(state: dict[str, Any], tmp_path: Path) -> None:
    """Pickle's BUILD writes into the dictionary of whatever has no method against it."""
    checked = _tensor_program((2, 3), (3, 1), 6)
    changed = pickle.dumps(state, 2)[2:-1]
    at = checked.rindex(b"s.")  # where "w" and its tensor are put into the dict
    file = _zip(checked[:at] + changed + b"b" + checked[at:], tmp_path / "a.pth", _0=bytes(24))
    with pytest.raises(BadInput, match="it changes what was checked"):
        read_tensors(file)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_program_is_refused_before_it_is_unpacked(compression: int, tmp_path: Path) -> None:
    """A dictionary of LZMA may be of 4 GB, whatever lies in it."""
    with pytest.raises(BadInput, match="it is compressed, which torch.save does not do"):
        read_tensors(_zip(b"\x80\x02N.", tmp_path / "a.pth", compression))


@ZIP
def test_every_truncation_is_a_sentence(zipped: bool, tmp_path: Path) -> None:
    whole = _save(nn.Linear(8, 8).state_dict(), tmp_path / "a.pth", zipped).read_bytes()
    for length in range(0, len(whole), 23):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(BadInput, match="cannot be read"):
            read_tensors(tmp_path / "cut.pth")


@ZIP
def test_flipped_bytes_are_read_or_refused_and_never_more(zipped: bool, tmp_path: Path) -> None:
    whole = _save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pth", zipped).read_bytes()
    for place in range(0, min(len(whole), 900), 3):
        damaged = bytearray(whole)
        damaged[place] ^= 0x55
        (tmp_path / "bad.pth").write_bytes(damaged)
        try:
            for tensor in read_tensors(tmp_path / "bad.pth").values():
                tensor.load()
        except BadInput:
            pass


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    for name, data in {"empty": b"", "text": b"<html>not found</html>", "zip": b"PK\x03\x04" + bytes(40)}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadInput, match="cannot be read"):
            read_tensors(tmp_path / name)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInput, match="cannot be read"):
            read_tensors(other)
