"""Sources: what folders, CSVs and Hugging Face sets are read as, and the sentences where they cannot be."""

import csv
import os
import shutil
import socket
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest

from foreseen.data.hugging_face import HuggingFaceSource
from foreseen.data.open_source import SourceOptions, is_packed, open_source
from foreseen.data.pack import pack
from foreseen.data.source import Missing, Splits
from foreseen.data.table import Columns, TableSource
from foreseen.errors import BadInput


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may use the network, nor the user's cache."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network is used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")


def read(src: Path | str, **options: object) -> Splits:
    return open_source(str(src), SourceOptions(**options)).read()  # type: ignore[arg-type]


def facts(found: Splits) -> dict[str, dict[str, int | None]]:
    return {split: {sample.name: sample.label for sample in samples} for split, samples in found.splits.items()}


def copy_splits(pictures: Path, root: Path, *splits: str) -> Path:
    for split in splits:
        shutil.copytree(pictures, root / split)
    return root


def write_csv(file: Path, rows: list[list[object]], **options: object) -> Path:
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out, **options).writerows(rows)  # type: ignore[call-overload]
    return file


def table(folder: Path, pictures: Path, head: tuple[str, ...] = ("path", "breed")) -> Path:
    """A CSV of all pictures by their absolute paths."""
    names = sorted(pictures.rglob("*.jpg"))
    return write_csv(folder / "list.csv", [list(head), *([name, name.parent.name] for name in names)])


# Folders


def test_class_folders_are_labels_and_one_split_called_train(picture_folder: Path) -> None:
    found = read(picture_folder)
    assert (found.classes, found.are_named, list(found.splits)) == (("a", "b", "c"), False, ["train"])
    labels = facts(found)["train"]
    assert len(labels) == 37
    assert labels["b/picture 1.jpg"] == 1


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test"])
def test_split_folders_are_splits_with_the_classes_of_train(
    held_out: str, picture_folder: Path, tmp_path: Path
) -> None:
    copy_splits(picture_folder, tmp_path, "train", held_out)
    shutil.rmtree(tmp_path / held_out / "a")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "list.txt").touch()
    found = read(tmp_path)
    assert (found.classes, found.are_named, list(found.splits)) == (("a", "b", "c"), True, ["train", held_out])
    assert set(facts(found)[held_out].values()) == {1, 2}


def test_a_class_called_train_is_no_split_but_two_of_them_beside_others_are_refused(
    picture_folder: Path, tmp_path: Path
) -> None:
    copy_splits(picture_folder / "a", tmp_path, "train", "plane")
    assert read(tmp_path).classes == ("plane", "train")
    copy_splits(picture_folder / "a", tmp_path, "test")
    with pytest.raises(BadInput, match="has the splits test, train and other pictures beside them, such as in 'plane'"):
        read(tmp_path)


