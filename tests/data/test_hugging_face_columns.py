"""Hugging Face sets as people make them: further columns, splits in a column, bare bytes, several configurations."""

import datetime
import gc
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from foreseen.data.open_source import SourceOptions, open_source
from foreseen.data.pack import pack
from foreseen.data.source import Missing, Splits
from foreseen.data.table import Columns
from foreseen.errors import BadInput


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


@pytest.fixture
def pictures(picture_folder: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(picture_folder.rglob("*.jpg"))[:4]]


def rows(pictures: list[bytes], feature: Any = None, **columns: tuple[Any, list[Any]]) -> "datasets.Dataset":
    """A set of pictures, with further columns by (feature, values)."""
    images = [{"bytes": data, "path": f"{number}.jpg"} for number, data in enumerate(pictures)]
    features = {"image": feature or datasets.Image(), **{name: kind for name, (kind, _) in columns.items()}}
    values = {"image": images, **{name: cells for name, (_, cells) in columns.items()}}
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def read(place: Path, columns: Columns | None = None, **options: Any) -> Splits:
    return open_source(f"hf:{place}", SourceOptions(columns=columns or Columns(), **options)).read()


def metas(found: Splits, split: str = "train") -> list[dict[str, Any]]:
    return [dict(sample.meta) for sample in found.splits[split]]


def labels(found: Splits) -> dict[str, list[int | None]]:
    return {split: [sample.label for sample in samples] for split, samples in found.splits.items()}


def test_further_columns_are_kept_as_json_has_them(pictures: list[bytes], tmp_path: Path) -> None:
    many = rows(
        pictures,
        label=(datasets.Value("string"), ["x", "y", "x", "y"]),
        width=(datasets.Value("int64"), [10, None, 3, 4]),
        score=(datasets.Value("float32"), [0.5, float("nan"), None, 2.0]),
        sex=(datasets.ClassLabel(names=["female", "male"]), [1, 0, None, -1]),
        when=(datasets.Value("timestamp[s]"), [datetime.datetime(2024, 1, 2), None, None, None]),
        boxes=(datasets.List(datasets.List(datasets.Value("float32"))), [[[1.5, 2]], [], None, [[0, 0]]]),
        who=({"name": datasets.Value("string"), "age": datasets.Value("int8")}, [{"name": "a", "age": 1}] * 4),
        raw=(datasets.Value("binary"), [b"1"] * 4),
        second=(datasets.Image(), [{"bytes": pictures[0], "path": None}] * 4),
    )
    many.to_parquet(str(tmp_path / "many.parquet"))
    columns = Columns(image="image", label="label")
    found = read(tmp_path / "many.parquet", columns, keep=None)
    who = {"name": "a", "age": 1}
    new_year = "2024-01-02T00:00:00"
    assert metas(found) == [
        {"source_width": 10, "score": 0.5, "sex": "male", "when": new_year, "boxes": [[1.5, 2]], "who": who},
        {"source_width": None, "score": None, "sex": "female", "when": None, "boxes": [], "who": who},
        {"source_width": 3, "score": None, "sex": None, "when": None, "boxes": None, "who": who},
        {"source_width": 4, "score": 2.0, "sex": None, "when": None, "boxes": [[0, 0]], "who": who},
    ]  # fmt: skip
    assert found.notes == ("columns that hold bytes or pictures are not kept in KEY.json: raw, second",)
    assert metas(read(tmp_path / "many.parquet", columns)) == [{}] * 4
    assert metas(read(tmp_path / "many.parquet", columns, keep=("label",)))[0] == {"source_label": "x"}
    with pytest.raises(BadInput, match="column 'raw' of .* holds bytes or pictures"):
        read(tmp_path / "many.parquet", columns, keep=("raw",))
    summary = pack(found.splits["train"], tmp_path / "set", "train", classes=found.classes, workers=2, shard_samples=2)
    assert summary.samples == 4
    facts = []
    for file in sorted((tmp_path / "set").glob("*.tar")):
        with tarfile.open(file) as tar:
            facts += [json.load(tar.extractfile(member)) for member in tar if member.name.endswith("json")]  # type: ignore[arg-type]
    assert {fact["source_width"] for fact in facts} == {10, None, 3, 4}


