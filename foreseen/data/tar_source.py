"""Tars as a source: a tar, a folder of tars or a brace pattern, plain or compressed, made by anybody or by `pack`.

Members become samples by webdataset's rule (`tar_samples.py`), with what is scattered brought together again. The label
is `KEY.cls` or a field of `KEY.json`; the other fields, and label maps of the picture's size such as `KEY.seg.png`, are
packed with the picture. A sample that cannot be made out is listed, too, and packing leaves it out by name.
"""

import io
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foreseen.data.decode import decode
from foreseen.data.extra_columns import RESERVED, Keep, choose_extra, clean
from foreseen.data.labels import renumber_labels
from foreseen.data.manifest import FILE_NAME, Manifest, read_manifest
from foreseen.data.shards import CorruptSample
from foreseen.data.source import Blob, FoundFile, Listing, Missing, SourceSample, Splits, digest_files, read_bounded
from foreseen.data.table import LABEL_NAMES, Columns
from foreseen.data.tar_labels import (
    CLASSES_FILE,
    BadMember,
    LabelRule,
    number_texts,
    read_classes,
    read_json,
    read_label,
)
from foreseen.data.tar_paths import COMPRESSED_SUFFIXES, by_split, find_tars
from foreseen.data.tar_samples import TarSamples, count_up, group_members, regroup
from foreseen.data.tars import read_tar
from foreseen.data.unpack_tar import UnpackFolder, unpack_tar
from foreseen.errors import BadInput

_MOST_FIELDS = 256
_MASK_EXTENSION = re.compile(r"[a-z0-9_-]{1,32}\.png")


@dataclass(frozen=True, slots=True)
class CheckedBlob:
    """A picture in a tar whose checksum is known."""

    path: str
    size: int
    offset: int
    crc32: int

    def read(self) -> bytes:
        """The bytes; raises CorruptSample where they are not those that were packed."""
        data = Blob(self.path, self.size, self.offset).read()
        if self.crc32 and zlib.crc32(data) != self.crc32:
            raise CorruptSample("its picture is not the one that was packed or indexed (crc32 differs)")
        return data


@dataclass
class TarListing:
    """The samples of one tar.

    Attributes:
        file: the plain tar; name: what the user calls it.
        samples: none scattered or twice, except for those in `troubles`.
        troubles: why a sample cannot be packed, by its number.
        end: what is wrong with the tar as a whole, and has cost samples; None for a sound one.
        crc32: of each sample's picture, [N], 0 where it is not known.
        labels: class number of each sample, [N], -1 where it has none.
        regrouped: keys whose members were scattered or there twice.
        keeps: the folder that a plain copy lies in, which must outlive this.
    """

    file: Path
    name: str
    samples: TarSamples
    troubles: dict[int, str]
    end: str | None
    crc32: NDArray[np.uint32]
    labels: NDArray[np.int32]
    regrouped: int
    keeps: UnpackFolder | None = None

    @classmethod
    def read(cls, file: Path, name: str, *, salvage: bool) -> "TarListing":
        """List a plain tar.

        Raises:
            BadInput: it is damaged, and not to be salvaged.
        """
        tar = read_tar(file, salvage=salvage)
        if tar.problem is not None and not salvage:
            raise BadInput(f"{tar.problem}: `foreseen data repair {file.parent} OUT` keeps what is whole")
        grouped = group_members(tar)
        samples, troubles = regroup(grouped)
        for number in np.flatnonzero(samples.pictures() < 0).tolist():
            troubles.setdefault(number, f"it has no picture, but {', '.join(samples.extensions_of(number)[:3])}")
        crc32, labels = np.zeros(len(samples.keys), np.uint32), np.full(len(samples.keys), -1, np.int32)
        regrouped = int((grouped.is_broken_up | grouped.is_repeated).sum())
        if tar.problem is not None:
            _expect_members(samples, troubles)
        end = None if tar.problem is None else f"it {tar.problem.removeprefix(f'{file} ')}"
        return cls(file, name, samples, troubles, end, crc32, labels, regrouped)

    def scan_json(self) -> Counter[str]:
        """How often each field occurs in the jsons; those that cannot be read are troubles."""
        fields: Counter[str] = Counter()
        with open(self.file, "rb", buffering=0) as tar:
            for number, member in enumerate(self.jsons.tolist()):
                if member >= 0 and number not in self.troubles:
                    try:
                        fields.update(list(self._json(tar.fileno(), member)))
                    except BadMember as error:
                        self.troubles[number] = str(error)
        return fields

    def read_texts(self, rule: LabelRule) -> list[str | None]:
        """The label of each sample; one that makes no sense is a trouble."""
        texts: list[str | None] = [None] * len(self.samples.keys)
        if rule.extension is None:
            return texts
        with open(self.file, "rb", buffering=0) as tar:
            for number, member in enumerate(self.samples.members(rule.extension).tolist()):
                if member >= 0 and number not in self.troubles:
                    try:
                        texts[number] = read_label(tar.fileno(), self.samples, member, rule)
                    except BadMember as error:
                        self.troubles[number] = str(error)
        return texts

    def count_in(self, texts: Sequence[str | None], classes: int) -> list[int | None]:
        """Labels that `pack` wrote, as class numbers; one that is none is a trouble."""
        found: list[int | None] = [None] * len(texts)
        for number, text in enumerate(texts):
            if text is not None and text.isdecimal() and int(text) < classes:
                found[number] = int(text)
            elif text is not None:
                self.troubles.setdefault(number, f"its label is {text[:80]!r}, which is no class of the set")
        return found

    def facts(self, number: int) -> dict[str, Any]:
        """The json of one sample; empty without one."""
        if (member := int(self.jsons[number])) < 0:
            return {}
        with open(self.file, "rb", buffering=0) as tar:
            try:
                return self._json(tar.fileno(), member)
            except BadMember:  # changed since it was listed
                return {}

    def blob(self, member: int) -> Blob:
        """The bytes of a member."""
        return Blob(str(self.file), int(self.samples.size[member]), int(self.samples.offset[member]))

    @cached_property
    def jsons(self) -> NDArray[np.int64]:
        """The member that is each sample's json, -1 where there is none, [N]."""
        return self.samples.members("json")

    def _json(self, tar: int, member: int) -> dict[str, Any]:
        try:
            facts: dict[str, Any] = clean(
                read_json(tar, int(self.samples.offset[member]), int(self.samples.size[member]))
            )
        except RecursionError:
            raise BadMember("its json is nested too deeply") from None
        return facts


