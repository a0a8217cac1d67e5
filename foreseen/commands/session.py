"""What every training command does before and after: join the job, hold the run folder, seed, record."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator

from foreseen.config import Config
from foreseen.data.shards import ShardSet
from foreseen.engine.launch import describe_devices, start
from foreseen.engine.run_folder import RunLock, describe_start, record_start
from foreseen.files import write_atomically

Say = Callable[[str], None]
_PROCEDURAL_TRAIN, _PROCEDURAL_TEST = 6000, 1200


@contextmanager
def session(config: Config) -> Iterator[tuple[Accelerator, Say]]:
    """Join the launcher's job and hold the run folder for it; several sessions may follow one another in a process.

    Weights are drawn inside, from the global generator seeded here; after that nothing may draw from it.
    """
    accelerator = start(config.compute)
    with ExitStack() as held:
        if accelerator.is_main_process:
            held.enter_context(RunLock(config.run.dir))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            record_start(config.run.dir, describe_start(describe_devices(accelerator)))
        torch.manual_seed(config.seed)
        yield accelerator, accelerator.print
        accelerator.wait_for_everyone()


def record_config(config: Config, accelerator: Accelerator) -> None:
    """Write the resolved config into the run folder."""
    if accelerator.is_main_process:
        write_atomically(config.run.dir / "config.yaml", config.to_yaml())


def open_shards(config: Config, split: str, accelerator: Accelerator) -> ShardSet:
    """The split of the set that the config names; procedural pets, drawn once into a cache, where it names none."""
    path = config.data.path
    if path is None:
        path = procedural_pets(max(config.views.size), accelerator)
    shards = ShardSet.open(path, split)
    shards.check_sizes()
    return shards


def procedural_pets(size: int, accelerator: Accelerator) -> Path:
    """A cached set of procedural pets of a size in pixels."""
    from foreseen.data.procedural import write_procedural_pets

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "foreseen"
    path = cache / f"procedural-pets-{size}px"
    if accelerator.is_main_process and not (path / "manifest.json").is_file():
        accelerator.print(f"data.path is null: drawing {_PROCEDURAL_TRAIN} procedural pets into {path}")
        write_procedural_pets(path, train=_PROCEDURAL_TRAIN, test=_PROCEDURAL_TEST, size=size, seed=0, workers=None)
    accelerator.wait_for_everyone()
    return path