def test_a_column_divides_a_set_into_splits_where_it_is_asked_to(pictures: list[bytes], tmp_path: Path) -> None:
    both = rows(
        pictures,
        label=(datasets.ClassLabel(names=["x", "y"]), [0, 1, 1, 0]),
        part=(datasets.ClassLabel(names=["train", "val"]), [0, 1, 0, 1]),
    )
    both.save_to_disk(str(tmp_path / "saved"))
    assert list(read(tmp_path / "saved", Columns(label="label")).splits) == ["train"]
    found = read(tmp_path / "saved", Columns(split="part"), keep=None)
    assert (labels(found), found.are_named) == ({"train": [0, 1], "val": [1, 0]}, True)
    assert found.splits["val"][0].image.read() == pictures[1]
    assert metas(found) == [{}, {}]
    with pytest.raises(BadInput, match=r"has no column 'parts', it has image, label, part: change --split-column"):
        read(tmp_path / "saved", Columns(label="label", split="parts"))
    datasets.DatasetDict({"train": both, "test": both}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(BadInput, match="has the splits train, test, and --split-column .* is for a set with one"):
        read(tmp_path / "two", Columns(split="part"))
    rows(pictures, part=(datasets.Value("string"), ["a", "b", None, "a"])).save_to_disk(str(tmp_path / "hole"))
    with pytest.raises(BadInput, match="row 2 of .* has the split ''"):
        read(tmp_path / "hole", Columns(split="part"))


@pytest.mark.parametrize("form", ["undecoded", "struct", "bytes", "paths"])
def test_pictures_may_be_undecoded_structs_bytes_or_paths(form: str, pictures: list[bytes], tmp_path: Path) -> None:
    for number, data in enumerate(pictures):
        (tmp_path / f"{number}.jpg").write_bytes(data)
    if form == "undecoded":
        made = rows(pictures, datasets.Image(decode=False))
    elif form == "struct":
        made = rows(pictures, {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
    elif form == "bytes":
        made = datasets.Dataset.from_dict({"image": pictures})
    else:
        made = datasets.Dataset.from_dict({"file_name": [f"{number}.jpg" for number in range(4)]})
    made.to_parquet(str(tmp_path / "set.parquet"))
    found = read(tmp_path / "set.parquet")
    assert [sample.image.read() for sample in found.splits["train"]] == pictures


def test_shards_of_parquet_are_joined_to_the_splits_of_their_names(pictures: list[bytes], tmp_path: Path) -> None:
    for name, part in (("train-00000-of-00002", slice(0, 2)), ("train-00001-of-00002", slice(2, 3)),
                       ("test-00000-of-00001", slice(3, 4))):  # fmt: skip
        (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
        rows(pictures[part]).to_parquet(str(tmp_path / "set" / "data" / f"{name}.parquet"))
    found = read(tmp_path / "set")
    assert {split: len(samples) for split, samples in found.splits.items()} == {"train": 3, "test": 1}
    assert [sample.image.read() for sample in found.splits["train"]] == pictures[:3]


def test_splits_keep_their_own_columns_and_lack_none_that_is_asked_for(pictures: list[bytes], tmp_path: Path) -> None:
    splits = {
        "train": rows(pictures, age=(datasets.Value("int64"), [1, 2, 3, 4])),
        "test": rows(pictures[:1]),
    }
    for name, part in splits.items():
        part.save_to_disk(str(tmp_path / "saved" / name))
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": [*splits]}))
    found = read(tmp_path / "saved", keep=None)
    assert [metas(found)[1], *metas(found, "test")] == [{"age": 2}, {"age": None}]


def test_a_url_in_a_local_set_is_not_followed(pictures: list[bytes], tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"image": ["https://example.org/a.jpg", "hf://datasets/a/b/c.jpg"]})
    made.to_parquet(str(tmp_path / "set.parquet"))
    images = [sample.image for sample in read(tmp_path / "set.parquet").splits["train"]]
    assert all(isinstance(image, Missing) for image in images)


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"
)  # an open metadata.csv
def test_an_address_in_the_metadata_of_an_imagefolder_is_not_followed_but_named(
    pictures: list[bytes], tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jpg").write_bytes(pictures[0])
    metadata = tmp_path / "set" / "metadata.csv"
    metadata.write_text("file_name,text\na.jpg,hello\n")
    assert metas(read(tmp_path / "set", keep=None)) == [{"text": "hello"}]
    metadata.write_text("file_name,text\na.jpg,hello\nhttps://example.org/b.jpg,x\n")
    with pytest.raises(BadInput, match=r"set cannot be loaded: .*https://example\.org/b\.jpg"):
        read(tmp_path / "set", keep=None)
    gc.collect()


def test_a_set_with_several_configurations_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.csv\n" for name in ("cats", "dogs"))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for name in ("cats", "dogs"):
        (tmp_path / f"{name}.csv").write_text("a\n1\n")
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: load(str(tmp_path), config))
    with pytest.raises(
        BadInput, match=r"hf:some/pets has the configurations cats, dogs: choose by --hf-config \(data\.hf_config"
    ):
        open_source("hf:some/pets", SourceOptions()).read()


def test_lists_of_labels_are_no_labels(pictures: list[bytes], tmp_path: Path) -> None:
    many = datasets.List(datasets.ClassLabel(names=["x", "y"]))
    rows(pictures, labels=(many, [[0], [0, 1], [], [1]])).to_parquet(str(tmp_path / "set.parquet"))
    found = read(tmp_path / "set.parquet", keep=None)
    assert found.classes is None
    assert metas(found)[1] == {"labels": [0, 1]}
    assert found.notes[0].endswith("set.parquet holds lists or objects: no labels are taken from it")
    with pytest.raises(BadInput, match="column 'labels' of .* holds lists or objects: choose one"):
        read(tmp_path / "set.parquet", Columns(label="labels"))
