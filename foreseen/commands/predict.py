"""`foreseen predict`: what a fine-tuned classifier says of each picture, as CSV or JSON lines."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

from foreseen.commands.data import Column

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreseen.config import Compute
    from foreseen.data.batch import Problem
    from foreseen.data.pictures import OneSplit
    from foreseen.handoff.frozen import FrozenClassifier

    Line = dict[str, Any] | Problem

_SUFFIXES = (".csv", ".jsonl")
_SHOWN = 5  # unreadable pictures


def predict(
    run: Annotated[str, typer.Argument(help="A fine-tuning run's folder, or its encoder folder.", show_default=False)],
    path: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures, a picture, a list or CSV of paths, tars, a packed set.", show_default=False
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl file. Default: CSV on standard output.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Classes named for each picture, the likeliest first.")] = 5,
    split: Annotated[str | None, typer.Option(help="Of a set or folder that has several.", show_default=False)] = None,
    image_column: Column = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a forward.")] = 64,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 4,
) -> None:
    """Name the class of each picture, with its probability and the next likeliest classes.

    Pictures that cannot be read have their line too, with the reason, and are counted at the end.
    """
    import sys
    from contextlib import nullcontext

    from foreseen.commands.alone import batch_size_advice, start_alone
    from foreseen.commands.outputs import complete_file
    from foreseen.data.open_source import SourceOptions
    from foreseen.data.pictures import open_one_split
    from foreseen.data.table import Columns
    from foreseen.errors import BadInput
    from foreseen.handoff.frozen import frozen_classifier

    if out is not None and out.suffix not in _SUFFIXES:
        raise BadInput(f"--out {out} ends in {out.suffix or 'nothing'}: {' or '.join(_SUFFIXES)} says the format")
    accelerator, compute = start_alone("predict", precision)
    inner = Path(run) / "encoder"
    classifier = frozen_classifier(str(inner) if (inner / "config.json").is_file() else run)
    top_k = min(top_k, classifier.num_classes)
    found = open_one_split(path, split, SourceOptions(labels="none", columns=Columns(image=image_column)), _say)
    lines = _lines(classifier, found, accelerator, compute, top_k=top_k, batch_size=batch_size, workers=workers)
    problems: list[Problem] = []
    count = 0
    with batch_size_advice(batch_size), nullcontext(sys.stdout) if out is None else complete_file(out) as file:
        write = _as_csv(file, found.key, top_k) if out is None or out.suffix == ".csv" else _as_json(file, found.key)
        for line in lines:
            write(line)
            count += 1
            if not isinstance(line, dict):
                problems.append(line)
    _say(f"{count - len(problems):,} pictures predicted{'' if out is None else f': {out}'}")
    if problems:
        _say(f"{len(problems):,} of {count:,} pictures could not be read, and have no prediction, such as")
        for problem in problems[:_SHOWN]:
            _say(f"  {problem}")


def _lines(
    classifier: "FrozenClassifier", found: "OneSplit", accelerator: "Accelerator", compute: "Compute", *, top_k: int,
    batch_size: int, workers: int,
) -> "Iterator[Line]":  # fmt: skip
    """For each picture, in order, what is said of it or why it cannot be read."""
    import torch

    from foreseen.data.loader import load
    from foreseen.data.sweep_pictures import PictureSweep
    from foreseen.data.views import Request, finish
    from foreseen.engine.launch import autocast, choose_attention, image_dtype
    from foreseen.printable import printable

    device = accelerator.device
    names = [printable(name) for name in classifier.class_names or map(str, range(classifier.num_classes))]
    model = classifier.model.to(device)
    choose_attention(model, device)
    view = classifier.preprocessing.view()
    sweep = PictureSweep(found.pictures, view, batch_size)
    for batch in load(sweep, range(len(sweep)), workers=workers, pin_memory=device.type == "cuda"):
        rows: list[Line] = list(batch.problems)
        if len(batch):
            images = finish(batch, Request(views=(view,)), device, image_dtype(compute)).images[view.name]
            with torch.no_grad(), autocast(accelerator, compute):
                logits = model(images)
            best = logits.float().softmax(dim=1).topk(top_k, dim=1)
            columns = (batch.sample.tolist(), best.indices.tolist(), best.values.tolist())
            for sample, classes, shares in zip(*columns, strict=True):
                top = [
                    {"class": names[number], "probability": share}
                    for number, share in zip(classes, shares, strict=True)
                ]
                name, key = found.pictures.name(sample), found.key(sample)
                rows.append({"sample": sample, "path": name, "key": key, "top": top})
        yield from sorted(rows, key=lambda row: row["sample"] if isinstance(row, dict) else row.sample)


def _as_csv(file: IO[str], key: "Callable[[int], str]", top_k: int) -> "Callable[[Line], None]":
    """What writes a line of `_lines` as one of CSV; the head is written at once."""
    import csv

    writer = csv.writer(file, lineterminator="\n")
    more = [name for place in range(2, top_k + 1) for name in (f"top{place}", f"top{place}_probability")]
    writer.writerow(["path", "key", "prediction", "probability", *more, "error"])

    def write(line: "Line") -> None:
        if isinstance(line, dict):
            cells = [cell for entry in line["top"] for cell in (entry["class"], f"{entry['probability']:.6g}")]
            writer.writerow([line["path"], line["key"], *cells, ""])
        else:
            writer.writerow([line.key, key(line.sample), *[""] * (2 * top_k), line.reason])

    return write


def _as_json(file: IO[str], key: "Callable[[int], str]") -> "Callable[[Line], None]":
    """What writes a line of `_lines` as one of JSON."""
    import json

    def write(line: "Line") -> None:
        if isinstance(line, dict):
            first = line["top"][0]
            said = {"path": line["path"], "key": line["key"], "prediction": first["class"]}
            said |= {"probability": first["probability"], "top": line["top"]}
        else:
            said = {"path": line.key, "key": key(line.sample), "error": line.reason}
        file.write(json.dumps(said, ensure_ascii=False) + "\n")

    return write


def _say(text: str) -> None:
    """On standard error: standard output may be the predictions."""
    from foreseen.printable import printable

    typer.echo(printable(text), err=True)
