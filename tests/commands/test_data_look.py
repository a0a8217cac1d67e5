"""`foreseen data stats` and `show`: numbers of headers, and a sheet on which one sees the pictures."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from foreseen.commands.data import app
from foreseen.data import contact_sheet
from foreseen.data.contact_sheet import SIDE, Tile, draw_sheet
from foreseen.data.decode import DecodeError
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.manifest import Manifest, Split, read_manifest, write_manifest
from foreseen.data.picture_header import Header, read_header
from foreseen.errors import BadInput
from tests.dirty_files import encoded, picture
from tests.tars_of_others import sound


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many kinds in class folders, one of them unreadable, in two alphabets."""
    root = tmp_path_factory.mktemp("mixed")
    turned = Image.Exif()
    turned[0x0112] = 6
    grey16 = Image.fromarray(np.arange(0, 60000, 50, dtype=np.uint16).reshape(30, 40))
    files = {
        "Größe/plain.jpg": encoded(picture(60, 40)), "Größe/turned.jpg": encoded(picture(60, 40), exif=turned),
        "Größe/page.jpg": b"<html>", "Жук/deep.png": encoded(grey16, "PNG"),
        "Жук/one bit.png": encoded(picture(60, 40).convert("1"), "PNG"), "Жук/a.webp": encoded(picture(60, 40), "WEBP"),
    }  # fmt: skip
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_stats_of_a_packed_set_are_those_of_its_pictures(small_shards: Path) -> None:
    found = json.loads(run("stats", small_shards, "--json"))["splits"]
    assert list(found) == ["test", "train"]
    train = found["train"]
    assert (train["samples"], train["looked_at"], train["shards"], train["unreadable"]) == (37, 37, 4, 0)
    assert (train["formats"], train["modes"]) == ({"JPEG": 37}, {"RGB, 8 bits": 37})
    assert train["spread"]["width"][::4] == [40, 59]
    assert train["spread"]["ratio"] == [1.0] * 5
    assert train["labels"] == {"labelled": 37, "unlabelled": 0, "classes": {"a": 13, "b": 12, "c": 12}}
    manifest = read_manifest(small_shards)
    assert train["mean"] == list(manifest.splits["train"].mean or ())
    assert train["measured_on"] == 0
    text = run("stats", small_shards, "--split", "train")
    assert "train: 37 pictures in 4 shards" in text
    assert "labels      37 in 3 classes, none missing" in text
    assert "test" not in text


def test_mean_and_std_are_measured_where_the_manifest_has_none(small_shards: Path, tmp_path: Path) -> None:
    for file in small_shards.iterdir():
        (tmp_path / file.name).symlink_to(file)
    manifest = read_manifest(small_shards)
    split = manifest.splits["train"]
    without = Split(**{**split.__dict__, "mean": None, "std": None})
    (tmp_path / "manifest.json").unlink()
    write_manifest(tmp_path, Manifest({"train": without}, manifest.classes))
    found = json.loads(run("stats", tmp_path, "--json"))["splits"]["train"]
    assert found["measured_on"] == 37
    assert found["mean"] == pytest.approx(split.mean, abs=1e-5)
    assert found["std"] == pytest.approx(split.std, abs=1e-5)


def test_stats_of_a_folder_say_formats_depths_and_what_cannot_be_read(mixed_folder: Path) -> None:
    found = json.loads(run("stats", mixed_folder, "--json"))["splits"]["train"]
    assert (found["samples"], found["unreadable"]) == (6, 1)
    assert found["formats"] == {"JPEG": 2, "PNG": 2, "WEBP": 1}
    assert found["modes"] == {"RGB, 8 bits": 3, "I;16, 16 bits": 1, "1, 1 bit": 1}
    assert found["labels"]["classes"] == {"Größe": 3, "Жук": 3}
    text = run("stats", mixed_folder)
    assert "unreadable  1" in text
    assert "(measured on 5 pictures)" in text


