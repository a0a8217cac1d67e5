"""`foreseen data check`, `index` and `repair`: sets and tars that somebody else made, or that something has damaged."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from foreseen.printable import say

if TYPE_CHECKING:
    from foreseen.data.check import Findings
    from foreseen.data.tar_samples import Fault

_SHOWN = 20

Workers = Annotated[int | None, typer.Option(help="Processes. Default: one a CPU.")]
ShardsAt = Annotated[Path | None, typer.Option(help="Folder of the tars, where they lie elsewhere than the manifest.")]
Image = Annotated[
    str | None,
    typer.Option(help="Extension of the member that is the picture. Default: the first, jpg before png before others."),
]
Classes = Annotated[
    Path | None, typer.Option(help="Class names, one a line. Default: classes.txt beside the tars, if there is one.")
]


def check(
    place: Annotated[
        str, typer.Argument(metavar="SET", help="Folder of a set, or tars without an index.", show_default=False)
    ],
    split: Annotated[str | None, typer.Option(help="The split to check. Default: all.")] = None,
    decode: Annotated[bool, typer.Option("--decode/--no-decode", help="Decode every picture.")] = True,
    write_checksums: Annotated[
        bool, typer.Option("--write-checksums", help="Put checksums that are not known into the index.")
    ] = False,
    near_duplicates: Annotated[
        bool,
        typer.Option("--near-duplicates", help="Find pictures that look alike; across splits they are a leak."),
    ] = False,
    report: Annotated[Path | None, typer.Option(help="File for all that is found, one json a line.")] = None,
    shards_at: ShardsAt = None,
    image: Image = None,
    workers: Workers = None,
) -> None:
    """Verify every member of a set: sizes, index, checksums, pictures, labels, masks. Exit code 1 where faults are."""
    import json
    from dataclasses import asdict

    from foreseen.commands.progress import progress
    from foreseen.data.check import check_set, check_tars
    from foreseen.data.check_duplicates import check_duplicates
    from foreseen.data.manifest import FILE_NAME
    from foreseen.data.tar_paths import find_tars
    from foreseen.errors import BadInput
    from foreseen.files import expand_home, write_atomically

    began = time.monotonic()
    path = expand_home(place)
    is_set = (path / FILE_NAME).is_file() or (path.is_dir() and not any(path.glob("*.tar")))
    if near_duplicates and not is_set:
        raise BadInput(f"--near-duplicates is for sets with an index: run `foreseen data index {place}` first")
    with progress("checking") as said:
        if is_set:
            found = check_set(
                path,
                split=split,
                shards_at=shards_at,
                decode=decode,
                write_checksums=write_checksums,
                workers=workers,
                progress=said,
            )
        else:
            found = check_tars(find_tars([place], compressed=False), image=image, workers=workers, progress=said)
    if near_duplicates:
        with progress("looking for near duplicates") as said:
            check_duplicates(found, path, split=split, shards_at=shards_at, workers=workers, progress=said)
    if report is not None:
        lines = [json.dumps(asdict(fault)) for fault in (*found.faults, *found.duplicates)]
        write_atomically(report, "".join(f"{line}\n" for line in lines))
    _print_findings(found, time.monotonic() - began)
    if report is not None and (found.faults or found.duplicates):
        say(f"all of them: {report}")
    elif len(found.faults) > _SHOWN or found.duplicates:
        say("all of them: --report FILE")
    if not found.faults:
        if not found.is_indexed:
            say(f"next: foreseen data index {place}")
        return
    say(f"remedy: {_remedy(found, place)}")
    raise typer.Exit(1)


def index(
    tars: Annotated[list[str], typer.Argument(help="Tars, folders of tars, or brace patterns.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Folder for index and manifest. Default: that of the tars.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Name of the split. Default: as the file names say, such as train-000.tar; train."),
    ] = None,
    image: Image = None,
    labels: Annotated[
        str | None,
        typer.Option(help="cls, json:FIELD, or none. Default: cls where every sample has a .cls, else none."),
    ] = None,
    classes: Classes = None,
    checksums: Annotated[bool, typer.Option("--checksums", help="Read every picture for its checksum.")] = False,
    statistics: Annotated[
        bool, typer.Option("--statistics", help="Decode every picture for the channels' mean and deviation.")
    ] = False,
    source: Annotated[str | None, typer.Option(help="Where the pictures are from, kept in the manifest.")] = None,
    licence: Annotated[str | None, typer.Option(help="Terms of the pictures, kept in the manifest.")] = None,
    workers: Workers = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the index of a split that has one.")] = False,
) -> None:
    """Make tars that others made readable as they are: an index and a manifest, beside them or in --out."""
    from foreseen.commands.progress import progress
    from foreseen.data.index_tars import IndexOptions, index_tars
    from foreseen.data.tar_labels import CLASSES_FILE, LabelRule, read_classes
    from foreseen.data.tar_paths import by_split, find_tars
    from foreseen.errors import BadInput

    began = time.monotonic()
    files = find_tars(tars, compressed=False)
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise BadInput(
            f"the tars lie in several folders ({folders[0]}, {folders[1]}), a set in one: index each by itself"
        )
    if classes is None and (folders[0] / CLASSES_FILE).is_file():
        classes = folders[0] / CLASSES_FILE
    rule = None if labels is None else LabelRule.parse(labels)
    place = out or folders[0]
    with progress("indexing") as said:
        found = index_tars(
            by_split(files, split)[0],
            place,
            IndexOptions(image, rule, checksums, statistics),
            classes=None if classes is None else read_classes(classes),
            source=source,
            licence=licence,
            workers=workers,
            overwrite=overwrite,
            progress=said,
        )
    for one in found:
        where = f"{place}, split {one.split}"
        say(
            f"indexed {one.entry.samples:,} samples ({one.entry.image}) in {len(one.entry.shards):,} tars, labels "
            f"{one.labels}: {where}"
        )
        for note in one.notes:
            say(f"  {note}")
    samples = sum(one.entry.samples for one in found)
    say(f"{samples:,} samples in {time.monotonic() - began:.1f} s")
    if not checksums:
        say(f"checksums are not known: foreseen data check {place} --write-checksums reads every picture for them")
    first = found[0].split
    at = "" if place.resolve() == folders[0].resolve() else f" data.shards_at={folders[0]}"
    say(f"next: foreseen pretrain mae_vit_b16 data.path={place} data.split={first}{at}")


def repair(
    src: Annotated[str, typer.Argument(help="Folder of a set, or tars.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="New folder for the clean copy.", show_default=False)],
    shards_at: ShardsAt = None,
    workers: Workers = None,
) -> None:
    """Write a clean copy of a set or of tars: what is whole, and the names of what is not."""
    from foreseen.commands.progress import progress
    from foreseen.data.repair import repair as write_copy

    summaries = write_copy(
        src, out, shards_at=shards_at, workers=workers, say=say, progress=lambda split: progress(f"copying {split}")
    )
    for summary in summaries:
        where = f"{out}, split {summary.split}"
        say(f"copied {summary.samples:,} samples ({summary.image}) in {summary.shards:,} shards: {where}")
        if summary.converted:
            say(f"  {summary.converted:,} pictures of other formats were converted to {summary.image}")
        for name, reason in sorted(summary.unreadable)[:_SHOWN]:
            say(f"  left out {name}: {reason}")
        if summary.unreadable:
            say(f"  {len(summary.unreadable):,} left out in all: {out / summary.split}.unreadable.txt")
    say(f"next: foreseen data check {out}")


def _print_findings(found: "Findings", seconds: float) -> None:
    shards, samples, size = (sum(column) for column in zip(*found.splits.values(), strict=True))
    what = "pictures decoded" if found.decoded else "pictures not decoded"
    what = what if found.is_indexed else "no index: structure alone"
    say(f"checked {found.place}: {samples:,} samples, {shards:,} shards, {size / 1e6:,.1f} MB, {seconds:.1f} s; {what}")
    for name, (shards, samples, _) in found.splits.items():
        if name:
            count = sum(fault.split == name for fault in found.faults)
            say(f"  {name}: {samples:,} samples in {shards:,} shards, {f'{count:,} faults' if count else 'sound'}")
    for note in found.notes:
        say(f"  {note}")
    if found.without_checksum:
        say(f"  {found.without_checksum:,} samples have no checksum yet: --write-checksums puts them into the index")
    for fault in _first_of_each_kind(found.faults):
        where = " ".join(part for part in (fault.shard or fault.split, fault.key) if part)
        say(f"{where}: {fault.kind}: {fault.reason}" if where else f"{fault.kind}: {fault.reason}")
    if not found.faults:
        say("sound: no faults")
        return
    kinds: dict[str, int] = {}
    for fault in found.faults:
        kinds[fault.kind] = kinds.get(fault.kind, 0) + 1
    rest = f"; {len(found.faults) - _SHOWN:,} are not shown" if len(found.faults) > _SHOWN else ""
    say(f"{len(found.faults):,} faults: " + ", ".join(f"{count:,} {kind}" for kind, count in kinds.items()) + rest)


def _first_of_each_kind(faults: "list[Fault]") -> "list[Fault]":
    """So many as are shown: in turn one of each kind, in the order in which they were found."""
    rounds: dict[str, int] = {}
    ranked = []
    for number, fault in enumerate(faults):
        rounds[fault.kind] = rounds.get(fault.kind, -1) + 1
        ranked.append((rounds[fault.kind], number))
    return [faults[number] for number in sorted(number for _, number in sorted(ranked)[:_SHOWN])]


def _remedy(found: "Findings", place: str) -> str:
    kinds = {fault.kind for fault in found.faults}
    if kinds <= {"leak", "near leak"}:
        return "pack one of the splits again without the pictures that the other has"
    if kinds <= {"stray"}:
        return "move the strays away, or give the command of the unfinished packing again"
    if kinds <= {"missing"}:
        return "bring the shards back, or say by --shards-at FOLDER where they are"
    return f"foreseen data repair {place} OUT makes a clean copy of what is sound"
