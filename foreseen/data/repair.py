"""A clean copy of a packed set or of tars that somebody else made: what `foreseen data repair` does.

There is one way of writing shards, `pack`; repairing is packing from the tars. What is whole goes over with its bytes,
label, facts, label maps and split; what is not is left out by name, in SPLIT.unreadable.txt as ever.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foreseen.data.arrays import map_array
from foreseen.data.extra_columns import RESERVED
from foreseen.data.manifest import FILE_NAME, Manifest, Split, read_manifest
from foreseen.data.pack import Progress, Summary, pack
from foreseen.data.shards import INDEX_ROW, TAR_BLOCK
from foreseen.data.source import SourceSample
from foreseen.data.tar_labels import LabelRule, number_texts
from foreseen.data.tar_paths import check_apart, find_tars
from foreseen.data.tar_samples import TarSamples, count_up
from foreseen.data.tar_source import TarListing, TarRows, TarSource, find_masks, list_notes
from foreseen.errors import BadInput
from foreseen.files import expand_home


@dataclass(frozen=True)
class Damaged:
    """What there is to copy.

    Attributes:
        splits: samples of each.
        classes: names of the classes.
        entries: what the manifest says of the splits, where there is one.
        notes: what a user should know, in words.
    """

    splits: dict[str, Sequence[SourceSample]]
    classes: tuple[str, ...] | None
    entries: dict[str, Split]
    notes: tuple[str, ...]


def repair(
    src: str,
    out: Path,
    *,
    shards_at: Path | None = None,
    workers: int | None = None,
    say: Callable[[str], None],
    progress: Callable[[str], AbstractContextManager[Progress]],
) -> list[Summary]:
    """Write a clean copy.

    Args:
        src: folder of a set, or tars as `TarSource` takes them.
        out: new folder.
        shards_at: folder of the tars of a set; that of the manifest if None.
        workers: processes.
        say: told in a line what is noticed.
        progress: called with a split's name; what it answers is entered while that is written.

    Raises:
        BadInput: there is nothing whole, or the folder is that of the source or holds other things.
    """
    folder = expand_home(src)
    if out.resolve() in {folder.resolve(), None if shards_at is None else shards_at.resolve()}:
        raise BadInput(f"{out} is the source itself: give a new folder")
    if not folder.is_dir():
        check_apart(out, find_tars([src]))
    damaged = look_at(src, shards_at)
    for note in damaged.notes:
        say(note)
    summaries = []
    for split, samples in damaged.splits.items():
        entry = damaged.entries.get(split)
        is_ours = entry is not None and not entry.is_indexed
        with progress(split) as report:
            summaries.append(
                pack(
                    samples,
                    out,
                    split,
                    classes=damaged.classes,
                    source=Path(src).name if entry is None else entry.source,
                    licence=None if entry is None else entry.licence,
                    image=entry.image if entry is not None and is_ours else None,
                    workers=workers,
                    keep=True,
                    progress=report,
                )
            )
    return summaries


def look_at(src: str, shards_at: Path | None = None) -> Damaged:
    """List what a source holds, whole or not.

    Raises:
        BadInput: there is nothing.
    """
    folder = expand_home(src)
    if (folder / FILE_NAME).is_file():
        try:
            manifest = read_manifest(folder)
        except BadInput as error:
            lost = f"{error}: class names, checksums and licence in it are lost, and the tars alone are read"
            found = TarSource([src], salvage=True).read()
            return Damaged(dict(found.splits), found.classes, {}, (lost, *found.notes))
        return _look_at_set(folder, shards_at or folder, manifest)
    found = TarSource([src], salvage=True).read()
    return Damaged(dict(found.splits), found.classes, {}, found.notes)


def _look_at_set(folder: Path, at: Path, manifest: Manifest) -> Damaged:
    """The splits of a set, with the checksums of its index."""
    splits: dict[str, Sequence[SourceSample]] = {}
    notes: list[str] = []
    for name, entry in manifest.splits.items():
        tars, missing = [], []
        index = _index_of(folder, entry)
        starts = [0, *accumulate(shard.samples for shard in entry.shards)]
        for number, shard in enumerate(entry.shards):
            if not (at / shard.name).is_file():
                missing.append(f"{shard.name} with {shard.samples:,} samples")
                continue
            tar = TarListing.read(at / shard.name, shard.name, salvage=True)
            if (lost := shard.samples - len(tar.samples.keys)) > 0:
                notes.append(f"{shard.name} has lost {lost:,} of its {shard.samples:,} samples")
            if index is not None:
                _take_checksums(tar, index[starts[number] : starts[number + 1]], entry)
            tars.append(tar)
        if missing:
            notes.append(f"{len(missing):,} shards of {name} are missing, such as {missing[0]}")
        if not tars:
            notes.append(f"nothing is left of {name}")
            continue
        fields = {field: field for field in count_up(tar.scan_json() for tar in tars) if field not in RESERVED}
        masks = find_masks(tars) if entry.is_indexed else _usual_masks(tars, entry.image)
        _number_labels(tars, entry, manifest.classes)
        image = entry.image if not entry.is_indexed else _asked_image(entry)
        path_field = None if entry.is_indexed else "path"
        splits[name] = TarRows(tars, fields, masks, path_field, image)
        notes += list_notes(tars)
    return Damaged(splits, manifest.classes, dict(manifest.splits), tuple(notes))


def _asked_image(entry: Split) -> str | None:
    plan = dict((entry.plan or {}).get("indexed") or {})
    image = plan.get("image")
    return None if image is None else str(image)


def _index_of(folder: Path, entry: Split) -> NDArray[np.void] | None:
    try:
        return map_array(folder / entry.index, INDEX_ROW, entry.samples)
    except BadInput:
        return None


def _take_checksums(tar: TarListing, rows: NDArray[np.void], entry: Split) -> None:
    """Give each picture the checksum that the index has for its place."""
    pictures = tar.samples.pictures(entry.image if not entry.is_indexed else _asked_image(entry))
    known = {(int(row["offset_512"]) * TAR_BLOCK, int(row["size"])): int(row["crc32"]) for row in rows}
    for number, picture in enumerate(pictures.tolist()):
        if picture >= 0:
            place = (int(tar.samples.offset[picture]), int(tar.samples.size[picture]))
            tar.crc32[number] = known.get(place, 0)


def _usual_masks(tars: Sequence[TarListing], image: str) -> list[str]:
    """The members that nearly all samples of a set have; a sample without one of the usual members is in trouble."""
    counts = count_up(_members_of(tar.samples) for tar in tars)
    total = sum(len(tar.samples.keys) for tar in tars)
    usual = [name for name, count in counts.items() if 2 * count > total and name != image]
    for tar in tars:
        for name in usual:
            for number in np.flatnonzero(tar.samples.members(name) < 0).tolist():
                tar.troubles.setdefault(number, f"it has no {name}, which the others have")
    return sorted(name for name in usual if name.endswith(".png"))


def _members_of(samples: TarSamples) -> dict[str, int]:
    """How many samples have each extension."""
    pairs = np.unique(samples.sample * max(1, len(samples.extensions)) + samples.extension)
    counts = np.bincount(pairs % max(1, len(samples.extensions)), minlength=len(samples.extensions))
    return dict(zip(samples.extensions, counts.tolist(), strict=True))


def _number_labels(tars: Sequence[TarListing], entry: Split, classes: tuple[str, ...] | None) -> None:
    if entry.labels is None:
        return
    plan = dict((entry.plan or {}).get("indexed") or {})
    rule = LabelRule.parse(str(plan.get("labels", "none"))) if entry.is_indexed else LabelRule("json", "label")
    texts = [tar.read_texts(rule) for tar in tars]
    written = {text for found in texts for text in found if text is not None}
    count = len(classes) if classes else 1 << 31
    if entry.is_indexed:
        known = written & set(classes or ()) or {text for text in written if text.isdecimal() and int(text) < count}
        numbers = number_texts(known, str(rule), classes)[0] if known else {}
    else:  # pack wrote the numbers themselves
        numbers = {text: int(text) for text in written if text.isdecimal() and int(text) < count}
    for tar, found in zip(tars, texts, strict=True):
        for number, text in enumerate(found):
            if text is not None and text not in numbers:
                tar.troubles.setdefault(number, f"its label is {text[:80]!r}, which is no class of the set")
            elif text is not None:
                tar.labels[number] = numbers[text]
