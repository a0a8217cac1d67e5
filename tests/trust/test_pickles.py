"""No pickle runs, wherever it lies; and each of these would run in a reader that trusts it."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import webdataset
from safetensors.torch import save_file
from typer.testing import CliRunner

from foreseen import cli
from foreseen.data.arrays import map_array
from foreseen.data.hugging_face import HuggingFaceSource
from foreseen.data.shards import INDEX_ROW, ShardSet
from foreseen.data.table import Columns, TableSource
from foreseen.data.tars import scan_tar
from foreseen.engine.checkpoint import Checkpoints
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing, load_encoder, save_encoder
from foreseen.handoff.frozen import frozen_encoder
from foreseen.models.backbone import create_backbone
from tests.conftest import small_recipe
from tests.trust.payload import Canary, write_set, write_tar

Recipe = Callable[..., list[str]]
SHORT = {"run__steps": 2, "optim__warmup_steps": 0, "batch__global_size": 8, "run__log_every": 1}
MEMBERS = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz")


def _foreseen(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("kind", MEMBERS)
def test_the_payload_runs_in_a_reader_that_trusts_it(kind: str, canary: Canary, tmp_path: Path) -> None:
    data = canary.members[kind]
    if kind in ("pth", "pt"):
        torch.load(BytesIO(data), weights_only=False)
    elif kind == "npy":
        np.load(BytesIO(data), allow_pickle=True)
    elif kind == "npz":
        np.load(BytesIO(data), allow_pickle=True)["image"]
    else:
        pickle.loads(data)
    assert canary.sang


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["pyd", "pkl", "pth"])
def test_webdatasets_own_decoding_of_the_same_tar_runs_it(
    kind: str, canary: Canary, jpeg: bytes, tmp_path: Path
) -> None:
    write_tar(tmp_path / "a.tar", {"0.jpg": jpeg, f"0.{kind}": canary.members[kind]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode("pil"))
    assert canary.sang


def test_pickles_beside_the_pictures_of_a_shard_do_not_run_in_the_main_job(
    canary: Canary, jpeg: bytes, recipe: Recipe, tmp_path: Path
) -> None:
    members: dict[str, bytes] = {}
    for sample in range(8):
        members[f"{sample}.jpg"] = jpeg
        members |= {f"{sample}.{kind}": data for kind, data in canary.members.items()}
        members[f"{sample}.json"] = b"{}"
    write_set(tmp_path / "set", {"train-000000.tar": members})
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**SHORT, data__path=tmp_path / "set", data__workers=2))
    assert not canary.sang


def test_pickles_in_the_place_of_pictures_are_unreadable_samples(
    canary: Canary, jpeg: bytes, recipe: Recipe, tmp_path: Path
) -> None:
    shards = {
        "train-000000.tar": {f"{sample}.jpg": jpeg for sample in range(7)},
        "train-000001.tar": {f"{kind}.jpg": data for kind, data in canary.members.items()},
    }
    write_set(tmp_path / "set", shards)
    small = recipe(**SHORT | {"run__steps": 4}, data__path=tmp_path / "set", data__max_bad_fraction=0.6)
    _foreseen("pretrain", "mae_cpu_minutes", *small)
    lines = (tmp_path / "run/unreadable.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["key"] for line in lines} == set(MEMBERS)
    assert "it is a Python pickle, which is never opened" in {json.loads(line)["reason"] for line in lines}
    assert not canary.sang


def _foreign_tar(canary: Canary, jpeg: bytes, file: Path, *, as_pictures: bool = False) -> None:
    """As others make them: whole samples with every kind of pickle beside the picture; or in a member that is read."""
    members: dict[str, bytes] = {}
    for sample in range(3):
        members |= {f"{sample}.jpg": jpeg, f"{sample}.cls": b"1", f"{sample}.json": b'{"label": "cat"}'}
        members |= {f"{sample}.{kind}": data for kind, data in canary.members.items()}
    if as_pictures:
        for kind, data in canary.members.items():
            members |= {f"{kind}.{extension}": data for extension in ("jpg", "cls", "json", "seg.png")}
    file.parent.mkdir(exist_ok=True)
    write_tar(file, members)


@pytest.mark.parametrize("compressed", [False, True])
def test_pickles_in_a_foreign_tar_do_not_run_when_it_is_packed(
    compressed: bool, canary: Canary, jpeg: bytes, tmp_path: Path
) -> None:
    _foreign_tar(canary, jpeg, tmp_path / "tars/train-0.tar")
    if compressed:
        data = (tmp_path / "tars/train-0.tar").read_bytes()
        (tmp_path / "tars/train-0.tar.gz").write_bytes(gzip.compress(data))
        (tmp_path / "tars/train-0.tar").unlink()
    said = _foreseen("data", "pack", tmp_path / "tars", tmp_path / "set", "--workers", "1")
    assert "never opened: 3 *.pyd, 3 *.pkl" in said
    assert "packed 3 pictures" in said
    assert not [member.name for member in scan_tar(tmp_path / "set/train-000000.tar") if "pkl" in member.name]
    assert not canary.sang


@pytest.mark.parametrize("verb", ["pack", "repair"])
def test_pickles_in_the_members_that_are_read_of_a_foreign_tar_are_left_out(
    verb: str, canary: Canary, jpeg: bytes, tmp_path: Path
) -> None:
    _foreign_tar(canary, jpeg, tmp_path / "tars/train-0.tar", as_pictures=True)
    _foreseen("data", verb, tmp_path / "tars", tmp_path / "set", "--workers", "1")
    assert len(ShardSet.open(tmp_path / "set", "train")) == 3
    left = (tmp_path / "set/train.unreadable.txt").read_text(encoding="utf-8")
    assert all(f"train-0.tar/{kind}" in left for kind in MEMBERS)
    assert not canary.sang


def test_pickles_in_a_foreign_tar_do_not_run_when_it_is_indexed_checked_and_trained_on(
    canary: Canary, jpeg: bytes, recipe: Recipe, tmp_path: Path
) -> None:
    _foreign_tar(canary, jpeg, tmp_path / "tars/train-0.tar")
    for labels in ("cls", "json:label"):
        _foreseen("data", "index", tmp_path / "tars", "--labels", labels, "--checksums", "--statistics", "--overwrite")
    _foreseen("data", "check", tmp_path / "tars", "--near-duplicates", "--workers", "1")
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**SHORT, data__path=tmp_path / "tars", data__workers=2))
    assert not canary.sang


@pytest.mark.parametrize("labels", ["cls", "json:label", "none"])
def test_an_index_of_pickles_in_the_place_of_members_is_refused_or_reads_none(
    labels: str, canary: Canary, jpeg: bytes, tmp_path: Path
) -> None:
    _foreign_tar(canary, jpeg, tmp_path / "tars/train-0.tar", as_pictures=True)
    arguments = ["data", "index", str(tmp_path / "tars"), "--labels", labels, "--statistics", "--workers", "1"]
    if labels == "none":
        assert f"{len(MEMBERS)} pictures cannot be decoded" in _foreseen(*arguments)
    else:
        with pytest.raises(BadInput, match="has no label that can be used"):
            CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert not canary.sang


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_pickles_that_a_table_or_a_list_names_are_left_out(
    suffix: str, canary: Canary, jpeg: bytes, tmp_path: Path
) -> None:
    names = ["good.jpg"]
    (tmp_path / "good.jpg").write_bytes(jpeg)
    for kind, data in canary.members.items():
        (tmp_path / f"evil.{kind}").write_bytes(data)
        names.append(f"evil.{kind}")
    rows = [json.dumps({"path": name}) if suffix == ".jsonl" else name for name in names]
    head = ["path"] if suffix == ".csv" else []
    (tmp_path / f"table{suffix}").write_text("\n".join([*head, *rows]) + "\n", encoding="utf-8")
    said = _foreseen("data", "pack", tmp_path / f"table{suffix}", tmp_path / "set", "--workers", "1")
    assert f"{len(MEMBERS)} pictures cannot be read and were left out" in said
    assert not canary.sang


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt"])
def test_a_pickle_in_the_place_of_a_table_or_a_list_is_refused(suffix: str, canary: Canary, tmp_path: Path) -> None:
    for payload in (canary.pickled, canary.checkpoint, canary.array):
        (tmp_path / f"table{suffix}").write_bytes(payload)
        with pytest.raises(BadInput):
            TableSource(tmp_path / f"table{suffix}", Columns()).read()
    assert not canary.sang


def test_pickles_named_as_pictures_are_left_out_by_pack(canary: Canary, jpeg: bytes, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/good.jpg").write_bytes(jpeg)
    for number, data in enumerate((*canary.members.values(), canary.old_checkpoint)):
        (tmp_path / f"folder/evil{number}.jpg").write_bytes(data)
    said = _foreseen("data", "pack", tmp_path / "folder", tmp_path / "set", "--workers", "2")
    assert "8 pictures cannot be read" in said
    assert not canary.sang


@pytest.mark.parametrize("name", ["train.index.npy", "train.labels.npy"])
@pytest.mark.parametrize("payload", ["array", "pickled", "zipped_array", "checkpoint"])
def test_an_index_or_labels_that_are_a_pickle_are_refused(
    name: str, payload: str, canary: Canary, small_shards: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_shards, tmp_path / "set")
    (tmp_path / "set" / name).write_bytes(getattr(canary, payload))
    with pytest.raises(BadInput, match=name):
        ShardSet.open(tmp_path / "set", "train")
    assert not canary.sang


def test_an_array_of_objects_is_refused_even_where_objects_are_asked_for(canary: Canary, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([canary] * 3, dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match=r"holds object"):
        map_array(tmp_path / "a.npy", np.dtype(object), 3)
    assert not canary.sang


def test_a_dtype_that_holds_objects_is_not_the_index(canary: Canary, tmp_path: Path) -> None:
    rows = np.zeros(2, dtype=[(name, object) for name in INDEX_ROW.names or ()])
    rows["size"] = canary
    np.save(tmp_path / "a.npy", rows, allow_pickle=True)
    with pytest.raises(BadInput, match="promises 2 rows"):
        map_array(tmp_path / "a.npy", INDEX_ROW, 2)
    assert not canary.sang


def test_an_arrow_extension_type_that_is_a_pickle_is_read_as_what_it_stores(canary: Canary, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    hostile = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": canary.pickled}
    field = pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]), metadata=hostile)
    table = pa.table({"image": [{"bytes": b"\xff\xd8\xff", "path": None}]}, schema=pa.schema([field]))
    (tmp_path / "set").mkdir()
    pq.write_table(table, tmp_path / "set/train.parquet")
    found = HuggingFaceSource(str(tmp_path / "set"), Columns()).read()
    assert len(found.splits["train"]) == 1
    assert not canary.sang


@pytest.mark.parametrize("name", ["evil.pkl", "evil.pickle", "evil.py", "evil.pt"])
def test_files_that_are_no_hugging_face_set_are_refused(name: str, canary: Canary, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(
        canary.pickled if name != "evil.py" else f"import os; os.makedirs({str(canary.cage)!r})".encode()
    )
    with pytest.raises(BadInput, match="is no set that is read"):
        HuggingFaceSource(str(tmp_path / name), Columns()).read()
    assert not canary.sang


def test_a_loading_script_in_a_hugging_face_folder_does_not_run(canary: Canary, jpeg: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "train/cat").mkdir(parents=True)
    (folder / "train/cat/a.jpg").write_bytes(jpeg)
    for name in ("set.py", "dataset.py", "__init__.py", "sitecustomize.py"):
        (folder / name).write_text(f"import os; os.makedirs({str(canary.cage)!r}, exist_ok=True)", encoding="utf-8")
    found = HuggingFaceSource(str(folder), Columns()).read()
    assert len(found.splits["train"]) == 1
    assert not canary.sang


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    args = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    model = create_backbone("vit_tiny_patch16_224", img_size=(32, 32), args=args)
    seen = Preprocessing((0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, (32, 32))
    save_encoder(model, tmp_path / "encoder", preprocessing=seen, lineage={})
    return tmp_path / "encoder"


PLANTED = (
    "pytorch_model.bin",
    "model.bin",
    "model.pth",
    "model.pt",
    "model.ckpt",
    "weights.pkl",
    "open_clip_pytorch_model.bin",
)


@pytest.mark.parametrize("payload", ["checkpoint", "old_checkpoint", "pickled"])
def test_pickles_planted_in_an_encoder_folder_are_passed_over(payload: str, canary: Canary, encoder: Path) -> None:
    for name in PLANTED:
        (encoder / name).write_bytes(getattr(canary, payload))
    load_encoder(encoder)
    frozen_encoder(str(encoder))
    assert not canary.sang


@pytest.mark.parametrize("payload", ["checkpoint", "old_checkpoint", "pickled"])
def test_an_encoder_folder_with_nothing_but_pickles_is_refused(payload: str, canary: Canary, encoder: Path) -> None:
    (encoder / "model.safetensors").unlink()
    for name in PLANTED:
        (encoder / name).write_bytes(getattr(canary, payload))
    for load in (load_encoder, lambda folder: frozen_encoder(str(folder))):
        with pytest.raises(BadInput, match=r"config.json or model.safetensors is missing"):
            load(encoder)
    assert not canary.sang


@pytest.mark.parametrize("payload", ["checkpoint", "old_checkpoint", "pickled"])
def test_a_pickle_called_safetensors_is_refused(payload: str, canary: Canary, encoder: Path) -> None:
    (encoder / "model.safetensors").write_bytes(getattr(canary, payload))
    for load in (load_encoder, lambda folder: frozen_encoder(str(folder))):
        with pytest.raises(BadInput, match="cannot be read"):
            load(encoder)
    assert not canary.sang


def test_timm_takes_the_safetensors_before_a_pickle(canary: Canary, encoder: Path) -> None:
    """The hand-off is loaded by others with timm alone."""
    (encoder / "pytorch_model.bin").write_bytes(canary.checkpoint)
    timm.create_model(f"local-dir:{encoder}", pretrained=True)
    assert not canary.sang


HOSTILE_CONFIGS: dict[str, dict[str, Any]] = {
    "an architecture that is a path": {"architecture": "../../evil"},
    "an architecture elsewhere": {"architecture": "hf-hub:evil/model"},
    "an architecture that is a folder": {"architecture": "local-dir:evil"},
    "an architecture that is a list": {"architecture": ["vit_tiny_patch16_224"]},
    "an architecture that is a function": {"architecture": "os.system"},
    "a checkpoint among the arguments": {"model_args": {"checkpoint_path": "CHECKPOINT"}},
    "another config among the arguments": {"model_args": {"pretrained_cfg_overlay": {"file": "CHECKPOINT"}}},
    "weights among the arguments": {"model_args": {"pretrained": True}},
    "a filter among the arguments": {"model_args": {"pruned": True}},
}


@pytest.mark.parametrize("change", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
def test_a_config_json_that_asks_for_more_than_a_model_is_refused(
    change: dict[str, Any], canary: Canary, encoder: Path, recipe: Recipe
) -> None:
    evil = encoder.parent / "evil.pth"
    evil.write_bytes(canary.checkpoint)
    described = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    for key, value in json.loads(json.dumps(change).replace("CHECKPOINT", str(evil))).items():
        described[key] = described[key] | value if isinstance(value, dict) else value
    (encoder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    for load in (load_encoder, lambda folder: frozen_encoder(str(folder))):
        with pytest.raises(BadInput, match=r"no model of timm|no argument of a model"):
            load(encoder)
    assert not canary.sang


@pytest.mark.parametrize("custom_load", [False, True, "hf"])
def test_places_to_load_from_in_a_config_json_are_not_gone_to(
    custom_load: object, canary: Canary, encoder: Path, tmp_path: Path
) -> None:
    evil = tmp_path / "evil.npz"
    evil.write_bytes(canary.zipped_array)
    described = json.loads((encoder / "config.json").read_text(encoding="utf-8"))
    hostile = {
        "url": evil.as_uri(), "file": str(evil), "hf_hub_id": "evil/model", "hf_hub_filename": "evil.bin",
        "source": "hf-hub", "custom_load": custom_load, "state_dict": {"a": 1}, "trust_remote_code": True,
    }  # fmt: skip
    described["pretrained_cfg"] |= {key: hostile[key] for key in hostile if key != "trust_remote_code"}
    described |= {"trust_remote_code": True, "auto_map": {"AutoModel": "evil.Model"}, "custom_pipelines": {}}
    (encoder / "evil.py").write_text(f"import os; os.makedirs({str(canary.cage)!r})", encoding="utf-8")
    (encoder / "config.json").write_text(json.dumps(described), encoding="utf-8")
    expected = load_encoder(encoder).state
    frozen = frozen_encoder(str(encoder)).model.state_dict()
    assert all(torch.equal(expected[name], value) for name, value in frozen.items())
    assert not canary.sang


def test_model_args_of_a_recipe_load_nothing(canary: Canary, recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(canary.checkpoint)
    for argument in (
        f"checkpoint_path: {tmp_path}/evil.pth",
        f"pretrained_cfg: {{file: {tmp_path}/evil.pth}}",
        f"pretrained_cfg_overlay: {{file: {tmp_path}/evil.pth}}",
        "pretrained: true",
        "cache_dir: /tmp",
    ):
        small = recipe(**SHORT, model__args=f"{{{argument}}}")
        with pytest.raises(BadInput, match=r"is no argument of vit_tiny"):
            CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *small], catch_exceptions=False)
    assert not canary.sang


@pytest.fixture(scope="module")
def finished(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    _foreseen("pretrain", "mae_cpu_minutes", *small_recipe(folder, small_shards, **SHORT))
    return folder


@pytest.fixture
def run_folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, where `recipe` has its run."""
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_pickles_planted_in_a_run_folder_are_not_loaded(
    canary: Canary, recipe: Recipe, run_folder: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run/checkpoints/step-2"
    for name in (
        "pytorch_model.bin",
        "optimizer.bin",
        "optimizer.pt",
        "scheduler.bin",
        "random_states_0.pkl",
        "model.pt",
    ):
        (checkpoint / name).write_bytes(canary.checkpoint)
    shutil.rmtree(tmp_path / "run/encoder")
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**SHORT))
    assert not canary.sang


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_pickle_in_the_place_of_a_checkpoints_file_is_damage(
    name: str, canary: Canary, recipe: Recipe, run_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "run/checkpoints/step-2" / name).write_bytes(canary.checkpoint)
    with pytest.raises(BadInput, match="checkpoints in .* are damaged"):
        Checkpoints(tmp_path / "run/checkpoints", 3).newest_sound()
    assert not canary.sang