def test_fewer_headers_are_read_when_asked_for_and_the_draw_is_the_seeds(small_shards: Path) -> None:
    few = json.loads(run("stats", small_shards, "--split", "train", "--samples", 5, "--json"))["splits"]["train"]
    assert (few["samples"], few["looked_at"], sum(few["formats"].values())) == (37, 5, 5)
    assert few["labels"]["labelled"] == 37, "labels and bytes are known of all"
    again, other = (run("stats", small_shards, "--samples", 5, "--seed", seed) for seed in (0, 1))
    assert again == run("stats", small_shards, "--samples", 5)
    assert again != other
    assert "headers of 5 pictures, drawn at random" in again


def test_a_header_says_what_is_stored_and_how_it_is_seen() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    assert read_header(encoded(picture(60, 40), exif=turned)) == Header("JPEG", "RGB", 8, 40, 60)
    assert read_header(encoded(picture(60, 40), "TIFF", exif=turned)) == Header("TIFF", "RGB", 8, 40, 60)
    assert read_header(encoded(picture(60, 40).convert("CMYK"))) == Header("JPEG", "CMYK", 8, 60, 40)
    assert read_header(b"P5 4 1 65535\n") == Header("PPM", "I", 16, 4, 1)


def test_a_header_that_is_longer_than_the_first_look_is_read_whole(tmp_path: Path) -> None:
    note = b"\xff\xfe\xff\xff" + bytes(65533)
    data = encoded(picture(60, 40))
    (tmp_path / "a.jpg").write_bytes(data[:2] + note * 3 + data[2:])
    found = json.loads(run("stats", tmp_path, "--json"))["splits"]["train"]
    assert (found["unreadable"], found["spread"]["width"][0]) == (0, 60)