@dataclass(frozen=True)
class TarRows(Listing):
    """The samples of one split, made when they are asked for.

    Attributes:
        tars: their listings.
        fields: of the jsons that are packed, and what they are called then.
        masks: extensions of label maps, which every sample has.
        path_field: field with the name of the picture; None calls it by its tar and key.
    """

    tars: Sequence[TarListing]
    fields: Mapping[str, str]
    masks: Sequence[str]
    path_field: str | None
    image: str | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def sample(self, index: int) -> SourceSample:
        """The sample of a number, or what says why there is none."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        tar, number = self.tars[place], index - int(self._starts[place])
        if number == len(tar.samples.keys):
            return self._missing(tar.name, str(tar.end))
        key, picture = tar.samples.keys[number], int(self._pictures[place][number])
        if number in tar.troubles or picture < 0:
            return self._missing(f"{tar.name}/{key}", tar.troubles.get(number, f"it has no picture {self.image}"))
        facts = tar.facts(number)
        blob = tar.blob(picture)
        name = f"{tar.name}/{key}.{tar.samples.extensions[tar.samples.extension[picture]]}"
        if self.path_field is not None and isinstance(facts.get(self.path_field), str):
            name = facts[self.path_field]
        label = int(tar.labels[number])
        return SourceSample(
            name=name,
            image=CheckedBlob(blob.path, blob.size, blob.offset, int(tar.crc32[number])),
            label=None if label < 0 else label,
            meta={name: facts.get(field) for field, name in self.fields.items()},
            masks={name: tar.blob(int(found[number])) for name, found in self._mask_members[place].items()},
        )

    def _missing(self, name: str, reason: str) -> SourceSample:
        nothing = {name: Blob("", 0) for name in self.masks}
        return SourceSample(name, Missing(reason), meta=dict.fromkeys(self.fields.values()), masks=nothing)

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(len(tar.samples.keys) + (tar.end is not None) for tar in self.tars)])

    @cached_property
    def _pictures(self) -> list[NDArray[np.int64]]:
        return [tar.samples.pictures(self.image) for tar in self.tars]

    @cached_property
    def _mask_members(self) -> list[dict[str, NDArray[np.int64]]]:
        return [{name: tar.samples.members(name) for name in self.masks} for tar in self.tars]


@dataclass
class TarSource:
    """Tars that others made, or shards of a set, whose manifest beside them then says what their labels count.

    Attributes:
        places: files, folders and brace patterns.
        columns: `label` is `cls` or a field of the jsons.
        labels: "none" leaves labels out; anything else takes them where they are.
        keep: further fields of the jsons that go into KEY.json; None is all of them.
        salvage: take what is whole of a tar that is truncated or damaged.
    """

    places: Sequence[str]
    columns: Columns = field(default_factory=Columns)
    labels: str = "auto"
    keep: Keep = None
    salvage: bool = False
    _unpacked: UnpackFolder | None = None

    @property
    def name(self) -> str:
        """Of the folder of the tars, or of the only one."""
        files = self._files
        return files[0].name if len(files) == 1 else files[0].resolve().parent.name

    def digest(self) -> str:
        """Of names, sizes and times of all tars, and of what names their classes."""
        beside = (self.folder / name for name in (CLASSES_FILE, FILE_NAME))
        return digest_files(
            FoundFile.look(file) for file in (*self._files, *(file for file in beside if file.is_file()))
        )

    @property
    def files(self) -> Sequence[Path]:
        """The tars."""
        return self._files

    @property
    def folder(self) -> Path:
        """Of the first tar."""
        return self._files[0].parent

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """List the samples.

        Args:
            classes: class names of the set that they join; if None, those that the manifest or `classes.txt` beside
                the tars names, or that occur.

        Raises:
            BadInput: a tar cannot be read, or labels are ambiguous or make no sense.
        """
        if self.labels == "folder":
            raise BadInput("--labels folder is for folders of pictures: labels of tars are in KEY.cls or KEY.json")
        splits, are_named = by_split(self._files)
        tars = {split: [self._list(file) for file in files] for split, files in splits.items()}
        every = [tar for listings in tars.values() for tar in listings]
        fields = count_up(tar.scan_json() for tar in every)
        rule = self._rule(every, list(fields))
        found_classes = self._number(every, rule, classes)
        kept = self._kept(list(fields), rule)
        masks = find_masks(every)
        notes = list_notes(every)
        if self.keep is None and len(fields) > _MOST_FIELDS:
            notes.append(f"the jsons have {len(fields):,} different fields: the {_MOST_FIELDS} most frequent are kept")
        path_field = "path" if self._is_of_a_packed_set else None
        rows = {split: TarRows(listings, kept, masks, path_field) for split, listings in tars.items()}
        return Splits(rows, are_named, found_classes, tuple(notes), self._licence)

    @cached_property
    def _files(self) -> list[Path]:
        return find_tars(self.places)

    @cached_property
    def _manifest(self) -> Manifest:
        """The one beside the tars; an empty one where there is none that can be read."""
        try:
            return read_manifest(self.folder)
        except BadInput:
            return Manifest({})

    @property
    def _is_of_a_packed_set(self) -> bool:
        """Whether all tars are shards that `pack` wrote."""
        ours = (entry.shards for entry in self._manifest.splits.values() if not entry.is_indexed)
        return {file.name for file in self._files} <= {shard.name for shards in ours for shard in shards}

    @property
    def _licence(self) -> str | None:
        names = {file.name for file in self._files}
        of = [entry for entry in self._manifest.splits.values() if names & {shard.name for shard in entry.shards}]
        return of[0].licence if len({entry.licence for entry in of}) == 1 else None

    def _kept(self, fields: Sequence[str], rule: LabelRule) -> dict[str, str]:
        """The fields of the jsons that are packed, and their names then."""
        known = list(fields[:_MOST_FIELDS] if self.keep is None else fields)
        used: list[str | None] = [rule.field]
        if self._is_of_a_packed_set:
            used += RESERVED
        return choose_extra(known, used, self.keep, f"the jsons of {self.folder}")

    def _list(self, file: Path) -> TarListing:
        plain = file
        if file.name.lower().endswith(COMPRESSED_SUFFIXES):
            self._unpacked = self._unpacked or UnpackFolder()
            plain = self._unpacked.path / f"{file.name}.tar"
            unpack_tar(file, plain)
        listing = TarListing.read(plain, file.name, salvage=self.salvage)
        listing.keeps = self._unpacked
        return listing

    def _rule(self, tars: Sequence[TarListing], fields: Sequence[str]) -> LabelRule:
        if self.labels == "none":
            return LabelRule(None)
        if self.columns.label == "cls":
            return LabelRule("cls")
        if self.columns.label is None and all(_all_have(tar, "cls") for tar in tars):
            return LabelRule("cls")
        usual = [name for name in fields if name.lower() in LABEL_NAMES]
        if "label" in usual and self.columns.label is None:
            return LabelRule("json", "label")
        where = f"the jsons of {tars[0].file.parent}" if fields else f"{tars[0].file.parent} has no json, and"
        column = self.columns.find("label", fields, usual, where)
        return LabelRule(None) if column is None else LabelRule("json", column)

    def _number(
        self, tars: Sequence[TarListing], rule: LabelRule, classes: tuple[str, ...] | None
    ) -> tuple[str, ...] | None:
        """Number the labels of all tars; the names of the classes."""
        texts = [tar.read_texts(rule) for tar in tars]
        written = {text for found in texts for text in found if text is not None}
        if not written:
            return None
        where, own = f"{rule} of {self.folder}", self._manifest.classes
        if own is not None and self._is_of_a_packed_set and rule == LabelRule("json", "label"):
            for tar, found in zip(tars, texts, strict=True):
                tar.labels[:] = renumber_labels(tar.count_in(found, len(own)), own, classes or own, where)
            return classes or own
        if classes is None and own is not None:
            classes = own
        elif classes is None and (self.folder / CLASSES_FILE).is_file():
            classes = read_classes(self.folder / CLASSES_FILE)
        numbers, classes = number_texts(written, where, classes)
        for tar, found in zip(tars, texts, strict=True):
            tar.labels[:] = [-1 if text is None else numbers[text] for text in found]
        return classes


def find_masks(tars: Sequence[TarListing]) -> list[str]:
    """Extensions of label maps: PNGs such as `seg.png` that every sample has, with the first picture's size."""
    sets = [
        {name for name in _common(tar) if _MASK_EXTENSION.fullmatch(name) and _all_have(tar, name)}
        for tar in tars
        if tar.samples.keys
    ]
    common = sorted(set.intersection(*sets)) if sets else []
    tar = next((tar for tar in tars if tar.samples.keys), None)
    if tar is None or not common:
        return []
    number = next((n for n in range(len(tar.samples.keys)) if n not in tar.troubles), None)
    if number is None:
        return []
    try:
        height, width = decode(read_bounded(tar.blob(int(tar.samples.pictures()[number]))), fast=False).shape[:2]
    except CorruptSample:
        return []
    return [name for name in common if _png_size(tar.blob(int(tar.samples.members(name)[number]))) == (width, height)]


