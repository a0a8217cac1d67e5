"""webdataset, datasets and tarfile read every set of ours: packed, repaired and indexed, with the Pets' trimaps too.

All of them read all of the sets in one process each, since importing them takes longer than reading.
"""

import json
import os
import subprocess
import sys
import tarfile
import zlib
from contextlib import nullcontext
from pathlib import Path

import pytest

from foreseen.data.check import check_set
from foreseen.data.index_tars import IndexOptions, index_tars
from foreseen.data.pets import pack_pets
from foreseen.data.repair import repair
from foreseen.data.shards import ShardSet
from foreseen.data.tar_labels import LabelRule
from tests.pets_archives import make_archives
from tests.tars_of_others import sound

SETS = ("small", "pets", "repaired", "indexed")


@pytest.fixture(scope="session")
def sets(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a set of each origin, each with a split `train`."""
    folder = tmp_path_factory.mktemp("sets")
    (folder / "small").symlink_to(small_shards)
    pack_pets(folder / "pets", make_archives(folder / "archives"), workers=1)
    for src, out in (("pets", "repaired"),):
        repair(str(folder / src), folder / out, workers=1, say=print, progress=lambda _: nullcontext(lambda *_: None))
    files = [sound(folder / "indexed" / f"train-{number}.tar", range(number * 5, number * 5 + 5)) for number in (0, 1)]
    rule = LabelRule.parse("json:breed")
    index_tars({"train": files}, folder / "indexed", IndexOptions(labels=rule, checksums=True), workers=1)
    for name in SETS:
        assert not [fault for fault in check_set(folder / name, workers=1).faults if fault.kind != "leak"]
    return folder


def members_by_tarfile(folder: Path) -> list[list[object]]:
    """Key and crc32 of each member, of every sample of `train`, in order."""
    found: dict[str, dict[str, int]] = {}
    for file in sorted(folder.glob("train-*.tar")):
        with tarfile.open(file) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                found.setdefault(key, {})[extension] = zlib.crc32(tar.extractfile(info).read())  # type: ignore[union-attr]
    return [[key, dict(sorted(members.items()))] for key, members in found.items()]


def run(script: str, *arguments: str, **environment: str) -> dict[str, list[list[object]]]:
    command = [sys.executable, "-c", script, *arguments]
    result = subprocess.run(command, env=os.environ | environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[list[object]]] = json.loads(result.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("name", SETS)
def test_tarfile_finds_the_pictures_and_labels_that_the_index_names(name: str, sets: Path) -> None:
    data = ShardSet.open(sets / name, "train")
    members = members_by_tarfile(sets / name)
    assert [zlib.crc32(data.read(number)) for number in range(len(data))] == [found["jpg"] for _, found in members]  # type: ignore[index]
    assert [data.describe(number).rpartition("key ")[2] for number in range(len(data))] == [
        f"{key})" for key, _ in members
    ]
    facts = [fact for file in sorted((sets / name).glob("train-*.tar")) for fact in jsons(file)]
    assert data.labels is not None
    assert data.classes is not None
    if name == "indexed":
        assert [data.classes[label] for label in data.labels] == [fact["breed"] for fact in facts]
    else:
        assert data.labels.tolist() == [fact["label"] for fact in facts]


def jsons(file: Path) -> list[dict[str, object]]:
    with tarfile.open(file) as tar:
        return [json.load(tar.extractfile(info)) for info in tar if info.name.endswith(".json")]  # type: ignore[arg-type]


def test_webdataset_reads_every_member(sets: Path) -> None:
    script = """
import json, pathlib, sys, zlib, webdataset
found = {}
for name in sys.argv[2:]:
    files = sorted(map(str, pathlib.Path(sys.argv[1], name).glob("train-*.tar")))
    found[name] = [
        [sample["__key__"], {k: zlib.crc32(sample[k]) for k in sorted(sample) if not k.startswith("__")}]
        for sample in webdataset.WebDataset(files, shardshuffle=False, empty_check=False)
    ]
print(json.dumps(found))
"""
    found = run(script, str(sets), *SETS)
    for name in SETS:
        assert found[name] == members_by_tarfile(sets / name), name


def test_hugging_face_datasets_reads_pictures_facts_and_label_maps(sets: Path, tmp_path: Path) -> None:
    script = """
import json, sys, datasets
found = {}
for name in sys.argv[3:]:
    files = {"train": f"{sys.argv[1]}/{name}/train-*.tar"}
    rows = datasets.load_dataset("webdataset", data_files=files, cache_dir=f"{sys.argv[2]}/{name}")["train"]
    masks = [column for column in rows.column_names if column.endswith(".png")]
    found[name] = [[row["__key__"], row["jpg"].size, row["json"], {m: row[m].size for m in masks}] for row in rows]
print(json.dumps(found))
"""
    found = run(script, str(sets), str(tmp_path), *SETS, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    for name in SETS:
        facts = [fact for file in sorted((sets / name).glob("train-*.tar")) for fact in jsons(file)]
        assert [row[2] for row in found[name]] == facts
        assert [row[0] for row in found[name]] == [key for key, _ in members_by_tarfile(sets / name)]
        for _, size, fact, masks in found[name]:
            assert name == "indexed" or size == [fact["width"], fact["height"]]  # type: ignore[index]
            assert all(mask == size for mask in masks.values())  # type: ignore[attr-defined]
        masks = {"pets": ["trimap.png"], "repaired": ["trimap.png"], "indexed": ["seg.png"], "small": []}[name]
        assert [list(row[3]) for row in found[name]] == [masks] * len(found[name])  # type: ignore[call-overload]


@pytest.mark.slow
def test_the_real_pets_are_sound_and_repaired_to_the_same_bytes(pets_archives: Path, tmp_path: Path) -> None:
    pack_pets(tmp_path / "set", pets_archives, workers=2)
    assert not check_set(tmp_path / "set", workers=2).faults
    repair(
        str(tmp_path / "set"), tmp_path / "out", workers=2, say=print, progress=lambda _: nullcontext(lambda *_: None)
    )
    for split in ("train", "test"):
        one, other = ShardSet.open(tmp_path / "set", split), ShardSet.open(tmp_path / "out", split)
        assert sorted(one.picture_digests().tolist()) == sorted(other.picture_digests().tolist())
        assert one.classes == other.classes
