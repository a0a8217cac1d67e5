"""Arrays of numbers in `.npy` files, mapped into memory and never unpickled.

Only the header of the format is numpy's business here: type and shape must be the ones that are expected before a byte
of the content is touched, so a file can neither run code nor ask for memory.
"""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from foreseen.errors import BadInput
from foreseen.files import open_regular


def map_array(file: Path, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    """Map an `.npy` file of so many rows.

    Raises:
        BadInput: it is missing, broken, or holds anything else.
    """
    return _map(file, dtype, (rows,), f"the manifest promises {rows:,} rows of {dtype}")


def map_table(file: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Map an `.npy` file of two dimensions.

    Raises:
        BadInput: it is missing, broken, or holds anything else.
    """
    return _map(file, dtype, None, f"a table of {dtype} belongs")


def _map(file: Path, dtype: np.dtype[Any], expected: tuple[int, ...] | None, wanted: str) -> NDArray[Any]:
    try:
        with os.fdopen(open_regular(file), "rb") as opened:
            version = npy.read_magic(opened)
            if version not in ((1, 0), (2, 0)):
                raise ValueError(f"its format {version} is not read")
            read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, _, found = read_header(opened)
            fits = len(shape) == 2 if expected is None else shape == expected
            if found.hasobject or found != dtype or not fits:
                raise BadInput(f"{file} holds {found}{shape} where {wanted}")
            if not math.prod(shape):
                return np.empty(shape, dtype)
            array = np.memmap(opened, dtype, mode="r", offset=opened.tell(), shape=shape)
    except FileNotFoundError:
        raise BadInput(f"{file} is missing: copy or pack the set again") from None
    except BadInput:
        raise
    except Exception as error:  # numpy parses the header as Python's literals, and lets every error of that through
        raise BadInput(f"{file} cannot be read ({error}): copy or pack the set again") from None
    return np.asarray(array)  # the plain view of the same pages: indexing a memmap object is five times as slow
