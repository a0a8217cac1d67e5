"""Tars as others make them, for tests: members of any name, in any order."""

import io
import json
import tarfile
from pathlib import Path

from tests.pets_archives import jpeg, png


def make_tar(file: Path, members: list[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar with these members in this order; a name may come twice."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def members_of(number: int, label: object = None, **more: bytes) -> list[tuple[str, bytes]]:
    """One sample: a picture of its own size, a label as `cls` where there is one, and more members by extension."""
    found = [(f"s/{number:03d}.jpg", jpeg(40 + number, 30))]
    if label is not None:
        found.append((f"s/{number:03d}.cls", str(label).encode()))
    return found + [(f"s/{number:03d}.{extension.replace('__', '.')}", data) for extension, data in more.items()]


def sound(file: Path, numbers: range, *, mode: str = "w") -> Path:
    """A tar of samples with labels 0, 1, 2, a json, and a label map."""
    members: list[tuple[str, bytes]] = []
    for number in numbers:
        facts = json.dumps({"breed": "abc"[number % 3], "width": 7, "note": number}).encode()
        members += members_of(number, number % 3, json=facts, seg__png=png(40 + number, 30))
    return make_tar(file, members, mode)