def test_show_writes_a_sheet_with_the_pictures_on_it(small_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "sheet.png"
    said = run("show", small_shards, "--split", "train", "--samples", 6, "--columns", 3, "--out", out)
    assert f"wrote a sheet of 6 pictures: {out}" in said
    with Image.open(out) as sheet:
        assert sheet.width < 4 * (SIDE + 30)
        pixels = np.asarray(sheet)
    again = tmp_path / "again.png"
    run("show", small_shards, "--split", "train", "--samples", 6, "--columns", 3, "--out", again)
    assert out.read_bytes() == again.read_bytes()
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 1000, "there are pictures on it"


def test_show_draws_one_class_or_a_row_for_each(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    seen: list[tuple[str, list[tuple[str, list[Tile]]]]] = []

    def watch(title: str, rows: list[tuple[str, list[Tile]]], *, columns: int) -> Image.Image:
        seen.append((title, rows))
        return draw_sheet(title, rows, columns=columns)

    monkeypatch.setattr(contact_sheet, "draw_sheet", watch)
    run("show", small_shards, "--split", "train", "--label", "b", "--out", tmp_path / "b.png")
    run("show", small_shards, "--split", "train", "--by-class", "--columns", 5, "--out", tmp_path / "c.png")
    run("show", small_shards, "--samples", 3, "--out", tmp_path / "d.png")
    (title, one), (_, each), (_, splits) = seen
    assert title.endswith("split train: 12 of 37 pictures")
    assert [(heading, {tile.caption for tile in tiles}, len(tiles)) for heading, tiles in one] == [("b", {"b"}, 12)]
    assert all(tile.note.startswith("b/picture ") for _, tiles in one for tile in tiles)
    assert [(heading, len(tiles)) for heading, tiles in each] == [("a (13)", 5), ("b (12)", 5), ("c (12)", 5)]
    assert [(heading, len(tiles)) for heading, tiles in splits] == [("test", 3), ("train", 3)]


def test_what_cannot_be_read_has_its_reason_on_the_sheet(
    mixed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    written: list[str] = []
    write = contact_sheet._write

    def watch(pen: object, place: object, text: str, *arguments: object, **options: object) -> None:
        written.append(text)
        write(pen, place, text, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(contact_sheet, "_write", watch)
    run("show", mixed_folder, "--out", tmp_path / "sheet.png")
    assert "it is a web page (HTML)" in " ".join(written)
    assert {"Größe", "Жук", "Größe/page.jpg"} <= set(written)


def test_letters_of_other_alphabets_are_drawn_and_not_boxes() -> None:
    def drawn(text: str) -> bytes:
        out = io.BytesIO()
        draw_sheet(text, [], columns=2).save(out, "PNG")
        return out.getvalue()

    assert len({drawn(text) for text in ("Жук", "Ель", "Größe", "ñandú", "γάτα", "قطة", "\U0010fff0" * 3)}) == 7


@pytest.mark.parametrize("size", [(1, 1), (3000, 5), (5, 3000)])
def test_a_picture_of_any_shape_stays_within_its_square(size: tuple[int, int]) -> None:
    tile = Tile(np.zeros((size[1], size[0], 3), np.uint8), "a" * 500, "b/" * 500)
    sheet = np.asarray(draw_sheet("", [("", [tile, tile])], columns=2))
    assert (sheet[:, -20:] == 255).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stats", "nowhere"], "nowhere does not exist"),
        (["stats", "SET", "--split", "tran"], "did you mean train"),
        (["stats", "SET", "--samples", "-1"], "--samples is -1, it must be 0 or more"),
        (["show", "SET", "--columns", "0"], r"--columns is 0, it must lie in \[1, 40\]"),
        (["show", "SET", "--out", "sheet.jpg"], "must end in .png"),
        (["show", "SET", "--label", "d"], "--label is 'd', which is no class of this set"),
        (["show", "PLAIN", "--by-class"], "need labels, and these pictures have none"),
        (["show", "PLAIN", "--split", "val"], "--split is 'val'"),
    ],
)
def test_bad_input_gets_a_sentence(
    arguments: list[str], message: str, small_shards: Path, tmp_path: Path, picture_folder: Path
) -> None:  # fmt: skip
    (tmp_path / "a.jpg").write_bytes(encoded(picture()))
    places = {"SET": str(small_shards), "PLAIN": str(tmp_path)}
    with pytest.raises(BadInput, match=message):
        run(*(places.get(argument, argument) for argument in arguments))


def test_no_memory_is_taken_for_what_a_header_promises_or_for_a_huge_file(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    webp = bytearray(encoded(picture(60, 40), "WEBP", exif=turned))
    assert webp[12:16] == b"VP8X"
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    with pytest.raises(DecodeError, match=r"16383 x 16383 pixels, more than"):
        read_header(bytes(webp))
    (tmp_path / "good.jpg").write_bytes(encoded(picture(60, 40)))
    with open(tmp_path / "huge.jpg", "wb") as file:
        file.truncate(5 << 30)
    said = run("stats", tmp_path)
    assert "unreadable  1" in said
    assert "5.4 GB" in said


def test_an_index_is_looked_at_with_the_folder_of_its_tars(tmp_path: Path) -> None:
    file = sound(tmp_path / "tars" / "a.tar", range(3))
    index_tars({"train": [file]}, tmp_path / "index", IndexOptions(), classes=("a", "b", "c"), workers=1)
    assert "JPEG 3" in run("stats", tmp_path / "index", "--shards-at", tmp_path / "tars")
    run("show", tmp_path / "index", "--shards-at", tmp_path / "tars", "--out", tmp_path / "a.png")
    with pytest.raises(BadInput, match="--shards-at is for a set"):
        run("stats", file, "--shards-at", tmp_path / "tars")


def test_names_of_classes_steer_no_terminal(tmp_path: Path) -> None:
    for name in ("a\x1b[2Jb", "c\nd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(encoded(picture(60, 40)))
    said = run("stats", tmp_path)
    assert "\x1b" not in said
    assert "a\\x1b[2Jb" in said
    assert "c\\nd" in said
