"""Tars without an index, read from the front: for servers that give no parts of files, and for shell commands.

Which sample comes when depends on the number of ranks and workers, and a run that goes on begins with other shards: of
all the promises of an indexed set one is kept, that the views of a sample follow from its place in the stream. Tars
are unpacked by tarfile and grouped by webdataset, whose decoders and openers are never called: they run what they find.
"""

import hashlib
import itertools
import random
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset
from webdataset.tariterators import base_plus_ext, group_by_keys

from foreseen.config import Config
from foreseen.data import network_faults
from foreseen.data.batch import Batch, BatchLayout, Problem
from foreseen.data.decode import MAX_PIXELS, DecodeError, decode
from foreseen.data.loader import assemble, load
from foreseen.data.network_faults import may_pass, refusal
from foreseen.data.source import IMAGE_SUFFIXES
from foreseen.data.store import MAX_BYTES
from foreseen.data.tar_paths import expand_braces
from foreseen.data.urls import SHELL, check_url
from foreseen.data.views import Request
from foreseen.errors import BadInput
from foreseen.masked import masked
from foreseen.printable import printable

_BETWEEN_MEMBERS = 1 << 20  # bytes of headers before a member, with the longest names
_BUFFER_BYTES = 1 << 30  # of pictures to draw from, in each loader process
_BAD_IN_A_ROW = 1000
Picture = tuple[str, bytes]  # its name, for messages, and its encoded bytes


@dataclass(frozen=True)
class TarStream:
    """Tars that are read from the front; `open_stream` makes it.

    Attributes:
        place: what a person calls them.
        urls: of each tar.
        storage_options: of fsspec's file system.
        num_samples: of an epoch.
    """

    place: str
    urls: tuple[str, ...]
    storage_options: dict[str, Any]
    num_samples: int
    split: str = "stream"
    labels_fingerprint: str | None = None
    source: str | None = None
    licence: str | None = None

    def __len__(self) -> int:
        return self.num_samples

    @property
    def address(self) -> str:
        """The URL."""
        return self.place

    @property
    def fingerprint(self) -> str:
        """Changes with the list of tars; what is in them is not known."""
        return hashlib.blake2b("\n".join(map(masked, self.urls)).encode(), digest_size=16).hexdigest()


def open_stream(
    path: str, storage_options: dict[str, Any], *, samples: int | None, run_samples: int | None, allow_shell: bool
) -> TarStream:
    """The tars that a URL with `{000000..000009}` or a shell command names; nothing is read yet.

    Args:
        path: of the config.
        storage_options: of the config.
        samples: in an epoch; None if that is not known.
        run_samples: in the whole run, which is then the epoch; None if that is not known either.
        allow_shell: run shell commands.

    Raises:
        BadInput: a URL that is not read from, a shell command that is not allowed, or a run without an end.
    """
    if path.startswith(SHELL):
        if not allow_shell:
            raise BadInput(
                f"data.path {masked(path)} would run a command in a shell; if you wrote it yourself, allow that with "
                "data.allow_shell_urls=true"
            )
    else:
        check_url(path, "data.path")
    num_samples = samples or run_samples
    if num_samples is None:
        raise BadInput(
            "how many samples the tars of data.path hold is not known, so run.epochs says nothing: give run.steps, or "
            "data.samples"
        )
    return TarStream(masked(path), tuple(expand_braces(path)), storage_options, num_samples)


