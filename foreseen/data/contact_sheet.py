"""A contact sheet: many small pictures with their labels and names below them, in one image."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

SIDE = 168  # of the square that a picture is fitted into, in pixels
_GAP, _MARGIN = 14, 24
_TITLE_SIZE, _HEADING_SIZE, _CAPTION_SIZE, _NOTE_SIZE = 22, 16, 14, 11
_INK, _FAINT, _PAPER, _EMPTY = "#202124", "#6b6f76", "white", "#eef0f2"
_ELLIPSIS = "…"


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        pixels: upright RGB [H, W, 3], or why it cannot be read, which then stands in its place.
        caption: the line below it, such as its label.
        note: the fainter line below that, such as its path, of which the end is shown.
    """

    pixels: NDArray[np.uint8] | str
    caption: str
    note: str


def shrink(pixels: NDArray[np.uint8], side: int = SIDE) -> NDArray[np.uint8]:
    """A picture no larger than a sheet shows it, so that a sheet of large ones fits into memory."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def draw_sheet(
    title: str, rows: Sequence[tuple[str, Sequence[Tile]]], *, columns: int, side: int = SIDE
) -> Image.Image:  # fmt: skip
    """Draw a contact sheet.

    Args:
        title: the line at its head.
        rows: groups of tiles, each with a heading, empty for none; a group begins on a line of its own.
        columns: tiles in a line.
        side: of the square that a picture is fitted into, in pixels.
    """
    cell = side + _line(_CAPTION_SIZE) + _line(_NOTE_SIZE) + _GAP
    heights = [(_line(_HEADING_SIZE) if heading else 0) - (-len(tiles) // columns) * cell for heading, tiles in rows]
    width = 2 * _MARGIN + columns * (side + _GAP) - _GAP
    sheet = Image.new("RGB", (width, 2 * _MARGIN + _line(_TITLE_SIZE) + sum(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_MARGIN, _MARGIN), title, _TITLE_SIZE, _INK, width - 2 * _MARGIN)
    top = _MARGIN + _line(_TITLE_SIZE)
    for (heading, tiles), height in zip(rows, heights, strict=True):
        line = top
        if heading:
            _write(pen, (_MARGIN, line), heading, _HEADING_SIZE, _INK, width - 2 * _MARGIN)
            line += _line(_HEADING_SIZE)
        for number, tile in enumerate(tiles):
            place = (_MARGIN + number % columns * (side + _GAP), line + number // columns * cell)
            _draw_tile(sheet, pen, place, tile, side)
        top += height
    return sheet


def _draw_tile(sheet: Image.Image, pen: ImageDraw.ImageDraw, place: tuple[int, int], tile: Tile, side: int) -> None:
    left, top = place
    pen.rectangle((left, top, left + side - 1, top + side - 1), fill=_EMPTY)
    if isinstance(tile.pixels, str):
        lines = textwrap.wrap(tile.pixels, max(1, side // 7))[: (side - _GAP) // _line(_NOTE_SIZE)]
        for number, line in enumerate(lines):
            place = (left + _GAP // 2, top + _GAP // 2 + number * _line(_NOTE_SIZE))
            _write(pen, place, line, _NOTE_SIZE, _FAINT, side - _GAP)
    else:
        picture = Image.fromarray(tile.pixels)
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        # What is smaller than its square is enlarged in whole pixels, so that one sees what is there.
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
        sheet.paste(picture.resize(size, method), (left + (side - size[0]) // 2, top + (side - size[1]) // 2))
    below = top + side + 3
    _write(pen, (left, below), tile.caption, _CAPTION_SIZE, _INK, side)
    _write(pen, (left, below + _line(_CAPTION_SIZE) - 3), tile.note, _NOTE_SIZE, _FAINT, side, keep_end=True)


def _line(size: int) -> int:
    return round(size * 1.45)


def _write(
    pen: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    size: int,
    colour: str,
    width: int,
    *,
    keep_end: bool = False,
) -> None:
    """Write one line, cut where it is wider than its place."""
    text = " ".join(text.split())[-400:] if keep_end else " ".join(text.split())[:400]
    font = _font(_font_file(frozenset(text)), size)
    shown = text
    while pen.textlength(shown, font) > width and len(text) > 1:
        text = text[1:] if keep_end else text[:-1]
        shown = _ELLIPSIS + text if keep_end else text + _ELLIPSIS
    pen.text(place, shown, colour, font)


@cache
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


@lru_cache(maxsize=1024)
def _font_file(letters: frozenset[str]) -> str:
    """A font that has all these letters: matplotlib's DejaVu Sans, else one of the machine's, else DejaVu after all."""
    import matplotlib
    from matplotlib.font_manager import fontManager

    usual = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    wanted = {ord(letter) for letter in letters} - {ord(" ")}
    if wanted <= _letters_of(str(usual)):
        return str(usual)
    upright = (entry for entry in fontManager.ttflist if entry.style == "normal" and entry.weight == 400)
    others = sorted(entry.fname for entry in upright if "LastResort" not in entry.fname)  # which draws boxes alone
    return next((file for file in others if wanted <= _letters_of(file)), str(usual))


@cache
def _letters_of(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(file).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