def test_pictures_outside_class_folders_are_unlabelled(picture_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(picture_folder, tmp_path / "set")
    shutil.copy(picture_folder / "a" / "picture 0.jpg", tmp_path / "set")
    assert read(tmp_path / "set").classes is None
    with pytest.raises(BadInput, match="lies in no class folder"):
        read(tmp_path / "set", labels="folder")


def test_a_class_that_train_does_not_have_is_refused(picture_folder: Path, tmp_path: Path) -> None:
    copy_splits(picture_folder, tmp_path, "train", "test")
    (tmp_path / "test" / "a").rename(tmp_path / "test" / "zebra")
    with pytest.raises(BadInput, match="has a class 'zebra' that the set does not have: a, b, c"):
        read(tmp_path)


def test_folders_without_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(BadInput, match="holds 1 files, none of them pictures"):
        read(tmp_path)
    with pytest.raises(BadInput, match="nowhere does not exist"):
        read(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"is a file of no kind that is read: give a folder of pictures, tars, a \.csv"):
        read((tmp_path / "notes.txt").rename(tmp_path / "notes.doc"))


def test_a_folder_of_shards_is_told_from_a_folder_of_pictures(small_shards: Path, picture_folder: Path) -> None:
    assert is_packed(str(small_shards))
    assert not is_packed(str(picture_folder))


def test_links_to_themselves_or_nowhere_are_passed_over(picture_folder: Path, tmp_path: Path) -> None:
    root = shutil.copytree(picture_folder, tmp_path / "set")
    (root / "a" / "itself.jpg").symlink_to("itself.jpg")
    (root / "itself").symlink_to("itself")
    (root / "a" / "nowhere.jpg").symlink_to("gone.jpg")
    (root / "a" / "above").symlink_to(root)
    assert len(read(root).splits["train"]) == 37
    assert not is_packed(str(root / "itself"))


def test_a_folder_that_may_not_be_read_is_a_sentence(picture_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: object) -> None:
        raise PermissionError(13, "Permission denied", str(place))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(BadInput, match="may not be read: change its permissions"):
        read(picture_folder)


# CSV


def test_a_csv_gives_labels_by_name(picture_folder: Path, tmp_path: Path) -> None:
    found = read(table(tmp_path, picture_folder))
    assert (found.classes, found.are_named) == (("a", "b", "c"), False)
    assert sorted(facts(found)["train"].values()) == [0] * 13 + [1] * 12 + [2] * 12  # type: ignore[type-var]


def test_paths_are_relative_to_the_csv_and_splits_may_be_a_column(picture_folder: Path) -> None:
    folder = shutil.copytree(picture_folder, picture_folder.parent / "beside")
    rows = [[f"a/picture {n}.jpg", n, "train" if n else "test"] for n in (0, 3, 6)]
    file = write_csv(folder / "list.csv", [["File Name", "label", "split"], *rows], delimiter=";")
    found = read(file)
    assert {split: list(samples) for split, samples in facts(found).items()} == {
        "test": ["a/picture 0.jpg"], "train": ["a/picture 3.jpg", "a/picture 6.jpg"]
    }  # fmt: skip
    assert found.classes == ("0", "3", "6")
    assert found.splits["train"][1].image.read() == (folder / "a" / "picture 6.jpg").read_bytes()
    only = found.choose("test")
    assert list(only) == ["test"]
    with pytest.raises(BadInput, match="--split is 'val', the source has test, train"):
        found.choose("val")
    shutil.rmtree(folder)


def test_numbers_keep_their_order_and_spreadsheets_decimals(picture_folder: Path, tmp_path: Path) -> None:
    names = sorted(picture_folder.rglob("*.jpg"))[:5]
    labels = ["10.0", "9.0", "", "-1", "9"]
    file = write_csv(tmp_path / "list.csv", [["image", "class"], *zip(names, labels, strict=True)])
    found = read(file)
    assert found.classes == ("9", "10")
    assert [sample.label for sample in found.splits["train"]] == [1, 0, None, None, 0]


def test_rows_without_a_file_are_packed_as_unreadable_and_named_by_row(picture_folder: Path, tmp_path: Path) -> None:
    good = picture_folder / "a" / "picture 0.jpg"
    rows = [[good, "x"], ["gone.jpg", "y"], ["", "x"], [tmp_path, "y"]]
    found = read(write_csv(tmp_path / "list.csv", [["path", "label"], *rows]))
    summary = pack(found.splits["train"], tmp_path / "set", "train", classes=found.classes, workers=1)
    assert summary.samples == 1
    assert dict(summary.unreadable) == {
        "gone.jpg": "row 3 of list.csv names no file that is there: gone.jpg",
        "row 4": "row 4 of list.csv names no file",
        str(tmp_path): f"row 5 of list.csv names a folder: {tmp_path}",
    }
    assert "row 3 of list.csv" in (tmp_path / "set" / "train.unreadable.txt").read_text()


def test_whole_numbers_of_any_length_stay_apart(picture_folder: Path, tmp_path: Path) -> None:
    name = picture_folder / "a" / "picture 0.jpg"
    labels = [2**53, 2**53 + 1, f"{2**70}.0", 7]
    found = read(write_csv(tmp_path / "list.csv", [["path", "label"], *([name, label] for label in labels)]))
    assert found.classes == ("7", str(2**53), str(2**53 + 1), str(2**70))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("name,label\na,b\n", "no column of the pictures' paths, it has name, label: choose by --image-column"),
        ("path,file\na,b\n", "several columns that may be the image, path, file: choose by --image-column"),
        ("path,path\na,b\n", "two columns 'path'"),
        ("path,label\n", "no rows below its head"),
        ("", "no rows below its head"),
        ("path,label\na,3\nb,cat\n", r"mixes numbers \(row 2: '3'\) and names \(row 3: 'cat'\)"),
        ("path,label\na,\nb,\n", "column 'label' of .* holds no label"),
        ("path,split\na,train\nb,\n", "row 3 of .* has the split ''"),
        ("path,label\na,b,c\n", "row 2 of .* has 3 cells and its head 2"),
        ('path,label\n"a,b\n', "cannot be read as CSV"),
    ],
)
def test_a_csv_that_makes_no_sense_is_refused_with_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "list.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=sentence):
        read(file)


