"""A bundle: all that `foreseen replay` needs to make one step of a run again, in a folder of its own.

`RUN/bundles/step-<n>` holds `bundle.json` and, in `checkpoints/`, the newest checkpoint that is not past the step. Its
files are hard links, so they take no room and no time, and stay when the run drops the checkpoint; they are copied
where a file system has no links. Pictures are not in it: which samples a step held is a function of (seed, step).
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from foreseen.config import Section
from foreseen.data.batch import BatchLayout
from foreseen.data.feed import Feed
from foreseen.data.loader import StreamDataset
from foreseen.engine.recorder import Reason, Record
from foreseen.errors import BadInput
from foreseen.files import sync

MOST_BUNDLES = 3  # in a run, and one more for each time that it goes back or stops
_LARGEST = 1 << 28  # bytes of a bundle.json; ten times that of a global batch of 65,536
_FILE = "bundle.json"
_OF_A_RUN = {"config", "parents", "order_version", "dataset_fingerprint", "labels_fingerprint"}


class Sample(Section):
    """One sample of a step."""

    position: int
    """In the stream."""
    sample: int
    """Its number in the split."""
    name: str
    """Its shard, its number there and its key."""
    stands_in_for: str | None = None
    """The sample that could not be read here, if there was one."""


class Bundle(Section, ser_json_inf_nan="strings", allow_inf_nan=True):
    """What `bundle.json` says."""

    format: Literal[1] = 1
    verb: str
    """The command that made the run."""
    reason: Reason
    sentence: str
    """The same for people."""
    step: int
    """Number of the update, from 0."""
    rewinds: tuple[tuple[int, int], ...]
    """Times that the run had gone back before: from so many updates to so many."""
    checkpoint: int | None
    """Updates made at the checkpoint of the bundle; null if the run had none yet, and begins from its seed."""
    ranks: int
    micro_size: int
    accumulation: int
    ring: tuple[Record, ...]
    """The last steps, this one at the end."""
    samples: tuple[Sample, ...]
    """In the order of the global batch: rank by rank, micro-batch by micro-batch."""
    environment: dict[str, Any]
    run: dict[str, Any]
    """What a checkpoint says of its run: config, fingerprints of the data, what its weights are from."""


def stream_shift(rewinds: tuple[tuple[int, int], ...] | list[tuple[int, int]]) -> int:
    """Steps of the stream that a run has passed over by going back."""
    return sum(begin - end for begin, end in rewinds)


def samples_of(stream: Feed, stream_step: int, replaced: Mapping[int, int]) -> tuple[Sample, ...]:
    """The samples of a step, of all ranks; none where they have no numbers.

    Args:
        stream: of the run.
        stream_step: the step's place in it.
        replaced: the sample used, by position, where one was unreadable.
    """
    if not isinstance(stream, StreamDataset):
        return ()
    layout = BatchLayout(stream.layout.global_size, stream.layout.global_size)
    positions = layout.positions(stream_step, 0, 0)
    order: np.ndarray[Any, np.dtype[np.int64]] = stream.order.samples(positions)
    numbers = order if stream.subset is None else stream.subset[order]
    describe = stream.builder.shards.describe
    samples = []
    for position, number in zip(positions.tolist(), numbers.tolist(), strict=True):
        used = replaced.get(position, number)
        stands_in_for = None if used == number else describe(number)
        samples.append(Sample(position=position, sample=used, name=describe(used), stands_in_for=stands_in_for))
    return tuple(samples)


def folder_of(run: Path, step: int, rewinds: int) -> Path:
    """Where the bundle of a step lies; a run that has gone back may come to a step a second time."""
    return run / "bundles" / f"step-{step}{'-again' if rewinds else ''}"


def is_full(run: Path) -> bool:
    """Whether a run has as many bundles as single bad steps may leave."""
    return len(list((run / "bundles").glob("step-*"))) >= MOST_BUNDLES


def write_bundle(folder: Path, bundle: Bundle, checkpoints: Path) -> None:
    """Publish a bundle, whole, by one rename.

    Args:
        folder: of `folder_of`; nothing is there.
        bundle: its content.
        checkpoints: where that of `bundle.checkpoint` lies.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        if temporary.exists():
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        (temporary / _FILE).write_text(bundle.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if bundle.checkpoint is not None:
            share_checkpoint(checkpoints, bundle.checkpoint, temporary / "checkpoints")
        sync(temporary / _FILE)
        sync(temporary)
        os.rename(temporary, folder)
        sync(folder.parent)
    except OSError:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def share_checkpoint(checkpoints: Path, step: int, into: Path) -> None:
    """Give a checkpoint a second home: by hard links, or copies where links fail. Nothing ever writes into its files.

    Raises:
        OSError: neither can be made.
    """
    target = into / f"step-{step}"
    target.mkdir(parents=True)
    for file in sorted((checkpoints / f"step-{step}").iterdir()):
        try:
            os.link(file, target / file.name)
        except OSError:
            shutil.copyfile(file, target / file.name)
            sync(target / file.name)
    sync(target)


def read_bundle(folder: Path) -> Bundle:
    """Read what a bundle says.

    Raises:
        BadInput: the folder is none, or holds what no run has written.
    """
    file = folder / _FILE
    try:
        if file.stat().st_size > _LARGEST:
            raise BadInput(f"{file} has more than {_LARGEST:,} bytes, so no run has written it")
        bundle = Bundle.model_validate_json(file.read_bytes())
    except OSError as error:
        raise BadInput(
            f"{folder} is no bundle ({error.strerror}); a run writes them as RUN/bundles/step-N when a step goes wrong"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise BadInput(f"{file} is not what a run writes: {where}: {first['msg']}") from None
    if not bundle.ring or bundle.ring[-1].step != bundle.step:
        raise BadInput(f"{file} is not what a run writes: its ring does not end with step {bundle.step}")
    if missing := _OF_A_RUN - bundle.run.keys():
        raise BadInput(f"{file} is not what a run writes: run lacks {', '.join(sorted(missing))}")
    return bundle