class StreamBuilder:
    """Reads, decodes and cuts the pictures of a stream.

    Args:
        shards: the tars.
        request: what the objective wants of each picture.
        seed: of the run.
        fast_decode: use torchcodec for the JPEGs that it is safe for, where it is installed.
        shuffle_buffer: pictures from which each loader process draws the next one.
        max_pixels, max_bytes: of one picture; larger ones are unreadable.

    Raises:
        BadInput: the objective wants labels.
    """

    def __init__(
        self, shards: TarStream, request: Request, seed: int, *, fast_decode: bool = True, shuffle_buffer: int = 1000,
        max_pixels: int = MAX_PIXELS, max_bytes: int = MAX_BYTES,
    ) -> None:  # fmt: skip
        if request.labels:
            raise BadInput(f"data.path {shards.place} is a stream, which has no labels, and this job needs them")
        self.shards, self.request, self.seed = shards, request, seed
        self.fast_decode, self.shuffle_buffer = fast_decode, shuffle_buffer
        self.max_pixels, self.max_bytes = max_pixels, max_bytes

    @classmethod
    def configured(cls, shards: TarStream, request: Request, config: Config) -> Self:
        """With the seed and the limits of a config."""
        data = config.data
        return cls(
            shards, request, config.seed, fast_decode=data.fast_decode, shuffle_buffer=data.shuffle_buffer,
            max_pixels=data.max_pixels, max_bytes=data.max_bytes,
        )  # fmt: skip

    def feed(self, layout: BatchLayout, rank: int, subset: NDArray[np.int64] | None = None) -> "StreamFeed":
        """The stream of a rank.

        Raises:
            BadInput: there are fewer tars than ranks, or only some samples are to take part.
        """
        if subset is not None:
            raise BadInput(f"data.path {self.shards.place} is a stream, from which no samples can be chosen")
        if len(self.shards.urls) < layout.ranks:
            raise BadInput(
                f"data.path {self.shards.place} names {len(self.shards.urls)} tars for {layout.ranks} ranks, and each "
                "rank reads its own: name as many tars, or start fewer ranks"
            )
        return StreamFeed(self, layout, rank)

    def build(self, positions: NDArray[np.int64], pictures: Iterator[Picture]) -> Batch:
        """Make the batch standing at `positions` from the next pictures that can be decoded."""
        problems: list[Problem] = []
        batch = assemble(self.request, self.seed, positions, self._decoded(positions, pictures, problems))
        return replace(batch, problems=tuple(problems))

    def _decoded(
        self, positions: NDArray[np.int64], pictures: Iterator[Picture], problems: list[Problem]
    ) -> Iterator[NDArray[np.uint8]]:
        places = iter(positions.tolist())
        place, in_a_row = next(places), 0
        for name, data in pictures:
            try:
                yield decode(data, max_pixels=self.max_pixels, max_bytes=self.max_bytes, fast=self.fast_decode)
                place, in_a_row = next(places, place), 0
            except DecodeError as error:
                name, reason = printable(name), printable(str(error))
                # Pictures of a stream have no numbers: their name stands for one.
                number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest())
                problems.append(Problem(place, number, self.shards.place, self.shards.split, "", name, reason))
                in_a_row += 1
                if in_a_row == _BAD_IN_A_ROW:
                    raise BadInput(
                        f"{in_a_row} pictures in a row could not be read, the last: {problems[-1]}"
                    ) from None


