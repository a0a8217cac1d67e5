"""A path is a path: no shell is started by one, and nothing is fetched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from typer.testing import CliRunner

from foreseen import cli
from foreseen.data.hugging_face import HuggingFaceSource
from foreseen.data.manifest import read_manifest
from foreseen.data.open_source import SourceOptions, open_source
from foreseen.data.shards import CorruptSample, ShardSet
from foreseen.data.source import Missing
from foreseen.data.table import Columns, TableSource
from foreseen.errors import BadInput
from tests.servers import HOST, http_server
from tests.trust.payload import Canary, write_tar

Recipe = Callable[..., list[str]]
# What webdataset, fsspec and shells would each make of a name.
SHAPES = (
    "pipe:{command}", "pipe:{command} |", "|{command}", "{command} |", "$({command})", "`{command}`", "; {command}",
    "file::pipe:{command}", "pipe:{command}::file://x.tar", "git://{command}", "shell://{command}", "cmd:{command}",
)  # fmt: skip

REFUSED = (
    r"does not exist|is no encoder folder|look up|is no URL that is read|would run a command|without an index|"
    r"is missing|is no pattern of tars"
)


@pytest.fixture(params=SHAPES)
def address(request: pytest.FixtureRequest, canary: Canary) -> str:
    return str(request.param).format(command=canary.command)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_webdataset_runs_such_a_name(canary: Canary, jpeg: bytes, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg})
    pipe = f"pipe:{canary.command}; cat {tmp_path}/a.tar"
    assert len(list(webdataset.WebDataset(pipe, shardshuffle=False))) == 1
    assert canary.sang


@pytest.mark.parametrize(
    "place",
    [
        "data.path", "data.shards_at", "probe.data", "model.init_from", "data pack", "data pack of a pattern",
        "data index", "data index of a pattern", "data check", "data repair", "probe",
    ],
)  # fmt: skip
def test_a_shell_address_is_a_path_that_is_not_there(
    place: str, address: str, canary: Canary, recipe: Recipe, tmp_path: Path
) -> None:
    short = {"run__steps": 2, "optim__warmup_steps": 0, "batch__global_size": 8}
    arguments = {
        "data pack": ["data", "pack", address, str(tmp_path / "out")],
        "data pack of a pattern": ["data", "pack", f"{address}-{{0..2}}.tar", str(tmp_path / "out")],
        "data index": ["data", "index", address, "--out", str(tmp_path / "out")],
        "data index of a pattern": ["data", "index", f"{{x,{address}}}-{{0..2}}.tar", "--out", str(tmp_path / "out")],
        "data check": ["data", "check", address],
        "data repair": ["data", "repair", address, str(tmp_path / "out")],
        "probe": ["probe", address, address],
    }.get(place)
    if arguments is None:
        quoted = json.dumps(address)
        more = {"probe.every": 1} if place == "probe.data" else {}
        overrides = [f"{key}={value}" for key, value in {place: quoted, **more}.items()]
        arguments = ["pretrain", "mae_cpu_minutes", *recipe(**short), *overrides]
    with pytest.raises(BadInput, match=REFUSED):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert not canary.sang


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".ndjson", ".txt", ".lst"])
def test_a_shell_address_in_a_table_or_a_list_is_a_picture_that_is_not_there(
    suffix: str, address: str, canary: Canary
) -> None:
    quoted = address.replace('"', '""')
    text = {
        ".csv": f'path,label\n"{quoted}",cat\n', ".tsv": f'path\tlabel\n"{quoted}"\tcat\n',
        ".txt": f"{address}\n", ".lst": f"{address}\tcat\n",
    }.get(suffix, json.dumps({"path": address, "label": "cat", "image_url": address}) + "\n")  # fmt: skip
    file = Path(f"pictures{suffix}")
    file.write_text(text, encoding="utf-8")
    (sample,) = TableSource(file, Columns(image="path"), keep=None).read().splits["train"]
    assert isinstance(sample.image, Missing)
    assert sample.name == address
    with pytest.raises(CorruptSample, match="names no file that is there"):
        sample.image.read()
    assert not canary.sang


def test_a_cache_folder_is_a_folder_whatever_its_name(
    address: str, canary: Canary, small_shards: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with http_server(small_shards) as http:
        monkeypatch.setenv("NO_PROXY", HOST)
        quoted = json.dumps(address)
        short = recipe(run__steps=1, optim__warmup_steps=0, batch__global_size=8, data__fetch="shard")
        overrides = [*short, f"data.shards_at={http.url}", f"data.cache_dir={quoted}"]
        result = CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *overrides], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert Path(address).is_dir(), "it is taken by its letters"
    assert not canary.sang


HOSTILE_NAMES = (
    "pipe:{command}",
    "$({command})",
    "`{command}`",
    "; {command}",
    "../../outside",
    "/etc/x",
    "{command} |",
)


@pytest.mark.parametrize("verb", ["index", "pack", "check", "repair"])
def test_names_in_a_foreign_tar_are_names(verb: str, canary: Canary, jpeg: bytes, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for number, shape in enumerate(HOSTILE_NAMES):
        # webdataset's key ends at the first dot of the last part
        name = f"{number}{shape.format(command=canary.command)}"
        members |= {
            f"{name}.jpg": jpeg,
            f"{name}.cls": shape.encode(),
            f"{name}.json": json.dumps({"path": name}).encode(),
        }
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars/train-0.tar", members)
    before = {path for path in tmp_path.rglob("*") if "set" not in path.parts}
    arguments = {
        "index": ["index", "tars", "--out", "set", "--checksums", "--statistics"], "pack": ["pack", "tars", "set"],
        "check": ["check", "tars"], "repair": ["repair", "tars", "set"],
    }[verb]  # fmt: skip
    result = CliRunner().invoke(cli.app, ["data", *arguments, "--workers", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert {path for path in tmp_path.rglob("*") if "set" not in path.parts} == before
    if verb != "check":
        assert len(ShardSet.open(tmp_path / "set", "train")) == len(HOSTILE_NAMES)
    assert not canary.sang


def test_a_name_that_is_an_address_is_packed_as_any_other_name(canary: Canary, jpeg: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, shape in enumerate(("$(mkdir canary-sang)", "`mkdir canary-sang`", "; mkdir canary-sang", "pipe:x")):
        (folder / f"{shape}{number}.jpg").write_bytes(jpeg)
    result = CliRunner().invoke(cli.app, ["data", "pack", str(folder), str(tmp_path / "set"), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert not canary.sang
    assert not Path("canary-sang").exists()


@pytest.mark.parametrize(
    "name",
    [
        "pipe:{command}", "/etc/passwd", "../outside.tar", "a/b.tar", "..", ".", "", "http://127.0.0.1:9/a.tar",
        "a\\b.tar", "a\0b",
    ],
)  # fmt: skip
def test_a_manifest_that_names_anything_but_files_beside_it_is_refused(
    name: str, canary: Canary, small_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_shards, tmp_path / "set")
    file = tmp_path / "set/manifest.json"
    name = name.format(command=canary.command)
    whole = json.loads(file.read_text(encoding="utf-8"))
    for place in ("shard", "index", "labels"):
        manifest = json.loads(json.dumps(whole))
        train = manifest["splits"]["train"]
        if place == "shard":
            train["shards"][0]["name"] = name
        else:
            train[place] = name
        file.write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(BadInput, match="is not the name of a file beside it"):
            read_manifest(tmp_path / "set")
    assert not canary.sang


def test_a_hugging_face_row_cannot_name_a_file_outside_the_set(canary: Canary, jpeg: bytes, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "secret.jpg").write_bytes(jpeg)
    (tmp_path / "set").mkdir()
    names = [
        "../secret.jpg",
        str(tmp_path / "secret.jpg"),
        "/etc/passwd",
        f"pipe:{canary.command}",
        "http://127.0.0.1:9/a.jpg",
    ]
    rows = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": rows}), tmp_path / "set/train.parquet")
    found = HuggingFaceSource(str(tmp_path / "set"), Columns(image="image")).read()
    assert all(isinstance(sample.image, Missing) for sample in found.splits["train"])
    assert not canary.sang


@pytest.mark.parametrize(
    "place", ["pickle", "webdataset", "csv", "json", "text", "generator", "./nowhere", "/nowhere", "a/b/c", "http://127.0.0.1/a"]
)  # fmt: skip
def test_a_name_after_hf_is_a_path_or_a_name_on_the_hub_and_no_reader(place: str) -> None:
    with pytest.raises(BadInput, match="is no name on the hub"):
        open_source(f"hf:{place}", SourceOptions())


def test_metadata_of_a_local_set_cannot_send_the_reader_elsewhere(jpeg: bytes, tmp_path: Path) -> None:
    """A card in the folder may name data files for the hub's reader; the folder's own pictures are read."""
    folder = tmp_path / "set"
    (folder / "train/cat").mkdir(parents=True)
    (folder / "train/cat/a.jpg").write_bytes(jpeg)
    card = "---\nconfigs:\n- config_name: default\n  data_files: http://127.0.0.1:9/evil.parquet\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    found = HuggingFaceSource(str(folder), Columns()).read()
    assert len(found.splits["train"]) == 1
