"""`foreseen data`: pictures on disk to shards, and a look at them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreseen.commands import data_doctor, data_look
from foreseen.printable import say

if TYPE_CHECKING:
    from foreseen.data.pack import Summary

app = typer.Typer(
    help="Pack pictures into shards, which every other command reads; check, mend and look at them.",
    no_args_is_help=True,
)
app.command()(data_doctor.check)
app.command()(data_doctor.index)
app.command()(data_doctor.repair)
app.command()(data_look.stats)
app.command()(data_look.show)

MaxSide = Annotated[
    int | None, typer.Option(help="Shrink pictures to this longest side, in pixels. Default: keep them.")
]
Workers = Annotated[int | None, typer.Option(help="Processes. Default: one a CPU.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a split that exists.")]
Column = Annotated[str | None, typer.Option(help="Of a table or Hugging Face set. Default: the one with a usual name.")]


@app.command()
def pack(
    src: Annotated[
        str,
        typer.Argument(
            help="Folder of pictures; tars; .csv, .tsv, .jsonl or .ndjson; .txt or .lst with a path on each line; hf: "
            "and a name on the hub or a path; torchvision:NAME@DIR.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the set; other splits may be in it.", show_default=False)],
    split: Annotated[
        str | None,
        typer.Option(
            help="Name of the split. Default: train, or all of the source's own; with those, the one to take."
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            help="none, or folder: the first folder below SRC, or below each of its splits, is the class. Default: "
            "none for folders; of other sources the label column, or the set's own labels."
        ),
    ] = None,
    image_column: Column = None,
    label_column: Column = None,
    split_column: Column = None,
    keep_columns: Annotated[
        str, typer.Option(help="Further columns to keep in KEY.json: all, none, or names between commas.")
    ] = "all",
    split_fractions: Annotated[
        str | None,
        typer.Option(
            help="Divide into splits by shares, such as train=0.8,validation=0.1,test=0.1, in every class alike, by a "
            "hash of the names and the seed.",
            show_default=False,
        ),
    ] = None,
    hf_config: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face set on the hub.")] = None,
    download: Annotated[
        bool, typer.Option("--download", help="Let torchvision fetch a set that is not in DIR.")
    ] = False,
    max_side: MaxSide = None,
    quality: Annotated[int, typer.Option(help="JPEG or WEBP quality of shrunk pictures.")] = 90,
    shard_samples: Annotated[
        int | None, typer.Option(help="Pictures in a shard. Default: 1000, or no bound with --shard-size.")
    ] = None,
    shard_size: Annotated[
        float | None,
        typer.Option(help="Megabytes of a shard, by the sizes of the files: shards of shrunk pictures are smaller."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the shuffle, and of --split-fractions.")] = 0,
    workers: Workers = None,
    licence: Annotated[str | None, typer.Option(help="Terms of the pictures, kept in the manifest.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse unreadable pictures instead of leaving them out.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Pack pictures into the splits of a set. Killed, it goes on when the same command is given again."""
    from foreseen.commands.progress import progress
    from foreseen.data.extra_columns import parse_keep
    from foreseen.data.manifest import FILE_NAME, Manifest, read_manifest
    from foreseen.data.open_source import SourceOptions, is_folder, open_source
    from foreseen.data.pack import pack as pack_samples
    from foreseen.data.split_fractions import divide, parse_fractions
    from foreseen.data.table import Columns
    from foreseen.data.tar_paths import check_apart
    from foreseen.data.tar_source import TarSource

    columns = Columns(image=image_column, label=label_column, split=split_column)
    keep = parse_keep(keep_columns)
    options = SourceOptions(labels or ("none" if is_folder(src) else "auto"), columns, hf_config, keep, download)
    fractions = None if split_fractions is None else parse_fractions(split_fractions)
    source = open_source(src, options)
    if isinstance(source, TarSource):
        check_apart(out, source.files)
    joined = read_manifest(out) if (out / FILE_NAME).exists() else Manifest({})
    found = source.read(joined.classes)
    for note in found.notes:
        say(note)
    chosen = found.choose(split) if fractions is None else divide(found, split, fractions, seed)
    for name, samples in chosen.items():
        with progress(f"packing {name}") as report:
            summary = pack_samples(
                samples,
                out,
                name,
                classes=found.classes,
                shard_samples=shard_samples,
                shard_mb=shard_size,
                max_side=max_side,
                quality=quality,
                seed=seed,
                workers=workers,
                source=source.name,
                licence=licence or found.licence,
                strict=strict,
                overwrite=overwrite,
                keep=True,
                progress=report,
            )
        _report(summary)
    first = "train" if "train" in chosen else next(iter(chosen))
    say(f"next: foreseen pretrain mae_vit_b16 data.path={out} data.split={first}")


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

    from foreseen.commands.progress import progress
    from foreseen.data.pets import pack_pets

    with ExitStack() as bars:

        def begin(what: str) -> Callable[[int, int], None]:
            bars.close()
            return bars.enter_context(progress(f"packing {what}" if "." not in what else f"fetching {what}"))

        summaries = pack_pets(out, archives, max_side=max_side, workers=workers, overwrite=overwrite, progress=begin)
    for summary in summaries:
        _report(summary)
    say(f"next: foreseen pretrain mae_vit_b16 data.path={out}")


def _report(summary: "Summary") -> None:
    """Say in a few lines what was packed."""
    size = f"{summary.bytes / 1e6:,.1f} MB"
    where = f"{summary.path}, split {summary.split}"
    if summary.was_there:
        say(f"kept {summary.samples:,} pictures, packed from the same files before (--overwrite packs anew): {where}")
        return
    say(f"packed {summary.samples:,} pictures ({summary.image}) in {summary.shards:,} shards, {size}: {where}")
    if summary.kept_shards:
        say(f"  {summary.kept_shards:,} shards were there from an earlier, unfinished packing")
    if summary.shrunk:
        say(f"  {summary.shrunk:,} pictures were shrunk")
    if summary.converted:
        say(f"  {summary.converted:,} pictures of other formats were converted to {summary.image}")
    for split, count in summary.duplicates.items():
        if split == summary.split:
            say(f"  {count:,} pictures repeat an earlier one byte for byte, and were kept")
        else:
            say(f"  LEAK: {count:,} pictures are also in the split {split}, byte for byte: remove them from one")
    if summary.duplicates:
        say(f"  all of them: {summary.path / summary.split}.duplicates.txt")
    if summary.unreadable:
        name, reason = min(summary.unreadable)
        say(f"  {len(summary.unreadable):,} pictures cannot be read and were left out, such as {name}: {reason}")
        say(f"  all of them: {summary.path / summary.split}.unreadable.txt")