class StreamFeed(IterableDataset[Batch]):
    """The endless stream of one rank; each of its loader processes reads tars of its own, and they take turns."""

    order_name = "stream"

    def __init__(self, builder: StreamBuilder, layout: BatchLayout, rank: int) -> None:
        self._builder, self._layout, self._rank = builder, layout, rank
        self._first_step = self._total_steps = 0
        self.num_samples = len(builder.shards)

    @property
    def notes(self) -> tuple[str, ...]:
        """See `Feed`."""
        return (
            f"data.path {self._builder.shards.place} is a stream without an index: resuming is best-effort. A run that "
            "is stopped and goes on takes up its weights at the right step, but other pictures from there on than it "
            "would have seen: some come twice, some not at all. Another number of ranks or workers is another order.",
        )

    def example(self) -> Batch:
        """A micro-batch of one plain picture, for which nothing is read."""
        builder, grey = self._builder, np.full((64, 64, 3), 128, dtype=np.uint8)
        return assemble(builder.request, builder.seed, self._layout.positions(0, self._rank, 0), itertools.repeat(grey))

    def batches(self, first_step: int, total_steps: int, *, workers: int, pin_memory: bool) -> Iterator[Batch]:
        """See `Feed`; there are never more loader processes than this rank has tars."""
        self._first_step, self._total_steps = first_step, total_steps
        workers = min(workers, len(self._builder.shards.urls) // self._layout.ranks)
        return load(self, None, workers=workers, pin_memory=pin_memory)

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        micro = self._layout.accumulation
        pictures = self._pictures(self._rank * workers + worker, self._layout.ranks * workers)
        for number in range(self._first_step * micro + worker, self._total_steps * micro, workers):
            positions = self._layout.positions(number // micro, self._rank, number % micro)
            yield self._builder.build(positions, pictures)

    def _pictures(self, share: int, shares: int) -> Iterator[Picture]:
        """Pictures of every `shares`-th tar, which are others in each pass, drawn from a buffer."""
        seed = f"{self._builder.seed}/{self._first_step}"
        endless = self._passes(seed, share, shares)
        return _shuffled(endless, self._builder.shuffle_buffer, random.Random(f"{seed}/{share}"))

    def _passes(self, seed: str, share: int, shares: int) -> Iterator[Picture]:
        shards = self._builder.shards
        for number in itertools.count():
            urls = list(shards.urls)
            random.Random(f"{seed}/{number}").shuffle(urls)
            mine, found = urls[share::shares], 0
            for url in mine:
                for picture in _read_tar(url, shards.storage_options):
                    found += 1
                    yield picture
            if not found:
                raise BadInput(
                    f"there is no picture in {masked(mine[0])}" + f" and {len(mine) - 1} more tars" * (len(mine) > 1)
                )


def _shuffled(pictures: Iterator[Picture], most: int, draw: random.Random) -> Iterator[Picture]:
    """Pictures drawn from a buffer of at most so many, or a gigabyte of them."""
    buffer: list[Picture] = []
    held = 0
    for picture in pictures:
        buffer.append(picture)
        held += len(picture[1])
        while len(buffer) >= most or held > _BUFFER_BYTES:
            place = draw.randrange(len(buffer))
            buffer[place], buffer[-1] = buffer[-1], buffer[place]
            held -= len(buffer[-1][1])
            yield buffer.pop()


def _read_tar(url: str, storage_options: dict[str, Any]) -> Iterator[Picture]:
    """The pictures of one tar; where the way to it breaks, it is opened again and those handed out are passed over."""
    done, began = 0, time.monotonic()
    for tries, wait_s in enumerate((*network_faults.WAITS_S, None), start=1):
        try:
            with _opened(url, storage_options) as file:
                for picture in itertools.islice(_pictures_in(url, file), done, None):
                    done += 1
                    yield picture
            return
        except BadInput:
            raise
        except (tarfile.TarError, EOFError) as error:
            raise BadInput(f"{masked(url)} is broken, or no plain tar ({error}), after {done} pictures") from None
        except Exception as error:
            if wait_s is None or not may_pass(error):
                raise refusal(url, error, tries, time.monotonic() - began) from error
            time.sleep(wait_s)


def _opened(url: str, storage_options: dict[str, Any]) -> AbstractContextManager[BinaryIO]:
    if url.startswith(SHELL):
        return _output_of(url.removeprefix(SHELL))
    from foreseen.data.remote import open_sequential

    return open_sequential(url, storage_options)


@contextmanager
def _output_of(command: str) -> Iterator[BinaryIO]:
    """What a shell command prints.

    Raises:
        BadInput: it fails.
    """
    process = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE)  # noqa: S602  data.allow_shell_urls says so
    assert process.stdout is not None
    try:
        yield process.stdout  # type: ignore[misc]
        while process.stdout.read(_BETWEEN_MEMBERS):  # what follows the end of the tar
            pass
        if process.wait():
            raise BadInput(f"the command {masked(command)!r} of data.path failed with exit code {process.returncode}")
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def _pictures_in(url: str, file: BinaryIO) -> Iterator[Picture]:
    """The first picture of each group of members."""
    for sample in group_by_keys(_members(url, file), handler=lambda error: True):  # a name that comes twice is left out
        suffix = next((suffix for suffix in sample if f".{suffix}" in IMAGE_SUFFIXES), None)
        if suffix is not None:
            yield f"{masked(url)}: {sample['__key__']}.{suffix}", sample[suffix]


def _members(url: str, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The image members of a tar, as webdataset groups them; no other one is taken into memory."""
    bounded: Any = _Bounded(url, file)
    with tarfile.open(fileobj=bounded, mode="r|", tarinfo=_StrictHeader) as opened:
        tar: Any = opened
        size = 0
        while True:
            bounded.left = size + _BETWEEN_MEMBERS
            member = tar.next()
            if member is None:
                return
            tar.members.clear()  # else it would remember every header
            size = member.size
            _, suffix = base_plus_ext(member.name)
            is_picture = f".{(suffix or '').lower()}" in IMAGE_SUFFIXES and member.isreg() and not member.issparse()
            if is_picture and size <= MAX_BYTES:
                bounded.left = size + _BETWEEN_MEMBERS
                content = tar.extractfile(member).read()
                if len(content) < size:
                    raise ConnectionError(f"it ends within {member.name}")
                yield {"fname": member.name, "data": content, "__url__": url}


class _StrictHeader(tarfile.TarInfo):
    """A header that is damaged or cut off is an error; tarfile takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        """The next header; raises ReadError where it is none."""
        try:
            return super().fromtarfile(tar)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise tarfile.ReadError(f"{error} at byte {tar.offset:,}") from None


class _Bounded:
    """A file of which no more is read between two members than may lie there: tarfile takes headers of any length."""

    def __init__(self, url: str, file: BinaryIO) -> None:
        self._url, self._file = url, file
        self.left = 0

    def read(self, size: int) -> bytes:
        if self.left < 0:
            raise BadInput(f"{masked(self._url)} has a header of more than {_BETWEEN_MEMBERS:,} bytes")
        data = self._file.read(size)
        self.left -= len(data)
        return data
