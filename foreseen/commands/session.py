"""What every training command does before and after: join the job, hold the run folder, seed, record."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from foreseen.commands.progress import progress
from foreseen.config import Config, Data, read_yaml
from foreseen.data.cache import Packed, cache_folder, lock_cache, packed
from foreseen.data.open_set import Access, open_set
from foreseen.data.open_source import SourceOptions, is_packed
from foreseen.data.shards import ShardSet
from foreseen.data.table import Columns
from foreseen.data.urls import is_stream, is_url
from foreseen.engine.launch import describe_devices, start
from foreseen.engine.rank_zero import on_rank_zero
from foreseen.engine.resume import check_same_config
from foreseen.engine.run_folder import RunLock, describe_start, disk_trouble, record_start
from foreseen.errors import BadInput
from foreseen.files import write_atomically
from foreseen.masked import masked
from foreseen.printable import printable
from foreseen.processes import exit_with_the_launcher

if TYPE_CHECKING:
    from foreseen.data.stream import TarStream

Say = Callable[[str], None]
_PROCEDURAL_TRAIN, _PROCEDURAL_TEST = 6000, 1200
_PATIENCE = timedelta(days=7)  # for a set to be packed


@contextmanager
def session(config: Config) -> Iterator[tuple[Accelerator, Say]]:
    """Join the launcher's job and hold the run folder for it; several sessions may follow one another in a process.

    Weights are drawn inside, from the global generator seeded here; after that nothing may draw from it.
    """
    exit_with_the_launcher()
    accelerator = start(config.compute)
    with ExitStack() as held:
        held.enter_context(disk_trouble(config.run.dir))

        def hold() -> None:
            held.enter_context(RunLock(config.run.dir))
            record_start(config.run.dir, describe_start(describe_devices(accelerator)))

        on_rank_zero(accelerator, hold)
        torch.manual_seed(config.seed)
        held.callback(_pack_once.cache_clear)  # it would keep the accelerator, and with that the model
        yield accelerator, accelerator.print
        accelerator.wait_for_everyone()


def record_config(config: Config, accelerator: Accelerator) -> None:
    """Write the resolved config into the run folder.

    Raises:
        BadInput: the folder has checkpoints of another config, which then keeps its place.
    """
    file = config.run.dir / "config.yaml"
    if file.is_file() and any((config.run.dir / "checkpoints").glob("step-*")):
        check_same_config(config, read_yaml(file))
    if accelerator.is_main_process:
        write_atomically(file, config.to_yaml())


def open_shards(config: Config, split: str, accelerator: Accelerator) -> ShardSet:
    """A split of the set that the config names; see `open_data`."""
    return open_data(config.data, split, accelerator, size=max(config.views.size))


def open_training_pictures(config: Config, accelerator: Accelerator) -> "ShardSet | TarStream":
    """What pretraining sees: a split of a set, or a stream of tars that have no index.

    Raises:
        BadInput: neither can be read as the config says.
    """
    data = config.data
    if data.path is None or not is_stream(data.path):
        return open_shards(config, data.split, accelerator)
    if data.samples is None and config.optim.warmup_epochs and config.optim.warmup_steps is None:
        raise BadInput(
            f"optim.warmup_epochs {config.optim.warmup_epochs:g} counts passes over data.path, whose length is not "
            "known: give optim.warmup_steps, or data.samples"
        )
    from foreseen.data.stream import open_stream  # webdataset takes half a second

    steps = config.run.steps
    return open_stream(
        data.path,
        data.storage_options,
        samples=data.samples,
        run_samples=None if steps is None else steps * config.batch.global_size,
        allow_shell=data.allow_shell_urls,
    )


def open_data(data: Data, split: str, accelerator: Accelerator, *, size: int) -> ShardSet:
    """A split of the set that a `data` section names.

    A set behind a URL is read from there. Procedural pets, `size` pixels wide, are drawn, and what is no set of shards
    is packed, once into a cache. A source's validation split stands in for a test split that it has not.
    """
    path: str | Path
    if data.shards_at is not None and (data.path is None or not (is_url(data.path) or is_packed(data.path))):
        raise BadInput(
            f"data.shards_at {masked(data.shards_at)} says where the tars of a set lie, and data.path {data.path} is "
            "no set, but packed first: set data.shards_at to null, or make an index of the tars with "
            "`foreseen data index` and give its folder in data.path"
        )
    if data.path is None:
        path = procedural_pets(size, accelerator)
    elif is_stream(data.path):
        raise BadInput(
            f"data.path {masked(data.path)} names tars without an index, which only pretraining can stream: give the "
            "folder or URL of a packed set, or make an index with `foreseen data index`"
        )
    elif is_url(data.path) or is_packed(data.path):
        path = data.path
    else:
        options = SourceOptions(columns=Columns(**data.columns.model_dump()), hf_config=data.hf_config)
        found = _pack_once(accelerator, data.path, options, data.test_fraction)
        path = found.path
        if split == "test" and found.test_split is not None:
            split = found.test_split
    access = Access(
        data.shards_at, data.fetch, data.cache_dir, data.cache_gb, data.storage_options, data.shards_in_block
    )
    return open_set(path, split, access, accelerator.print)


@lru_cache(maxsize=4)  # by session: a source that changes under a run is noticed by the next one
def _pack_once(accelerator: Accelerator, src: str, options: SourceOptions, test_fraction: float) -> Packed:
    found: list[Packed | None] = [None]
    with _wait_for_rank_0(accelerator) as group:
        if accelerator.is_main_process:
            found[0] = packed(
                src,
                options,
                test_fraction=test_fraction,
                say=lambda text: accelerator.print(printable(text)),
                progress=lambda split: progress(f"packing {split}"),
            )
        if group is not None:
            torch.distributed.broadcast_object_list(found, src=0, group=group)
    assert found[0] is not None
    if not found[0].path.is_dir():
        raise BadInput(
            f"{found[0].path} is not seen by this machine: set XDG_CACHE_HOME to a folder that all machines of the job "
            "share, or pack with `foreseen data pack`"
        )
    for note in found[0].notes:
        accelerator.print(printable(note))
    return found[0]


@contextmanager
def _wait_for_rank_0(accelerator: Accelerator) -> Iterator[Any]:
    """A group of all ranks whose others are patient while rank 0 packs; None where it is alone."""
    if accelerator.num_processes == 1:
        yield None
        return
    group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    yield group
    torch.distributed.destroy_process_group(group)


def procedural_pets(size: int, accelerator: Accelerator) -> Path:
    """A cached set of procedural pets of a size in pixels."""
    from foreseen.data.procedural import write_procedural_pets

    path = cache_folder() / f"procedural-pets-{size}px"
    manifest = path / "manifest.json"
    if accelerator.is_main_process and not manifest.is_file():
        with lock_cache(accelerator.print):
            if not manifest.is_file():  # else another job has drawn them meanwhile
                accelerator.print(f"data.path is null: drawing {_PROCEDURAL_TRAIN} procedural pets into {path}")
                write_procedural_pets(
                    path, train=_PROCEDURAL_TRAIN, test=_PROCEDURAL_TEST, size=size, seed=0, workers=None
                )
    accelerator.wait_for_everyone()
    return path
