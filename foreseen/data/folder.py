"""A folder of pictures as a source: its class folders are labels, its folders `train`, `val` and `test` splits."""

import os
import stat
from pathlib import Path

from foreseen.data.not_pictures import name_unread
from foreseen.data.source import FolderListing, Splits, digest_files, entries, is_picture, walk
from foreseen.data.tar_samples import count_up
from foreseen.errors import BadInput

SPLIT_NAMES = frozenset({"train", "val", "valid", "validation", "test"})


class FolderSource:
    """Pictures below a folder: ROOT/class/*.jpg, ROOT/split/class/*.jpg, or any tree of unlabelled ones.

    Args:
        root: the folder.
        labels: "none", "folder" or "auto" (see `FolderListing`), for each split by itself.
    """

    def __init__(self, root: Path, labels: str = "auto") -> None:
        self.root, self.labels = root, labels

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.root.resolve().name

    def digest(self) -> str:
        """Of names, sizes and times of all pictures."""
        return digest_files(file for file in walk(self.root) if is_picture(file.name))

    def read(self, classes: tuple[str, ...] | None = None) -> Splits:
        """List the pictures.

        Args:
            classes: class names of the set that they join; those of `train` if None.

        Raises:
            BadInput: there are none, one has a class that is not among `classes`, or some folders are splits and others
                not.
        """
        folders = self._split_folders()
        listings: dict[str, FolderListing] = {}
        for split in folders or ("",):
            listings[split or "train"] = FolderListing(self.root / split, self.labels, classes)
            classes = classes or listings[split or "train"].classes
        skipped = sum(listing.skipped for listing in listings.values())
        notes = [f"{skipped:,} files of {self.root} are no pictures that are read, by their names, and are passed over"]
        if unread := count_up(listing.unread for listing in listings.values()):
            notes.append(name_unread(unread))
        labelled = any(listing.classes for listing in listings.values())
        return Splits(listings, bool(folders), classes if labelled else None, tuple(notes if skipped else ()))

    def _split_folders(self) -> list[str]:
        """Names of the folders that are splits, `train` first; none where the folders are classes or nothing at all."""
        if not os.path.isdir(self.root):
            return []
        folders = {name: stat.S_ISDIR(found.st_mode) for name, found in entries(self.root)}
        splits = sorted(name for name, is_folder in folders.items() if is_folder and name in SPLIT_NAMES)
        others = [
            name
            for name, is_folder in folders.items()
            if name not in SPLIT_NAMES and _holds_pictures(self.root / name, is_folder)
        ]
        if not splits or (others and len(splits) == 1):  # vehicles have a class `train`
            return []
        if others:
            raise BadInput(
                f"{self.root} has the splits {', '.join(splits)} and other pictures beside them, such as in "
                f"{min(others)!r}: move those away, or give one split alone, such as {self.root / splits[0]}"
            )
        return sorted(splits, key=lambda split: (split != "train", split))


def _holds_pictures(place: Path, is_folder: bool) -> bool:
    return any(is_picture(file.name) for file in walk(place)) if is_folder else is_picture(place.name)
