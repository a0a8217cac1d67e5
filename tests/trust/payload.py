"""A real payload: bytes and names that make a folder when they are obeyed, and nothing when they are read."""

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foreseen.data.manifest import Manifest, Shard, Split, write_manifest
from foreseen.data.shards import INDEX_ROW, rows_digest
from foreseen.data.tars import scan_tar


class Canary:
    """What sings if a payload runs.

    Args:
        folder: where it would sing, by a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.cage = folder / "canary-sang"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.cage), 0o777, True)

    @property
    def sang(self) -> bool:
        """Whether a payload ran since the last look."""
        found = self.cage.exists()
        shutil.rmtree(self.cage, ignore_errors=True)
        return found

    @property
    def pickled(self) -> bytes:
        """A pickle that runs when it is loaded."""
        return pickle.dumps(self)

    @property
    def array(self) -> bytes:
        """An `.npy` file of objects."""
        out = io.BytesIO()
        np.save(out, np.array([self], dtype=object), allow_pickle=True)
        return out.getvalue()

    @property
    def checkpoint(self) -> bytes:
        """A file of torch.save, as `.pth`, `.pt` and `pytorch_model.bin` are."""
        out = io.BytesIO()
        torch.save({"state_dict": self}, out)
        return out.getvalue()

    @property
    def old_checkpoint(self) -> bytes:
        """The same as it was before torch 1.6, without a zip around it."""
        out = io.BytesIO()
        torch.save({"state_dict": self}, out, _use_new_zipfile_serialization=False)
        return out.getvalue()

    @property
    def zipped_array(self) -> bytes:
        """An `.npz` file of objects."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("image.npy", self.array)
        return out.getvalue()

    @property
    def command(self) -> str:
        """A shell command."""
        return f"mkdir -p {self.cage}"

    @property
    def members(self) -> dict[str, bytes]:
        """By their extension, members of a sample that common readers unpickle."""
        kinds = {"pyd": self.pickled, "pkl": self.pickled, "pickle": self.pickled, "pth": self.checkpoint}
        return {**kinds, "pt": self.checkpoint, "npy": self.array, "npz": self.zipped_array}


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    """A plain tar."""
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_set(folder: Path, shards: dict[str, dict[str, bytes]], image: str = "jpg") -> None:
    """A packed set, split `train`, of tars with any members; those with the extension `image` are its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    rows, entries = [], []
    for name, members in shards.items():
        write_tar(folder / name, members)
        found = [member for member in scan_tar(folder / name) if member.name.split(".", 1)[-1] == image]
        rows += [(member.offset // 512, member.size, 0) for member in found]
        entries.append(Shard(name, len(found), (folder / name).stat().st_size))
    index = np.array(rows, dtype=INDEX_ROW)
    np.save(folder / "train.index.npy", index)
    split = Split(
        samples=len(rows), shards=tuple(entries), image=image, index="train.index.npy",
        index_digest=rows_digest(index), labels=None, mean=None, std=None, source=None, licence=None, plan=None,
    )  # fmt: skip
    write_manifest(folder, Manifest({"train": split}))
