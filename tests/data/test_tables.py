"""Lists, JSON lines and CSVs: which cells are paths and labels, and what becomes of the other columns."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from foreseen.data.extra_columns import choose_extra, parse_keep, type_texts, type_values
from foreseen.data.open_source import SourceOptions, open_source
from foreseen.data.pack import pack
from foreseen.data.source import Missing, Splits
from foreseen.data.table import Columns
from foreseen.data.table_files import read_table
from foreseen.errors import BadInput


@pytest.fixture
def folder(picture_folder: Path, tmp_path: Path) -> Path:
    """A folder with `a 1.jpg`, `a 2.jpg`, `b.jpg`."""
    for name, source in zip(("a 1.jpg", "a 2.jpg", "b.jpg"), sorted(picture_folder.rglob("*.jpg")), strict=False):
        (tmp_path / name).write_bytes(source.read_bytes())
    return tmp_path


def read(file: Path, content: str | bytes, **options: Any) -> Splits:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return open_source(str(file), SourceOptions(**options)).read()


def names_and_labels(found: Splits) -> dict[str, int | None]:
    return {sample.name: sample.label for sample in found.splits["train"]}


def lines(*objects: object) -> str:
    return "".join(f"{json.dumps(found)}\n" for found in objects)


def metas(found: Splits, split: str = "train") -> list[dict[str, Any]]:
    return [dict(sample.meta) for sample in found.splits[split]]


# Lists


def test_a_list_names_a_path_a_line_with_spaces_comments_and_blank_lines(folder: Path) -> None:
    text = f"\ufeff# my pictures\r\n\r\na 1.jpg\r\n  {folder}/b.jpg  \r\n"
    found = read(folder / "list.txt", text)
    assert names_and_labels(found) == {"a 1.jpg": None, f"{folder}/b.jpg": None}
    assert (found.classes, found.are_named) == (None, False)
    assert found.splits["train"][0].image.read() == (folder / "a 1.jpg").read_bytes()


def test_labels_of_a_list_stand_behind_a_tab_or_as_numbers_behind_the_path(folder: Path) -> None:
    found = read(folder / "list.lst", "a 1.jpg\tlong haired cat\nb.jpg\tdog\na 2.jpg\n")
    assert found.classes == ("dog", "long haired cat")
    assert names_and_labels(found) == {"a 1.jpg": 1, "b.jpg": 0, "a 2.jpg": None}
    found = read(folder / "list.txt", "a 1.jpg 10\na 2.jpg   9\nb.jpg -1\n")
    assert found.classes == ("9", "10")
    assert names_and_labels(found) == {"a 1.jpg": 1, "a 2.jpg": 0, "b.jpg": None}
    assert read(folder / "list.txt", "a 1.jpg 10\n", labels="none").classes is None


def test_files_of_a_list_that_are_not_there_are_named_by_their_line(folder: Path) -> None:
    found = read(folder / "list.txt", "# head\nb.jpg\ngone.jpg\n" + str(folder) + "\n")
    reasons = [sample.image.reason for sample in found.splits["train"] if isinstance(sample.image, Missing)]
    assert reasons == [
        "line 3 of list.txt names no file that is there: gone.jpg", f"line 4 of list.txt names a folder: {folder}"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "lists no pictures: it needs one path on each line"),
        ("# only this\n\n", "lists no pictures"),
        ("a\tb\tc\n", "line 1 of .* has 3 parts between tabs: .* what has more columns is a .csv with a head"),
        ("a.jpg\n".encode("utf-16"), "is not UTF-8 text, UTF-16 it seems: save it in UTF-8"),
        ("a.jpg\n".encode("utf-16-le"), "is not UTF-8 text, UTF-16 it seems"),
        (b"a.jpg\n" * 20000 + b"Z\xfcrich.jpg\n", r"is not UTF-8 text \(line 20001\): save it in UTF-8"),
        ("a.jpg 3\nb.jpg\tcat\n", r"mixes numbers \(line 1: '3'\) and names \(line 2: 'cat'\)"),
        (".\n./.\n", r"lists folders, such as \.: give the folder itself as the source"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused_with_a_sentence(
    content: str | bytes, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=sentence):
        read(tmp_path / "list.txt", content)


# JSON lines


def test_json_lines_have_the_columns_of_a_csv_and_may_lack_some(folder: Path) -> None:
    text = "\ufeff" + lines(
        {"file_name": "a 1.jpg", "label": 10, "split": "train"}, {"file_name": "a 2.jpg", "split": "train"}
    )
    text += "\n" + lines({"split": "val", "label": 9, "file_name": "b.jpg"}, {"split": "train", "label": 9})
    found = read(folder / "list.ndjson", text)
    assert (found.classes, found.are_named, list(found.splits)) == (("9", "10"), True, ["train", "val"])
    assert names_and_labels(found) == {"a 1.jpg": 1, "a 2.jpg": None, "line 5": 0}
    image = found.splits["train"][2].image
    assert isinstance(image, Missing)
    assert image.reason == "line 5 of list.ndjson names no file"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("\n", "holds no objects: it needs one for each picture"),
        ('{"path": "a.jpg"}\n["a.jpg"]\n', r'line 2 of .* is no JSON object: each line needs one, such as \{"path"'),
        ('{"path": "a.jpg"}\n{"path"}\n', r"line 2 of .* is no JSON \(Expecting ':' delimiter at character 8\): each"),
        ('{"path": "a.jpg", "path": "b.jpg"}\n', "line 1 of .* cannot be used: it has 'path' twice"),
        ("[" * 100_000, "line 1 of .* cannot be used: maximum recursion depth"),
        ('{"path": 3}\n', "line 1 of .* has the image 3, it must be a path: change it, or .* by --image-column"),
        ('{"path": "a", "split": null}\n', "line 1 of .* has the split ''"),
        ('{"url": "http://a"}\n', "has no column of the pictures' paths, it has url"),
        ("".join(f'{{"path": "a", "{n}": 0}}\n' for n in range(1001)), "has more than 1,000 names in its objects"),
    ],
)
def test_json_lines_that_make_no_sense_are_refused_with_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        read(tmp_path / "list.jsonl", text)


def test_lists_of_labels_are_no_labels(folder: Path) -> None:
    text = lines({"path": "b.jpg", "labels": ["x", "y"]}, {"path": "a 1.jpg", "labels": []})
    found = read(folder / "list.jsonl", text, keep=None)
    assert (found.classes, metas(found)) == (None, [{"labels": ["x", "y"]}, {"labels": []}])
    assert found.notes[0].endswith("list.jsonl holds lists or objects: no labels are taken from it")
    with pytest.raises(BadInput, match=r'line 1 of .* has the label \["x", "y"\], it must be text or a number'):
        read(folder / "list.jsonl", text, columns=Columns(label="labels"))


def test_blank_rows_do_not_shift_the_numbers_of_rows(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="row 4 of .* has the split ''"):
        read(tmp_path / "list.csv", "path,split\na,train\n,\nb,\n")


# Further columns


def test_further_columns_of_a_csv_are_kept_with_their_types(folder: Path) -> None:
    text = (
        "path,label,width,age,weight,zip,when,site,\n"
        "a 1.jpg,x,640,3,1.5,01234,2024-01-02,,0\n"
        "b.jpg,y,800,,2,00001,2024-01-03,,1\n"
    )
    found = read(folder / "list.csv", text, keep=None)
    assert metas(found) == [
        {"source_width": 640, "age": 3, "weight": 1.5, "zip": "01234", "when": "2024-01-02", "site": None},
        {"source_width": 800, "age": None, "weight": 2.0, "zip": "00001", "when": "2024-01-03", "site": None},
    ]
    assert isinstance(metas(found)[1]["weight"], float)
    pack(found.splits["train"], folder / "set", "train", classes=found.classes, workers=1)
    with tarfile.open(folder / "set" / "train-000000.tar") as tar:
        facts = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith("json")]  # type: ignore[arg-type]
    (fact,) = (fact for fact in facts if fact["path"] == "b.jpg")
    assert (fact["source_width"], fact["age"], fact["zip"], fact["label"]) == (800, None, "00001", 1)
    assert fact["width"] != 800
    assert {tuple(fact) for fact in facts} == {tuple(fact)}


def test_further_columns_are_chosen_and_none_are_kept_where_nobody_asks(folder: Path) -> None:
    text = lines({"path": "b.jpg", "breed": "x", "age": 3, "box": {"corner": [1, 2.5], "by": None}})
    assert metas(read(folder / "list.jsonl", text)) == [{}]
    every = {"age": 3, "box": {"corner": [1, 2.5], "by": None}}
    assert metas(read(folder / "list.jsonl", text, keep=None)) == [every]
    assert metas(read(folder / "list.jsonl", text, keep=("breed", "age"))) == [{"breed": "x", "age": 3}]
    with pytest.raises(BadInput, match=r"has no column 'agee' to keep; did you mean age\? \(--keep-columns\)"):
        read(folder / "list.jsonl", text, keep=("agee",))


def test_every_json_line_gives_the_same_names(folder: Path) -> None:
    text = lines({"path": "b.jpg", "age": 3}, {"path": "a 1.jpg", "sex": "f"})
    assert metas(read(folder / "list.jsonl", text, keep=None)) == [{"age": 3, "sex": None}, {"age": None, "sex": "f"}]


def test_numbers_that_there_are_not_are_null_in_json(folder: Path) -> None:
    text = '{"path": "b.jpg", "x": NaN, "y": [1e999, -Infinity], "z": 1e3}\n'
    assert metas(read(folder / "list.jsonl", text, keep=None)) == [{"x": None, "y": [None, None], "z": 1000.0}]


@pytest.mark.parametrize(
    ("texts", "typed"),
    [
        (["1", "-2", ""], [1, -2, None]),
        (["1", "2.5"], [1.0, 2.5]),
        (["1e3", "-0.5"], [1000.0, -0.5]),
        (["007", "8"], ["007", "8"]),
        (["1", "nan"], ["1", "nan"]),
        (["1e999", "2"], ["1e999", "2"]),
        (["", ""], [None, None]),
        ([str(2**63 - 1), str(-(2**63))], [2**63 - 1, -(2**63)]),
        ([str(2**63), "1"], [str(2**63), "1"]),
        ([str(2**53 + 1), "1.5"], [str(2**53 + 1), "1.5"]),
        (["3000000000"], [3000000000]),
        (["1٣"], ["1٣"]),
    ],
)
def test_cells_are_numbers_where_the_whole_column_is(texts: list[str], typed: list[object]) -> None:
    assert type_texts(texts) == typed
    assert [type(value) for value in type_texts(texts)] == [type(value) for value in typed]


@pytest.mark.parametrize(
    ("values", "typed"),
    [
        ([1, 2.5, None], [1.0, 2.5, None]),
        ([1, "x", True, None], ["1", "x", "true", None]),
        ([True, False], [True, False]),
        ([2**63, 1], [str(2**63), "1"]),
        ([[1], {"a": 2}, 3], [[1], {"a": 2}, 3]),
    ],
)
def test_json_scalars_of_a_column_become_of_one_type(values: list[object], typed: list[object]) -> None:
    assert type_values(values) == typed
    assert [type(value) for value in type_values(values)] == [type(value) for value in typed]


def test_what_keep_columns_says() -> None:
    assert parse_keep("all") is None
    assert parse_keep("none") == ()
    assert parse_keep("a, b,,a") == ("a", "b")
    assert choose_extra(["path", "label", "x"], ("path",), None, "it") == {"label": "source_label", "x": "x"}
    with pytest.raises(BadInput, match="two columns that would be kept as 'source_width'"):
        choose_extra(["width", "source_width"], (), None, "it")


def test_a_head_of_a_million_cells_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path" + "," * 900_000 + "\na.jpg\n")
    with pytest.raises(BadInput, match="has 900,001 columns, more than 1,000"):
        read_table(tmp_path / "a.csv")
    names = ", ".join(f'"{number}": 0' for number in [*range(60_000), 59_999])
    (tmp_path / "a.jsonl").write_text(f"{{{names}}}\n")
    with pytest.raises(BadInput, match="it has '59999' twice"):
        read_table(tmp_path / "a.jsonl")
