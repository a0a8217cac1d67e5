"""The Oxford-IIIT Pet dataset, packed from its two official archives.

Cats and dogs of 37 breeds, about 200 pictures each, with breed, species, a trimap of the animal and, for the training
pictures, a box around its head: Parkhi, Vedaldi, Zisserman and Jawahar, "Cats and Dogs", CVPR 2012.
Splits are the official ones: `train` from trainval.txt, `test` from test.txt.

The archives are decompressed to plain tars in a work folder and read there by offset. No name in them becomes a path.
"""

import gzip
import hashlib
import shutil
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.etree import ElementTree

from foreseen.data.manifest import FILE_NAME, WORK_PREFIX, read_manifest
from foreseen.data.pack import Progress, Summary, pack
from foreseen.data.source import Blob, Box, SourceSample
from foreseen.data.tars import scan_tar
from foreseen.errors import BadInput

LICENCE = "CC BY-SA 4.0"
SOURCE = "Oxford-IIIT Pet (Parkhi et al., Cats and Dogs, CVPR 2012)"
URL = "https://thor.robots.ox.ac.uk/pets/"
MD5 = {  # of the official archives, as torchvision has them too
    "images.tar.gz": "5c4f3ee8e5d25df40f4fd59a7f44e54c",
    "annotations.tar.gz": "95a8c909bbe2e81eed6a22bccdf3f68f",
}
SPLIT_FILES = {"train": "trainval.txt", "test": "test.txt"}

_SPECIES = {1: "cat", 2: "dog"}
_MAX_TEXT = 1 << 20
_MAX_DECOMPRESSED = 16 << 30
_CHUNK = 1 << 20


def pack_pets(
    out: str | Path,
    archives: str | Path | None = None,
    *,
    max_side: int | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: Callable[[str], Progress] | None = None,
) -> list[Summary]:
    """Pack the splits `train` and `test`, going on where a killed packing stopped.

    KEY.json holds name, breed, species, label and head_box ([xmin, ymin, xmax, ymax] in pixels as annotated, or null);
    KEY.trimap.png is 1 pet, 2 background, 3 border. Both are scaled with pictures that are shrunk.

    Args:
        out: folder of the set.
        archives: folder with images.tar.gz and annotations.tar.gz, official or of the same layout. None downloads them
            and compares their checksums.
        max_side, workers, overwrite: as in `pack`.
        progress: called with what begins ("images.tar.gz", "train"); answers what to call with done and total.

    Raises:
        BadInput: an archive is missing, damaged or lacks what its lists name, or as `pack`.
    """
    out = Path(out)
    there = [] if overwrite else _packed_splits(out, max_side)
    splits = [split for split in SPLIT_FILES if split not in there]
    if not splits:
        raise BadInput(f"{out} already has the splits {' and '.join(SPLIT_FILES)}: give another folder, or --overwrite")
    started = progress or (lambda _: lambda done, total: None)
    work = out / f"{WORK_PREFIX}archives"
    found = {name: None if archives is None else _find(Path(archives), name) for name in MD5}
    try:
        work.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise BadInput(f"{out} cannot be written ({error.strerror}): give another folder") from None
    try:
        members: dict[str, Blob] = {}
        for name, archive in found.items():
            archive = archive or _download(name, work / name, started(name))
            members |= _decompress(archive, work / name.removesuffix(".gz"))
        samples, classes = list_pets(members)
        summaries = [
            pack(
                samples[split],
                out,
                split,
                classes=classes,
                max_side=max_side,
                workers=workers,
                source=SOURCE,
                licence=LICENCE,
                overwrite=overwrite,
                progress=started(split),
            )
            for split in splits
        ]
        shutil.rmtree(work)
    finally:
        for name in MD5:  # what was downloaded stays until all is packed
            (work / name.removesuffix(".gz")).unlink(missing_ok=True)
        for folder in (work, out):
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
    return summaries


