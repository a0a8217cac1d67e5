"""Sets of torchvision: their splits, labels and class names, and pickles that never run."""

import io
import json
import os
import pickle
import socket
import struct
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.open_source import SourceOptions, open_source
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import Missing, SourceSample, Splits
from foreseen.data.torchvision_set import SETS
from foreseen.errors import BadInput


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def read(name: str, root: Path, classes: tuple[str, ...] | None = None, **options: Any) -> Splits:
    return open_source(f"torchvision:{name}@{root}", SourceOptions(**options)).read(classes)


def labels(found: Splits) -> dict[str, list[int | None]]:
    return {split: [sample.label for sample in samples] for split, samples in found.splits.items()}


def pixels(sample: SourceSample) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(sample.image.read())))


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def checksum(file: Path) -> str:
    return md5(file.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("name", sorted(SETS))
def test_every_set_that_is_listed_is_in_torchvision(name: str, tmp_path: Path) -> None:
    assert hasattr(torchvision.datasets, name)
    with pytest.raises(BadInput, match=rf"torchvision:{name} is not in {tmp_path} \(.*\): give "):
        read(name, tmp_path)
    assert not list(tmp_path.iterdir())


# Pictures that are files


@pytest.fixture
def food(picture_folder: Path, tmp_path: Path) -> Path:
    """Food-101 in little: two classes, of which the first has a picture in each split."""
    root = tmp_path / "sets" / "food-101"
    (root / "meta").mkdir(parents=True)
    (root / "images" / "pie").mkdir(parents=True)
    for number, split in enumerate(("train", "test")):
        source = picture_folder / "a" / f"picture {3 * number}.jpg"
        (root / "images" / "pie" / f"{number}.jpg").write_bytes(source.read_bytes())
        listed = {"soup": ["soup/gone"], "pie": [f"pie/{number}", "../../../secret"]}
        (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    (tmp_path / "secret.jpg").write_bytes(source.read_bytes())
    return tmp_path / "sets"


def test_files_keep_their_bytes_and_labels_their_names(food: Path, tmp_path: Path) -> None:
    found = read("Food101", food)
    assert (found.classes, found.are_named) == (("pie", "soup"), True)
    assert labels(found) == {"train": [1, 0, 0], "test": [1, 0, 0]}
    gone, pie, secret = found.splits["train"]
    assert pie.name == "food-101/images/pie/0.jpg"
    assert pie.image.read() == (food / pie.name).read_bytes()
    assert isinstance(gone.image, Missing)
    assert gone.image.reason == "the set names food-101/images/soup/gone.jpg, and there is no such file"
    assert isinstance(secret.image, Missing), "a list of the set led out of it"
    assert "lies outside" in secret.image.reason
    assert read("Food101", food, labels="none").classes is None
    with pytest.raises(BadInput, match="has a class 'soup' that the set does not have: pie, cake"):
        read("Food101", food, ("pie", "cake"))
    summary = pack(found.splits["train"], tmp_path / "set", "train", classes=found.classes, workers=1)
    assert (summary.samples, summary.converted, len(summary.unreadable)) == (1, 0, 2)


def test_the_digest_changes_with_the_files(food: Path) -> None:
    source = open_source(f"torchvision:Food101@{food}", SourceOptions())
    before = source.digest()
    assert before == source.digest()
    (food / "food-101" / "images" / "pie" / "0.jpg").write_bytes(b"other")
    assert before != source.digest()


def test_a_split_that_is_not_there_is_passed_over_and_said(picture_folder: Path, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        file = tmp_path / "country211" / split / "AD" / "1.jpg"
        file.parent.mkdir(parents=True)
        file.write_bytes(next(picture_folder.rglob("*.jpg")).read_bytes())
    found = read("Country211", tmp_path)
    assert labels(found) == {"train": [0], "val": [0]}
    (note,) = found.notes
    assert note.startswith("split 'test' of torchvision:Country211 is passed over: ")


def test_an_image_folder_is_one_split(picture_folder: Path) -> None:
    found = read("ImageFolder", picture_folder)
    assert (found.classes, found.are_named, list(found.splits)) == (("a", "b", "c"), False, ["train"])


# Pictures in arrays


def write_idx(file: Path, array: NDArray[np.uint8]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes())


def test_arrays_become_png_in_several_processes(tmp_path: Path) -> None:
    grey = {"train": noise(7, 28, 28), "test": noise(3, 28, 28)}
    raw = tmp_path / "FashionMNIST" / "raw"
    for part, array in zip(("train", "t10k"), grey.values(), strict=True):
        write_idx(raw / f"{part}-images-idx3-ubyte", array)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(len(array), dtype=np.uint8))
    found = read("FashionMNIST", tmp_path)
    assert found.classes is not None
    assert found.classes[:2] == ("T-shirt/top", "Trouser")
    assert labels(found) == {"train": [*range(7)], "test": [*range(3)]}
    for split in ("train", "test", "train"):  # one at a time is in memory
        assert [pixels(sample).tolist() for sample in found.splits[split]] == grey[split].tolist()
    summary = pack(found.splits["train"], tmp_path / "set", "train", classes=found.classes, shard_samples=3, workers=2)
    assert (summary.samples, summary.image, summary.converted) == (7, "png", 0)
    assert set(ShardSet.open(tmp_path / "set", "train").labels) == {*range(7)}  # type: ignore[arg-type]


def test_colours_and_pictures_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    for part, count in (("train", 3), ("test", 2), ("unlabeled", 4)):
        noise(count, 3, 96, 96).tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            np.arange(1, count + 1, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    for lists in ("train_list", "test_list"):
        names = [name for name, _ in getattr(torchvision.datasets.STL10, lists)]
        monkeypatch.setattr(
            torchvision.datasets.STL10, lists, [[name, checksum(folder / name)] for name in names]
        )  # fmt: skip
    found = read("STL10", tmp_path)
    assert found.classes == ("airplane", "bird", "car")
    assert labels(found) == {"train": [0, 1, 2], "test": [0, 1], "unlabeled": [None] * 4}
    assert (pixels(found.splits["test"][1]) == noise(2, 3, 96, 96)[1].transpose(2, 1, 0)).all()


# CIFAR


def text(value: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(value)) + value


def old_pickle(**entries: bytes) -> bytes:
    """A dictionary as Python 2 pickled it, from opcodes of its values."""
    body = b"".join(text(name.encode()) + value for name, value in entries.items())
    return b"\x80\x02}q\x01(" + body + b"u."


def old_list(values: list[bytes]) -> bytes:
    return b"](" + b"".join(values) + b"e"


def old_array(array: NDArray[np.uint8]) -> bytes:
    """An array as numpy of that time gave it to Python 2's pickle."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n" + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
    shape = b"".join(b"M" + struct.pack("<H", side) for side in array.shape) + b"\x86"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    return made + b"(K\x01" + shape + dtype + b"\x89" + text(array.tobytes()) + b"tb"


def write_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None = None) -> NDArray[np.uint8]:
    """CIFAR-100 in little, with its checksums taken for the official ones; pictures of train as [N, 3, 32, 32]."""
    kind, folder = torchvision.datasets.CIFAR100, root / "cifar-100-python"
    folder.mkdir(parents=True)
    pictures = noise(4, 3, 32, 32)
    for name, count in (("train", 4), ("test", 2)):
        array = old_array(pictures[:count].reshape(count, -1)) if data is None else data
        numbers = old_list([b"K" + bytes([1 - number % 2]) for number in range(count)])
        (folder / name).write_bytes(old_pickle(batch_label=text(b"x"), fine_labels=numbers, data=array))
    names = old_list([text(b"apple"), text(b"aquarium_fish")])
    (folder / "meta").write_bytes(old_pickle(fine_label_names=names))
    for attribute, name in (("train_list", "train"), ("test_list", "test")):
        monkeypatch.setattr(kind, attribute, [[name, checksum(folder / name)]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum(folder / "meta")})
    return pictures


def test_cifar_is_read_and_torchvision_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = write_cifar(tmp_path, monkeypatch)
    found = read("CIFAR100", tmp_path)
    assert found.classes == ("apple", "aquarium_fish")
    assert labels(found) == {"train": [1, 0, 1, 0], "test": [1, 0]}
    for sample, picture in zip(found.splits["train"], pictures, strict=True):
        assert (pixels(sample) == picture.transpose(1, 2, 0)).all()
    theirs = torchvision.datasets.CIFAR100(str(tmp_path))
    assert (theirs.data == pictures.transpose(0, 2, 3, 1)).all(), "the stand-in file is not what Python 2 wrote"
    assert theirs.targets == [1, 0, 1, 0]


def test_a_file_of_cifar_that_is_not_the_official_one_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "test").write_bytes(bomb(tmp_path / "ran"))
    with pytest.raises(BadInput, match=r"cifar-100-python/test is missing or not the official one"):
        read("CIFAR100", tmp_path)
    assert not (tmp_path / "ran").exists()


def bomb(file: Path) -> bytes:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(file),))

    return pickle.dumps(Bomb(), protocol=2)


def test_nothing_in_a_file_of_cifar_runs_even_with_the_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    armed = bomb(tmp_path / "ran")
    pickle.loads(armed)
    assert (tmp_path / "ran").exists(), "the bomb is a dud"
    (tmp_path / "ran").rmdir()
    write_cifar(tmp_path, monkeypatch, armed[2:-1])
    with pytest.raises(BadInput, match="holds its pictures in a way that is not known"):
        read("CIFAR100", tmp_path)
    assert not (tmp_path / "ran").exists()


# Sentences


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("CIFAR10", r"torchvision:CIFAR10 names no folder: give torchvision:CIFAR10@DIR, where the set lies"),
        ("", r"torchvision: names no folder: give torchvision:NAME@DIR"),
        ("CIFAR10@/nowhere", "/nowhere is not a folder: give torchvision:CIFAR10@DIR"),
        ("LSUN@.", "torchvision:LSUN is no set of torchvision that is read; these are: CIFAR10, "),
        ("CIFAR@.", "torchvision:CIFAR is no set of torchvision that is read; did you mean CIFAR10"),
    ],
)
def test_what_is_no_set_is_a_sentence(place: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        open_source(f"torchvision:{place}", SourceOptions())


def test_only_sets_of_torchvision_are_downloaded(picture_folder: Path) -> None:
    with pytest.raises(BadInput, match="--download is for torchvision:NAME@DIR, not for"):
        open_source(str(picture_folder), SourceOptions(download=True))