def test_columns_are_chosen_by_name(picture_folder: Path, tmp_path: Path) -> None:
    file = table(tmp_path, picture_folder, ("where", "kind"))
    found = read(file, columns=Columns(image="where", label="kind"))
    assert found.classes == ("a", "b", "c")
    assert read(file, columns=Columns(image="where"), labels="none").classes is None
    with pytest.raises(BadInput, match=r"has no column 'breed', it has where, kind: change --label-column"):
        read(file, columns=Columns(image="where", label="breed"))


def test_a_csv_of_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path\nZürich.jpg\n".encode("latin-1"))
    with pytest.raises(BadInput, match="is not UTF-8"):
        TableSource(tmp_path / "list.csv", Columns()).read()


# Hugging Face


@pytest.fixture
def hugging_face(picture_folder: Path, tmp_path: Path) -> "datasets.DatasetDict":
    copy_splits(picture_folder, tmp_path / "pictures", "train", "val")
    found: datasets.DatasetDict = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pictures"), cache_dir=str(tmp_path / "made")
    )
    return found


def embedded(found: "datasets.DatasetDict") -> "datasets.DatasetDict":
    """The same with the pictures' bytes in the rows, as sets on the hub have them."""

    def fill(row: dict[str, dict[str, str]]) -> dict[str, dict[str, object]]:
        path = row["image"]["path"]
        return {"image": {"bytes": Path(path).read_bytes(), "path": Path(path).name}}

    filled: datasets.DatasetDict = found.cast_column("image", datasets.Image(decode=False)).map(fill)
    return filled.cast_column("image", datasets.Image())


