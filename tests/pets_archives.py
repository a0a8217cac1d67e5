"""Oxford-IIIT Pet in little: two archives of the official layout."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

LISTS = {
    "trainval.txt": "Abyssinian_1 1 1 1\ngreat_pyrenees_2 2 2 1\nAbyssinian_3 1 1 1\n",
    "test.txt": "great_pyrenees_4 2 2 1\n",
}
XML = "<annotation><object><name>cat</name><bndbox>{}</bndbox></object></annotation>"
BOX = "<xmin>20</xmin><ymin>10</ymin><xmax>60</xmax><ymax>40</ymax>"


def png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.tile(np.arange(width) // (width // 3 + 1) + 1, (height, 1)).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def jpeg(width: int, height: int, kind: str = "JPEG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), (width, height, 90)).save(out, kind)
    return out.getvalue()


def make_archives(folder: Path, changes: dict[str, bytes | None] | None = None) -> Path:
    """Two archives of four pictures; changes replaces members, or leaves them out where it says None."""
    folder.mkdir(parents=True)
    members: dict[str, bytes | None] = {f"annotations/{name}": text.encode() for name, text in LISTS.items()}
    for number, name in enumerate(("Abyssinian_1", "great_pyrenees_2", "Abyssinian_3", "great_pyrenees_4")):
        members[f"images/{name}.jpg"] = jpeg(80 + number, 60)
        members[f"annotations/trimaps/{name}.png"] = png(80 + number, 60)
    members["annotations/xmls/Abyssinian_1.xml"] = XML.format(BOX).encode()
    members["annotations/trimaps/._Abyssinian_1.png"] = b"a stray file of macOS, as in the official archive"
    for archive in ("images", "annotations"):
        with tarfile.open(folder / f"{archive}.tar.gz", "w:gz", format=tarfile.GNU_FORMAT) as tar:
            for name, data in (members | (changes or {})).items():
                if name.startswith(archive) and data is not None:
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder
