"""`foreseen data stats` and `foreseen data show`: what the pictures of a set are like, and what they look like."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreseen.commands.data_doctor import ShardsAt
from foreseen.printable import say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from foreseen.data.contact_sheet import Tile
    from foreseen.data.picture_statistics import Labels, Statistics
    from foreseen.data.pictures import Pictures

Source = Annotated[
    str, typer.Argument(help="Packed set, or what can be packed: a folder, a CSV, hf: and a name.", show_default=False)
]
Split = Annotated[str | None, typer.Option(help="Split to look at. Default: all.")]
Seed = Annotated[int, typer.Option(help="Of the draw.")]

_LISTED_CLASSES = 12  # more than these are shown by their largest and smallest
_MAX_SHOWN = 2000
_MAX_COLUMNS = 40


def stats(
    src: Source,
    split: Split = None,
    samples: Annotated[
        int, typer.Option(help="Pictures whose headers are read, drawn at random; 0 reads all.")
    ] = 10_000,
    decoded: Annotated[int, typer.Option(help="Pictures decoded for mean and std, where none are known.")] = 500,
    seed: Seed = 0,
    shards_at: ShardsAt = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Counts, sizes, formats, modes, bit depths, mean and std, and class balance, from headers."""
    from dataclasses import asdict
    from json import dumps

    from foreseen.commands.progress import progress
    from foreseen.data.picture_statistics import measure
    from foreseen.data.pictures import open_pictures
    from foreseen.errors import BadInput

    for option, value in (("--samples", samples), ("--decoded", decoded)):
        if value < 0:
            raise BadInput(f"{option} is {value}, it must be 0 or more")
    splits, manifest = open_pictures(src, split, shards_at)
    found: dict[str, Any] = {}
    for number, (name, pictures) in enumerate(splits.items()):
        entry = manifest.splits.get(name)
        colours = None if entry is None or entry.mean is None or entry.std is None else (entry.mean, entry.std)
        with progress(f"looking at {name}") as report:
            statistics = measure(
                pictures,
                manifest.classes,
                colours,
                samples=samples or None,
                decoded=decoded,
                seed=seed,
                progress=report,
            )
        origin = (
            {} if entry is None else {"source": entry.source, "licence": entry.licence, "shards": len(entry.shards)}
        )
        found[name] = origin | asdict(statistics)
        if not json:
            for line in [""] * (number > 0) + _describe(name, statistics, origin):
                say(line)
    if json:
        print(dumps({"path": src, "splits": found}, indent=1, ensure_ascii=False))


def _describe(name: str, found: "Statistics", origin: dict[str, Any]) -> list[str]:
    """The statistics of a split in lines."""
    from foreseen.data.picture_statistics import PERCENTILES

    shards = f" in {origin['shards']:,} shards" if origin else ""
    lines = [f"{name}: {found.samples:,} pictures{shards}, {_bytes(found.bytes)}"]
    lines += [f"  {key:<10}  {origin[key]}" for key in ("source", "licence") if origin.get(key)]
    if found.looked_at < found.samples:
        lines.append(f"  headers of {found.looked_at:,} pictures, drawn at random (--samples 0 reads all)")
    if found.unreadable:
        lines.append(f"  unreadable  {found.unreadable:,}: `foreseen data check` names them")
    heads = [f"{percent} %" if 0 < percent < 100 else ("least" if percent == 0 else "most") for percent in PERCENTILES]
    heads[PERCENTILES.index(50)] = "median"
    lines.append("  " + " " * 10 + "".join(f"{head:>11}" for head in heads))
    for quantity, values in found.spread.items():
        lines.append(f"  {quantity:<10}" + "".join(f"{_number(quantity, value):>11}" for value in values))
    lines.append(f"  {'format':<10}  {_shares(found.formats)}")
    lines.append(f"  {'pixels':<10}  {_shares(found.modes)}")
    if found.mean is not None and found.std is not None:
        where = f"  (measured on {found.measured_on:,} pictures)" if found.measured_on else ""
        lines.append(f"  {'mean':<10}  {_triple(found.mean)}{where}")
        lines.append(f"  {'std':<10}  {_triple(found.std)}")
    return lines + (["  labels      none"] if found.labels is None else _describe_labels(found.labels))


def _describe_labels(labels: "Labels") -> list[str]:
    filled = {name: count for name, count in labels.classes.items() if count}
    missing = f", {labels.unlabelled:,} pictures without a label" if labels.unlabelled else ", none missing"
    lines = [f"  {'labels':<10}  {labels.labelled:,} in {len(filled):,} classes{missing}"]
    if empty := [name for name, count in labels.classes.items() if not count]:
        lines.append(f"  {'':<10}  no picture of {len(empty):,} classes, such as {empty[0]}")
    ordered = sorted(filled.items(), key=lambda item: (-item[1], item[0]))
    if not ordered:
        return lines
    shown = ordered
    if len(ordered) > _LISTED_CLASSES:
        half = _LISTED_CLASSES // 2
        shown = [*ordered[:half], ("…", 0), *ordered[-half:]]
    largest, width = ordered[0][1], max(len(name) for name, _ in shown)
    for name, count in shown:
        bar = "█" * max(1, round(24 * count / largest)) if count else ""
        lines.append(f"  {'':<10}  {name:<{width}}  {f'{count:,}' if count else '':>9}  {bar}".rstrip())
    return lines


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.{0 if unit == 'bytes' else 1}f} {unit}"
        count /= 1000
    return f"{count:,.1f} GB"


