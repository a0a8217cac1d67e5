"""The plot and the page of a study."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreseen.commands import html_page
from foreseen.commands.study_findings import name_of, start_in_words
from foreseen.commands.study_report import caption, level_title, rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#2a7f9e", "#b5562b", "#5d8a3c", "#7b5aa6")  # an augmentation each
_DARK = "#1c2733"
_LINE = "#9aa7b1"


def write_page(folder: Path, record: dict[str, Any]) -> Path:
    """Write `study.png` and `study.html` from what `study.json` holds.

    Returns:
        The page.
    """
    plot = draw(record)
    plot.savefig(folder / "study.png", dpi=120)
    head, body = rows(record)
    parts = [
        "<h1>With few labels, what should be trained?</h1>",
        f"<p>Pictures: {html.escape(record['data'])}. {html.escape(caption(record))}</p>",
    ]
    for labels, level in record["levels"].items():
        answer, *more = level["sentences"]
        parts += [f"<h2>{html.escape(level_title(labels))}</h2>", f"<p class=verdict>{html.escape(answer)}</p>"]
        parts.append(_list(more))
    parts += [
        "<h2>The plot</h2>",
        html_page.figure(
            plot, "A dot is a seed, with labels of its own; a bar is their mean; the dotted line is chance.", "plot"
        ),
        "<h2>The table</h2>",
        html_page.table(head, body),
        "<h2>How to read it</h2>",
        _list([*record["notes"], *(f"Left out: {entry['what']}: {entry['why']}." for entry in record["left_out"])]),
        f"<pre>{html.escape(' '.join(record['made_by']['command']))}</pre>",
    ]
    page = folder / "study.html"
    html_page.write_html(page, "foreseen study", parts)
    return page


def _list(sentences: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(sentence)}" for sentence in sentences) + "</ul>"


def draw(record: dict[str, Any]) -> "Figure":
    """A panel for each number of labels; a row for each model and start, a colour for each augmentation."""
    from matplotlib.figure import Figure

    cells = record["cells"]
    # As the table: model by model, in the order of the study.
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    order = sorted(
        dict.fromkeys((cell["model"], cell["start"]) for cell in cells), key=lambda row: models.index(row[0])
    )
    augmentations = list(dict.fromkeys(cell["augmentation"] for cell in cells))
    figure = Figure(figsize=(2.2 + 3.2 * len(record["levels"]), 1.6 + 0.42 * len(order)), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(record["levels"]), sharey=True, squeeze=False)[0]
    for axes, labels in zip(panels, record["levels"], strict=True):
        here = [cell for cell in cells if cell["labels"] == labels]
        for cell in here:
            place = augmentations.index(cell["augmentation"])
            shift = 0.0 if len(augmentations) == 1 else 0.36 * (place / (len(augmentations) - 1) - 0.5)
            row, colour = order.index((cell["model"], cell["start"])) + shift, _COLOURS[place % len(_COLOURS)]
            axes.plot(cell["test"], [row] * len(cell["test"]), "o", color=colour, alpha=0.55, markersize=5)
            axes.plot([cell["mean"]] * 2, [row - 0.17, row + 0.17], color=colour, linewidth=2.5)
            if name_of(cell) == record["levels"][labels]["best"]:
                end = (max(cell["test"]), row)
                axes.annotate("chosen", end, (7, 0), textcoords="offset points", va="center", color=_DARK)
        for border in range(1, len(order)):
            if order[border][0] != order[border - 1][0]:
                axes.axhline(border - 0.5, color=_LINE, linewidth=0.8)
        axes.axvline(here[0]["chance"], color=_LINE, linestyle=":")
        axes.set_title(f"{level_title(labels)} ({here[0]['training_labels']} labels)")
        axes.set_xlabel("test top-1, %")
        limit = 1.35 * max(score for cell in here for score in cell["test"])  # with room for a word
        axes.set_xlim(0, limit)
        axes.set_xticks([tick for tick in axes.get_xticks() if tick <= min(limit, 100)])
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(order)), [f"{model}, {start_in_words(start)}" for model, start in order])
    panels[0].set_ylim(len(order) - 0.4, -0.6)
    for place, augmentation in enumerate(augmentations):
        panels[0].plot([], [], "o", color=_COLOURS[place % len(_COLOURS)], label=augmentation)
    figure.legend(loc="outside upper right", ncols=len(augmentations), frameon=False)
    return figure
