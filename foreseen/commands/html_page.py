"""Pages that need nothing else: one HTML file with its pictures in it."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2733; }
h1 { margin-bottom: 0; }
h2 { margin-top: 2.2rem; }
.verdict { font-size: 1.15rem; border-left: 4px solid #2a7f9e; padding: .2rem 1rem; background: #f0f6f8; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #d5dde3; }
tr.first td { font-weight: 600; }
img { max-width: 100%; image-rendering: pixelated; }
img.plot { image-rendering: auto; }
figure { margin: 1rem 0; }
figcaption { color: #51606d; font-size: .95rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; }
.tiles figure { width: 11rem; margin: 0; }
.tiles figcaption { font-size: .8rem; overflow-wrap: anywhere; }
table.matrix td, table.matrix th { padding: .1rem .35rem; border: 0; text-align: right; font-size: .8rem; }
pre { background: #f3f5f7; padding: .8rem; }
"""


def write_html(file: Path, title: str, parts: Iterable[str]) -> None:
    """Write a page.

    Args:
        file: where to.
        title: plain text.
        parts: HTML, in order.
    """
    from foreseen.files import write_atomically

    head = f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>\n"
    write_atomically(file, head + "\n".join(parts) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of plain texts."""
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}" for cell in head)]
    lines += ["<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
    return f"<table>{''.join(lines)}</table>"


def figure(picture: "Figure | Image", caption: str, kind: str = "pixels") -> str:
    """A picture with a line below it; of kind "pixels", which are shown as such when enlarged, or "plot"."""
    from PIL import Image

    data = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(data, "PNG")
    else:
        picture.savefig(data, format="png", dpi=120)
    source = base64.b64encode(data.getvalue()).decode()
    text = html.escape(caption)
    return f'<figure><img class={kind} src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'