def _png_size(blob: Blob) -> tuple[int, int] | None:
    try:
        with Image.open(io.BytesIO(read_bounded(blob)), formats=("PNG",)) as mask:
            return mask.size
    except Exception:  # Pillow's plugins raise nearly everything on malformed input
        return None


def _common(tar: TarListing) -> list[str]:
    """Extensions with so many members that every sample may have one; a tar may have as many extensions as members."""
    counts = np.bincount(tar.samples.extension, minlength=len(tar.samples.extensions))
    enough = np.flatnonzero(counts >= max(1, len(tar.samples.keys) - len(tar.troubles)))
    return [tar.samples.extensions[number] for number in enough.tolist()]


def _expect_members(samples: TarSamples, troubles: dict[int, str]) -> None:
    """In a tar that is damaged, what lacks a label, json or label map that most have has lost it."""
    counts = np.bincount(samples.extension, minlength=len(samples.extensions))
    for place in np.flatnonzero(2 * counts > len(samples.keys)).tolist():
        name = samples.extensions[place]
        if name in ("cls", "json") or _MASK_EXTENSION.fullmatch(name):
            lacking = np.flatnonzero(samples.members(name) < 0)
            for number in lacking.tolist() if 2 * len(lacking) < len(samples.keys) else ():
                troubles.setdefault(number, f"it has no {name}, which most of its damaged tar have")


def _all_have(tar: TarListing, extension: str) -> bool:
    lacking = np.flatnonzero(tar.samples.members(extension) < 0).tolist()
    return all(number in tar.troubles for number in lacking)


def list_notes(tars: Sequence[TarListing]) -> list[str]:
    """What a user should know of the tars, in words."""
    notes = []
    if over := count_up(tar.samples.passed_over() for tar in tars):
        notes.append("never opened: " + ", ".join(f"{count:,} {what}" for what, count in over.items()))
    if regrouped := sum(tar.regrouped for tar in tars):
        notes.append(f"{regrouped:,} keys were scattered or stood twice: their members are sorted out")
    if several := sum(tar.samples.several_pictures() for tar in tars):
        notes.append(f"{several:,} samples have several pictures: one is taken, jpg before png")
    return notes
