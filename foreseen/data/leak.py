"""Whether pictures of a test split are in the split that is trained on, byte for byte: told by the indexes alone."""

from dataclasses import dataclass

import numpy as np

from foreseen.data.shards import ShardSet

_CRC32 = np.uint64(0xFFFFFFFF)  # its part of a picture's digest


@dataclass(frozen=True)
class Leak:
    """What was found.

    Attributes:
        identical: pictures of the test split that are in the other one, too; None where it cannot be told, as an index
            has no checksums.
        such: the number of the first of them in the test split.
    """

    identical: int | None
    such: int | None = None


def find_leak(train: ShardSet, test: ShardSet) -> Leak:
    """Look for the pictures of a test split among those that are trained on or chosen by.

    Pictures that were shrunk or encoded anew are not recognised: `foreseen data check --near-duplicates` decodes them.
    """
    ours, theirs = test.picture_digests(), train.picture_digests()
    if not (ours & _CRC32).all() or not (theirs & _CRC32).all():
        return Leak(None)
    found = np.flatnonzero(np.isin(ours, theirs))
    return Leak(len(found), int(found[0]) if len(found) else None)
