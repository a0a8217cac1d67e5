"""What a fine-tuned classifier gets wrong: a page and tables in RUN/report, from the pass that scored it.

index.html      the confusion matrix, precision and recall of each class, the worst mistakes as pictures
confusion.csv   pictures of each class (row) taken for each class (column)
classes.csv     n, precision, recall and F1 of each class
mistakes.csv    the worst mistakes by name, those first whose own class was thought least likely
"""

import csv
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreseen.commands.html_page import figure, table, write_html
from foreseen.printable import printable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from foreseen.data.shards import ShardSet
    from foreseen.engine.predictions import Predictions

FOLDER = "report"
_SHOWN = 24  # mistakes as pictures
_LISTED = 200  # mistakes by name: each is looked up in its shard, which may lie behind a network
_PAIRS = 20
_MATRIX_SHOWN = 50  # classes; a larger one no one can read
_MATRIX_WRITTEN = 2000
_CLASSES_SHOWN = 1000


def write_report(folder: Path, shards: "ShardSet", found: "Predictions", *, what: str, num_classes: int) -> Path:
    """Write the report of a run.

    Args:
        folder: the run folder.
        shards: the split that was scored.
        found: what was said of its labelled pictures.
        what: the split and the weights, in words; may hold what was noticed about the score.
        num_classes: of the classifier.

    Returns:
        The page.
    """
    out = folder / FOLDER
    out.mkdir(exist_ok=True)
    names = [printable(name) for name in shards.classes or map(str, range(num_classes))]
    classes = _per_class(found, names)
    mistakes = _mistakes(shards, found, names)
    if num_classes <= _MATRIX_WRITTEN:
        counts = found.confusion(num_classes).tolist()
        rows = ([name, *map(str, row)] for name, row in zip(names, counts, strict=True))
        _write_csv(out / "confusion.csv", ["label", *names], rows)
    _write_csv(out / "classes.csv", list(classes[0]), (list(map(_text, row.values())) for row in classes))
    columns = ["path", "key", "label", "predicted", "probability", "label_probability"]
    _write_csv(out / "mistakes.csv", columns, ([_text(row[name]) for name in columns] for row in mistakes))
    page = out / "index.html"
    write_html(page, f"{folder.name}: what it gets wrong", _page(shards, found, classes, mistakes, what))
    return page


def _page(
    shards: "ShardSet", found: "Predictions", classes: list[dict[str, Any]], mistakes: list[dict[str, Any]], what: str
) -> Iterable[str]:  # fmt: skip
    right, count = sum(row["right"] for row in classes), len(found)
    recalls = [row["recall"] for row in classes if row["recall"] is not None]
    yield "<h1>What it gets wrong</h1>"
    yield (
        f"<p class=verdict>{right:,} of {count:,} pictures right, {right / count:.1%}; mean recall of "
        f"{len(recalls):,} classes {sum(recalls) / len(recalls):.1%}.</p><p>{html.escape(what)}</p>"
    )
    names = [row["class"] for row in classes]
    sizes = [row["n"] for row in classes]
    if pairs := [
        [names[label], names[taken], str(times), str(sizes[label])]
        for label, taken, times in found.confused()[:_PAIRS].tolist()
    ]:
        yield "<h2>Most often confused</h2>"
        yield table(["pictures of", "taken for", "times", "of"], pairs)
    if len(names) <= _MATRIX_SHOWN:
        yield "<h2>Confusion matrix</h2><p>A row holds the pictures of a class, a column what they were taken for.</p>"
        yield _matrix(found.confusion(len(names)), names)
    yield "<h2>Classes, the lowest recall first</h2>"
    if len(classes) > _CLASSES_SHOWN:
        yield f"<p>{_CLASSES_SHOWN:,} of {len(classes):,}; classes.csv has all.</p>"
    ordered = sorted(classes, key=lambda row: 2.0 if row["recall"] is None else row["recall"])
    yield table(
        ["class", "n", "recall", "precision", "F1"],
        (
            [row["class"], str(row["n"]), *(_percent(row[key]) for key in ("recall", "precision", "f1"))]
            for row in ordered[:_CLASSES_SHOWN]
        ),
    )
    yield f"<h2>The worst of {count - right:,} mistakes</h2>"
    yield f"<div class=tiles>{''.join(_tile(shards, row) for row in mistakes[:_SHOWN])}</div>"


def _per_class(found: "Predictions", names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class; a share of nothing is None."""
    import numpy as np

    of_classes, taken_for, rights = (
        np.bincount(numbers, minlength=len(names)).tolist()
        for numbers in (found.label, found.predicted, found.label[found.label == found.predicted])
    )
    rows = []
    for name, of_class, taken, right in zip(names, of_classes, taken_for, rights, strict=True):
        rows.append(
            {
                "class": name,
                "n": of_class,
                "right": right,
                "predicted": taken,
                "recall": right / of_class if of_class else None,
                "precision": right / taken if taken else None,
                "f1": 2 * right / (of_class + taken) if of_class + taken else None,
            }
        )
    return rows


def _mistakes(shards: "ShardSet", found: "Predictions", names: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for place in found.worst()[:_LISTED].tolist():
        sample = int(found.sample[place])
        rows.append(
            {
                "sample": sample,
                "path": shards.name(sample),
                "key": "/".join(shards.shard_and_key(sample)),
                "label": names[found.label[place]],
                "predicted": names[found.predicted[place]],
                "probability": float(found.probability[place]),
                "label_probability": float(found.label_probability[place]),
            }
        )
    return rows


def _matrix(confusion: "NDArray[np.int64]", names: Sequence[str]) -> str:
    lines = ["<tr><th>" + "".join(f'<th title="{html.escape(name)}">{n}' for n, name in enumerate(names))]
    for number, name in enumerate(names):
        total = max(1, int(confusion[number].sum()))
        cells = "".join(
            f'<td style="background:rgba({"42,127,158" if number == taken else "181,86,43"},{count / total:.2f})" '
            f'title="{html.escape(name)} taken for {html.escape(names[taken])}">{count or ""}'
            for taken, count in enumerate(confusion[number].tolist())
        )
        lines.append(f"<tr><th>{html.escape(name)} {number}{cells}")
    return f"<table class=matrix>{''.join(lines)}</table>"


def _tile(shards: "ShardSet", row: dict[str, Any]) -> str:
    from PIL import Image

    from foreseen.data.contact_sheet import shrink
    from foreseen.data.decode import decode
    from foreseen.data.shards import CorruptSample

    said = f"{row['predicted']} ({row['probability']:.0%})"
    caption = f"{row['label']} ({row['label_probability']:.1%}) taken for {said}: {row['path']}"
    try:
        picture = Image.fromarray(shrink(decode(shards.read(row["sample"]))))
    except (CorruptSample, OSError) as error:  # it could be read a minute ago
        return f"<figure><figcaption>{html.escape(f'{caption} ({error})')}</figcaption></figure>"
    return figure(picture, caption, "plot")


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _write_csv(file: Path, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from foreseen.files import write_atomically

    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    write_atomically(file, text.getvalue())