def list_pets(members: Mapping[str, Blob]) -> tuple[dict[str, list[SourceSample]], tuple[str, ...]]:
    """The samples of each split and the names of the classes, from the members of both archives by name.

    Raises:
        BadInput: a list, picture or trimap is missing, or a list or box makes no sense.
    """
    breeds: dict[int, str] = {}
    splits: dict[str, list[SourceSample]] = {}
    for split, file in SPLIT_FILES.items():
        splits[split] = []
        for line in _read_text(members, f"annotations/{file}").splitlines():
            if not line or line.startswith("#"):
                continue
            try:
                name, number, species = line.split()[0], int(line.split()[1]), _SPECIES[int(line.split()[2])]
            except (IndexError, ValueError, KeyError):
                raise BadInput(f"annotations/{file} has a line {line!r}, not NAME CLASS SPECIES BREED") from None
            breed = name.rpartition("_")[0].replace("_", " ")
            if breeds.setdefault(number, breed) != breed:
                raise BadInput(f"annotations/{file} gives class {number} to {breeds[number]!r} and to {breed!r}")
            splits[split].append(
                SourceSample(
                    name=f"images/{name}.jpg",
                    image=_member(members, f"images/{name}.jpg", file),
                    label=number - 1,
                    meta={"name": name, "breed": breed, "species": species},
                    boxes={"head_box": _read_head_box(members, f"annotations/xmls/{name}.xml")},
                    masks={"trimap.png": _member(members, f"annotations/trimaps/{name}.png", file)},
                )
            )
    if sorted(breeds) != list(range(1, len(breeds) + 1)):
        raise BadInput(f"the lists of the annotations have classes {sorted(breeds)}, they must be 1, 2, 3, …")
    return splits, tuple(breeds[number] for number in sorted(breeds))


def _packed_splits(out: Path, max_side: int | None) -> list[str]:
    """The splits that are there already. A killed packing may have left one of them; its options must be the same."""
    if not (out / FILE_NAME).exists():
        return []
    splits = read_manifest(out).splits
    for name, split in splits.items():
        packed_with = (split.plan or {}).get("max_side")
        if name in SPLIT_FILES and packed_with != max_side:
            raise BadInput(
                f"{out} has the split {name!r} with --max-side {packed_with}, not {max_side}: --overwrite it"
            )
    return list(splits)


def _find(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise BadInput(f"{folder / name} does not exist: --from must be the folder of {' and '.join(MD5)}")
    return folder / name


def _download(name: str, file: Path, progress: Progress) -> Path:
    """Fetch an official archive, or take the one that an earlier attempt has fetched whole."""
    if not file.exists():
        part = file.with_name(f"{name}.part")
        try:
            with urllib.request.urlopen(URL + name, timeout=60) as answer, open(part, "wb") as out:
                total = int(answer.headers.get("Content-Length") or 0)
                while chunk := answer.read(_CHUNK):
                    out.write(chunk)
                    progress(out.tell(), total)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            part.unlink(missing_ok=True)
            raise BadInput(f"{URL}{name} cannot be downloaded ({error}): fetch it otherwise and give --from") from None
        part.replace(file)
    with open(file, "rb") as data:
        found = hashlib.file_digest(data, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != MD5[name]:
        file.unlink()
        raise BadInput(f"{URL}{name} has the md5 {found}, not {MD5[name]}: try again, or give --from another copy")
    return file


def _decompress(archive: Path, tar: Path) -> dict[str, Blob]:
    """Undo the gzip and list the members by name."""
    size = 0
    try:
        with gzip.open(archive) as source, open(tar, "wb") as out:
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > _MAX_DECOMPRESSED:
                    raise BadInput(
                        f"{archive} unpacks to more than {_MAX_DECOMPRESSED >> 30} GiB: it is not the dataset"
                    )
                out.write(chunk)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BadInput(f"{archive} is damaged or incomplete ({error}): fetch it again") from None
    return {name.removeprefix("./"): Blob(str(tar), size, offset) for name, offset, size in scan_tar(tar)}


def _member(members: Mapping[str, Blob], name: str, listed_in: str) -> Blob:
    if (blob := members.get(name)) is None:
        raise BadInput(f"the archives have no {name}, which {listed_in} lists: fetch them again")
    return blob


def _read_text(members: Mapping[str, Blob], name: str) -> str:
    blob = _member(members, name, "the dataset")
    if blob.size > _MAX_TEXT:
        raise BadInput(f"{name} has {blob.size:,} bytes, it should be a short text")
    return blob.read().decode(errors="replace")


def _read_head_box(members: Mapping[str, Blob], name: str) -> Box | None:
    """The first box of an annotation; None for pictures without one, which all of the test split are."""
    if name not in members:
        return None
    try:
        box = ElementTree.fromstring(_read_text(members, name)).find("object/bndbox")
        if box is None:
            return None
        xmin, ymin, xmax, ymax = (int(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except (ElementTree.ParseError, ValueError) as error:
        raise BadInput(f"{name} is no annotation that can be read ({error}): fetch the archives again") from None
    return xmin, ymin, xmax, ymax
