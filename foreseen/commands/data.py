"""`foreseen data`: pictures on disk to shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from foreseen.data.pack import Summary

app = typer.Typer(help="Pack pictures into shards, which every other command reads.", no_args_is_help=True)

_SECONDS_BETWEEN_LINES = 5.0

MaxSide = Annotated[
    int | None, typer.Option(help="Shrink pictures to this longest side, in pixels. Default: keep them.")
]
Workers = Annotated[int | None, typer.Option(help="Processes. Default: one a CPU.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a split that exists.")]


@app.command()
def pack(
    src: Annotated[Path, typer.Argument(help="Folder of pictures, searched to any depth.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder of the set; other splits may be in it.", show_default=False)],
    split: Annotated[str, typer.Option(help="Name of the split.")] = "train",
    labels: Annotated[str, typer.Option(help="none, or folder: the first folder below SRC is the class.")] = "none",
    max_side: MaxSide = None,
    quality: Annotated[int, typer.Option(help="JPEG or WEBP quality of shrunk pictures.")] = 90,
    shard_samples: Annotated[int, typer.Option(help="Pictures in a shard.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the shuffle.")] = 0,
    workers: Workers = None,
    licence: Annotated[str | None, typer.Option(help="Terms of the pictures, kept in the manifest.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse unreadable pictures instead of leaving them out.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack a folder of pictures into one split of a set. Killed, it goes on when the same command is given again."""
    from foreseen.data.manifest import FILE_NAME, read_manifest
    from foreseen.data.pack import pack as pack_samples
    from foreseen.data.source import FolderListing

    classes = read_manifest(out).classes if (out / FILE_NAME).exists() else None
    listing = FolderListing(src, labels, classes)
    if listing.skipped:
        print(f"{listing.skipped:,} files of {src} are no pictures by their names, and are passed over")
    with _progress(f"packing {split}") as progress:
        summary = pack_samples(
            listing,
            out,
            split,
            classes=listing.classes,
            shard_samples=shard_samples,
            max_side=max_side,
            quality=quality,
            seed=seed,
            workers=workers,
            source=src.name,
            licence=licence,
            strict=strict,
            overwrite=overwrite,
            progress=progress,
        )
    _report(summary)
    print(f"next: foreseen pretrain mae_vit_b16 data.path={out} data.split={split}")


@app.command()
def pets(
    out: Annotated[Path, typer.Argument(help="Folder of the set.", show_default=False)],
    archives: Annotated[
        Path | None,
        typer.Option("--from", help="Folder with images.tar.gz and annotations.tar.gz. Default: download 0.8 GB."),
    ] = None,
    max_side: MaxSide = None,
    workers: Workers = None,
    overwrite: Overwrite = False,
) -> None:
    """Pack the Oxford-IIIT Pet dataset: 37 breeds, with trimaps and head boxes (CC BY-SA 4.0)."""
    from contextlib import ExitStack

    from foreseen.data.pets import pack_pets

    with ExitStack() as bars:

        def begin(what: str) -> Callable[[int, int], None]:
            bars.close()
            return bars.enter_context(_progress(f"packing {what}" if "." not in what else f"fetching {what}"))

        summaries = pack_pets(out, archives, max_side=max_side, workers=workers, overwrite=overwrite, progress=begin)
    for summary in summaries:
        _report(summary)
    print(f"next: foreseen pretrain mae_vit_b16 data.path={out}")


def _report(summary: "Summary") -> None:
    """Say in a few lines what was packed."""
    size = f"{summary.bytes / 1e6:,.1f} MB"
    where = f"{summary.path}, split {summary.split}"
    print(f"packed {summary.samples:,} pictures ({summary.image}) in {summary.shards:,} shards, {size}: {where}")
    if summary.kept_shards:
        print(f"  {summary.kept_shards:,} shards were there from an earlier, unfinished packing")
    if summary.shrunk:
        print(f"  {summary.shrunk:,} pictures were shrunk")
    if summary.converted:
        print(f"  {summary.converted:,} pictures of other formats were converted to {summary.image}")
    if summary.unreadable:
        name, reason = min(summary.unreadable)
        print(f"  {len(summary.unreadable):,} pictures cannot be read and were left out, such as {name}: {reason}")
        print(f"  all of them: {summary.path / summary.split}.unreadable.txt")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """What to call with the work done and in all: a bar on a terminal, else a line every few seconds."""
    import sys
    import time

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total or None)
        return

    start = said = time.monotonic()

    def say(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES:
            said = now
            print(f"{what}: {done:,} of {total:,} after {now - start:.0f} s", file=sys.stderr, flush=True)

    yield say
