"""Files that are there whole or not at all, whatever happens to the process or the machine."""

import os
from pathlib import Path


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write or replace a file so that a reader, or a crash, sees the old or the new one whole."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    with open(part, "wb") as out:
        out.write(content.encode() if isinstance(content, str) else content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Make a file, or the renames in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