@pytest.mark.parametrize("form", ["imagefolder", "parquet", "arrow", "save_to_disk", "one parquet"])
def test_local_hugging_face_sets_keep_bytes_labels_and_splits(
    form: str, hugging_face: "datasets.DatasetDict", picture_folder: Path, tmp_path: Path
) -> None:
    place, rows = tmp_path / form, hugging_face
    if form == "imagefolder":
        place = tmp_path / "pictures"
    elif form == "save_to_disk":
        rows.save_to_disk(str(place))  # it embeds the bytes
    elif form == "arrow":
        place.mkdir()
        for split, part in embedded(rows).items():
            part.save_to_disk(str(tmp_path / "saved" / split))
            shutil.copy(next((tmp_path / "saved" / split).glob("*.arrow")), place / f"{split}.arrow")
    else:
        place.mkdir()
        for split, part in embedded(rows).items():
            part.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))
        (place / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: https://example.org\n")
        place = place / "train-00000-of-00001.parquet" if form == "one parquet" else place
    source = HuggingFaceSource(str(place), Columns())
    found = source.read()
    assert found.classes == ("a", "b", "c")
    assert list(found.splits) == (["train"] if form == "one parquet" else ["train", "validation"])
    samples = found.splits["train"]
    assert len(samples) == 37
    originals = {file.read_bytes(): "abc".index(file.parent.name) for file in picture_folder.rglob("*.jpg")}
    assert {sample.image.read(): sample.label for sample in samples} == originals
    assert all(sample.name.endswith(".jpg") and sample.image.size == len(sample.image.read()) for sample in samples)
    summary = pack(samples, tmp_path / "set", "train", classes=found.classes, shard_samples=10, workers=2)
    assert (summary.samples, summary.converted, summary.unreadable) == (37, 0, [])
    assert source.digest() == HuggingFaceSource(str(place), Columns()).digest()


def test_columns_of_a_hugging_face_set_are_found_chosen_and_missed(
    hugging_face: "datasets.DatasetDict", tmp_path: Path
) -> None:
    rows = embedded(hugging_face)["train"]
    place = tmp_path / "two.parquet"
    more = datasets.concatenate_datasets([rows, rows.select_columns("image").rename_column("image", "image2")], axis=1)
    more.add_column("breed", ["x", "y", *["x"] * 35]).to_parquet(str(place))
    with pytest.raises(BadInput, match="hf:.*several columns that may be the image, image, image2"):
        read(f"hf:{place}")
    assert read(f"hf:{place}", columns=Columns(image="image2", label="breed")).classes == ("x", "y")
    rows.remove_columns("image").to_parquet(str(place))
    with pytest.raises(BadInput, match="has no column of pictures, it has label"):
        read(f"hf:{place}")


def test_each_split_of_a_hugging_face_set_is_read_by_its_own_class_names(
    hugging_face: "datasets.DatasetDict", tmp_path: Path
) -> None:
    rows = embedded(hugging_face)
    turned = datasets.ClassLabel(names=["c", "b", "a", "d"])
    other = rows["train"].map(lambda row: {"label": 2 - row["label"]}, features=datasets.Features(
        {"image": datasets.Image(), "label": turned}))  # fmt: skip
    datasets.DatasetDict({"test": other, "train": rows["train"]}).save_to_disk(str(tmp_path / "saved"))
    found = read(f"hf:{tmp_path / 'saved'}")
    assert found.classes == ("c", "b", "a", "d")
    labels = {split: [sample.label for sample in samples] for split, samples in found.splits.items()}
    assert labels["train"] == labels["test"]
    with pytest.raises(BadInput, match="has a class 'a' that the set does not have: b, c"):
        HuggingFaceSource(str(tmp_path / "saved"), Columns()).read(("b", "c"))


def test_columns_that_hold_no_pictures_or_are_missing_in_a_split_are_sentences(
    hugging_face: "datasets.DatasetDict", tmp_path: Path
) -> None:
    rows = embedded(hugging_face)
    place = tmp_path / "saved"
    rows["test"] = rows.pop("validation").remove_columns("label")
    rows.save_to_disk(str(place))
    with pytest.raises(BadInput, match="column 'label' of split 'train' of hf:.* holds no pictures: choose another by"):
        read(f"hf:{place}", columns=Columns(image="label"))
    found = read(f"hf:{place}")
    assert found.notes == (f"split 'test' of hf:{place} has no column 'label': no labels",)
    assert {sample.label for sample in found.splits["test"]} == {None}
    assert {sample.label for sample in found.splits["train"]} == {0, 1, 2}
    rows["test"] = rows["test"].rename_column("image", "picture")
    rows.save_to_disk(str(tmp_path / "more"))
    with pytest.raises(BadInput, match="split 'test' of hf:.* has no column 'image', it has picture"):
        read(f"hf:{tmp_path / 'more'}")


def test_a_row_never_names_a_file_outside_its_set(
    picture_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = shutil.copy(picture_folder / "a" / "picture 0.jpg", tmp_path / "private.jpg")
    root = tmp_path / "set"
    (root / "pictures").mkdir(parents=True)
    shutil.copy(private, root / "pictures" / "own.jpg")
    paths = [str(private), "../private.jpg", "private.jpg", "pictures/own.jpg", str(root / "pictures" / "own.jpg")]
    images = [{"bytes": None, "path": path} for path in paths]
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": images}, features=features)
    pyarrow.parquet.write_table(rows.data.table, root / "train.parquet")  # `to_parquet` looks for the files
    monkeypatch.chdir(tmp_path)
    for place in (root, root / "train.parquet"):
        samples = read(f"hf:{place}").splits["train"]
        reasons = [sample.image.reason if isinstance(sample.image, Missing) else None for sample in samples]
        assert [reason and reason.split(" has no picture")[1] for reason in reasons] == [
            f", and {private} lies outside the set", ", and ../private.jpg lies outside the set",
            ": no file private.jpg", None, None,
        ]  # fmt: skip
        assert samples[3].image.read() == Path(private).read_bytes()


@pytest.mark.parametrize("name", ["pandas", "csv", "imagefolder", "mnist"])
def test_readers_of_datasets_are_no_names_on_the_hub(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.pkl").write_bytes(b"cos\nabort\n(tR.")  # read as a pickle, it ends the process
    with pytest.raises(BadInput, match=f"hf:{name} does not exist, and is no name on the hub, such as user/set"):
        read(f"hf:{name}")


def test_what_is_no_hugging_face_set_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="hf:./nowhere does not exist, and is no name on the hub"):
        read("hf:./nowhere")
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(BadInput, match=r"hf:.*broken\.parquet cannot be loaded"):
        read(f"hf:{tmp_path / 'broken.parquet'}")
    (tmp_path / "code.py").write_text("raise SystemExit")
    with pytest.raises(BadInput, match=r"code\.py is no set that is read"):
        read(f"hf:{tmp_path / 'code.py'}")


def test_a_second_split_takes_the_classes_of_the_set(picture_folder: Path, tmp_path: Path) -> None:
    file = write_csv(tmp_path / "list.csv", [["path", "label"], [picture_folder / "b" / "picture 1.jpg", "b"]])
    source = TableSource(file, Columns())
    assert [sample.label for sample in source.read(("a", "b")).splits["train"]] == [1]
    with pytest.raises(BadInput, match="has a class 'b' that the set does not have: x, y"):
        source.read(("x", "y"))