def _number(quantity: str, value: float) -> str:
    return f"{value:,.2f}" if quantity in ("ratio", "megapixels") else f"{value:,.0f}"


def _shares(counts: "Mapping[str, int]") -> str:
    total = sum(counts.values())
    return "; ".join(f"{name} {count:,} ({100 * count / total:.1f} %)" for name, count in counts.items()) or "unknown"


def _triple(values: tuple[float, ...]) -> str:
    return "  ".join(f"{value:.4f}" for value in values)


def show(
    src: Source,
    split: Split = None,
    samples: Annotated[int, typer.Option(help="Pictures on the sheet.")] = 40,
    out: Annotated[Path, typer.Option(help="PNG to write.")] = Path("sheet.png"),
    label: Annotated[str | None, typer.Option(help="Only pictures of this class.", show_default=False)] = None,
    by_class: Annotated[
        bool, typer.Option("--by-class", help="A row for each class, of as many as there are columns.")
    ] = False,
    columns: Annotated[int, typer.Option(help="Pictures in a row.")] = 8,
    seed: Seed = 0,
    shards_at: ShardsAt = None,
) -> None:
    """A contact sheet of pictures drawn at random, upright, with labels and names."""
    from foreseen.data.contact_sheet import draw_sheet
    from foreseen.data.pictures import open_pictures
    from foreseen.errors import BadInput

    for option, value, most in (("--samples", samples, _MAX_SHOWN), ("--columns", columns, _MAX_COLUMNS)):
        if not 1 <= value <= most:
            raise BadInput(f"{option} is {value}, it must lie in [1, {most}]")
    if out.suffix.lower() != ".png":
        raise BadInput(f"--out is {out}, it must end in .png")
    splits, manifest = open_pictures(src, split, shards_at)
    rows: list[tuple[str, list[Tile]]] = []
    for name, pictures in splits.items():
        for heading, chosen in _choose(pictures, manifest.classes, label, by_class, samples, columns, seed):
            parts = (name if len(splits) > 1 else "", heading)
            tiles = [_tile(pictures, manifest.classes, sample) for sample in chosen]
            rows.append((": ".join(part for part in parts if part), tiles))
    if not rows:
        raise BadInput(f"{src} has no picture of the class {label!r}")
    shown, total = sum(len(tiles) for _, tiles in rows), sum(map(len, splits.values()))
    where = f", split {next(iter(splits))}" if len(splits) == 1 else ""
    title = f"{src}{where}: {shown:,} of {total:,} pictures"
    sheet = draw_sheet(title, rows, columns=min(columns, max(len(tiles) for _, tiles in rows)))
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out)
    say(f"wrote a sheet of {shown:,} pictures: {out} ({sheet.width:,} x {sheet.height:,} pixels)")


def _choose(
    pictures: "Pictures",
    classes: tuple[str, ...] | None,
    label: str | None,
    by_class: bool,
    samples: int,
    columns: int,
    seed: int,
) -> list[tuple[str, list[int]]]:
    """Headings and the samples below each, drawn by the seed."""
    import numpy as np

    from foreseen.errors import BadInput

    def draw(candidates: Any, count: int) -> list[int]:
        """Some of an array, or of that many first numbers."""
        generator = np.random.default_rng(seed)
        size = candidates if isinstance(candidates, int) else len(candidates)
        places = generator.choice(size, min(size, count), replace=False)
        found: list[int] = (places if isinstance(candidates, int) else candidates[places]).tolist()
        return found

    if label is None and not by_class:
        return [("", draw(len(pictures), samples))]
    if (labels := pictures.labels) is None:
        raise BadInput("--label and --by-class need labels, and these pictures have none: give them when packing")
    if label is not None:
        chosen = np.flatnonzero(labels == _class_number(label, classes))
        return [(label, draw(chosen, samples))] if len(chosen) else []
    numbers = np.unique(labels)
    numbers = numbers[numbers >= 0][: _MAX_SHOWN // columns]
    found = [(number, np.flatnonzero(labels == number)) for number in numbers.tolist()]
    return [(f"{_class_name(number, classes)} ({len(all_of):,})", draw(all_of, columns)) for number, all_of in found]


def _class_number(label: str, classes: tuple[str, ...] | None) -> int:
    from difflib import get_close_matches

    from foreseen.errors import BadInput

    if classes is None:
        if not label.isdigit():
            raise BadInput(f"--label is {label!r}, and the classes of this set have numbers only")
        return int(label)
    if label not in classes:
        near = get_close_matches(label, classes, n=1)
        hint = f": did you mean {near[0]}?" if near else f", it has {', '.join(classes[:5])} …"
        raise BadInput(f"--label is {label!r}, which is no class of this set{hint}")
    return classes.index(label)


def _class_name(number: int, classes: tuple[str, ...] | None) -> str:
    return classes[number] if classes is not None and number < len(classes) else f"class {number}"


def _tile(pictures: "Pictures", classes: tuple[str, ...] | None, sample: int) -> "Tile":
    from foreseen.data.contact_sheet import Tile, shrink
    from foreseen.data.decode import decode
    from foreseen.data.shards import CorruptSample
    from foreseen.errors import BadInput

    label = -1 if pictures.labels is None else int(pictures.labels[sample])
    caption = _class_name(label, classes) if label >= 0 else ""
    name = pictures.name(sample)
    try:
        pixels = decode(pictures.read(sample), fast=False)
    except (CorruptSample, OSError, BadInput) as error:
        return Tile(str(error), caption, name)
    size = f"{pixels.shape[1]} × {pixels.shape[0]}"
    return Tile(shrink(pixels), caption or size, name)