def test_a_checkpoint_whose_checksums_were_forged_is_refused_without_running(
    canary: Canary, recipe: Recipe, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run/checkpoints/step-2"
    (folder / "model.safetensors").write_bytes(canary.checkpoint)
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir() if file.name != "manifest.json"
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"files": digests}), encoding="utf-8")
    with pytest.raises(BadInput, match="step-2"):
        CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *recipe(**SHORT)], catch_exceptions=False)
    assert not canary.sang


def test_tensors_of_another_shape_in_a_checkpoint_are_a_sentence(
    recipe: Recipe, run_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run/checkpoints/step-2"
    save_file({"vit.pos_embed": torch.zeros(1)}, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"]["model.safetensors"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadInput, match="step-2"):
        CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *recipe(**SHORT)], catch_exceptions=False)


def test_a_pickle_in_the_cache_does_not_run(
    canary: Canary, picture_folder: Path, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    small = recipe(**SHORT, data__path=picture_folder)
    _foreseen("pretrain", "mae_cpu_minutes", *small)
    (packed,) = (tmp_path / "cache/foreseen").glob("packed-*")
    assert not [file for file in packed.iterdir() if file.suffix not in (".tar", ".npy", ".json", ".txt")]
    (packed / "notes.json").write_bytes(canary.pickled)
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(BadInput, match=r"notes\.json"):
        CliRunner().invoke(cli.app, ["pretrain", "mae_cpu_minutes", *small], catch_exceptions=False)
    assert not canary.sang
    assert os.path.exists(packed)
