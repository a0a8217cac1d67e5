"""Files that a command writes while it computes, and that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from foreseen.errors import BadInput
from foreseen.files import sync


@contextmanager
def complete_file(out: Path) -> Iterator[IO[str]]:
    """A text file that gets its name when it is complete; an older one stays until then.

    Raises:
        BadInput: it cannot be written.
    """
    with complete_path(out) as part, open(part, "w", encoding="utf-8", newline="") as file:
        yield file


@contextmanager
def complete_path(out: Path) -> Iterator[Path]:
    """A path to write to, which is renamed to `out` at the end, and removed where something goes wrong.

    Raises:
        BadInput: it cannot be written.
    """
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield part
        sync(part)
        os.replace(part, out)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            part.unlink()
