"""The folders that stages hand on: written beside their place, and put there whole."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from foreseen.errors import BadInput
from foreseen.files import sync


@contextmanager
def published(folder: Path, kind: str) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of an older one when the block ends well.

    Where it does not, or the process is killed, the older folder is still there, or comes back with the next call.

    Args:
        folder: where to; a folder of the kind has a config.json.
        kind: what it is called, such as "encoder folder".

    Raises:
        BadInput: `folder` holds something else.
    """
    if folder.exists() and not (folder / "config.json").is_file():
        raise BadInput(f"{folder} is there and is no {kind}; remove it or choose another run.dir")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.parent / f".{folder.name}.{word}" for word in ("new", "old"))
    if old.exists() and not folder.exists():
        old.rename(folder)  # killed between the two renames below
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        new.mkdir()
        yield new
        for path in [*new.iterdir(), new]:
            sync(path)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def float32_state(module: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers as they are handed on: on the CPU, those with a fraction in float32, none sharing memory."""
    return {
        name: (value.float() if value.is_floating_point() else value).detach().cpu().clone().contiguous()
        for name, value in module.state_dict().items()
    }
