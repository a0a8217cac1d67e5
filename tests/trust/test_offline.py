"""The main job with sockets blocked: nothing is reached for, in no process of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import small_recipe

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
ALONE = ["unshare", "--user", "--map-root-user", "--net"]
WISHES = ("HF_", "TRANSFORMERS_OFFLINE", "DISABLE_TELEMETRY", "DO_NOT_TRACK")  # to stay offline, which would hide a try


@pytest.fixture
def record(tmp_path: Path) -> Path:
    return tmp_path / "network.txt"


def _run(code: str, record: Path, *arguments: object, alone: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script where Python's sockets fail; `alone` in a network of its own, where those of C fail as well."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(WISHES)}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join([str(HERE / "offline"), str(ROOT)]), "FORESEEN_TEST_NETWORK": str(record),
        "XDG_CACHE_HOME": str(record.parent / "cache"), "HF_HOME": str(record.parent / "hf"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    namespace = ALONE if alone else []
    script = record.parent / "script.py"
    script.write_text(code, encoding="utf-8")
    command = [*namespace, sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=record.parent)


TRIES = """
import multiprocessing, socket, urllib.request
import torch
from foreseen.data.loader import load

def reach(kind):
    for attempt in (
        lambda: socket.getaddrinfo(f"{kind}.invalid", 80),
        lambda: socket.create_connection(("127.0.0.1", 9), timeout=1),
        lambda: urllib.request.urlopen("http://192.0.2.1/", timeout=1),
    ):
        try:
            attempt()
        except OSError:
            pass

class Reaching(torch.utils.data.Dataset):
    def __getitem__(self, number):
        return reach("worker")

if __name__ == "__main__":
    reach("here")
    child = multiprocessing.get_context("spawn").Process(target=reach, args=("child",))
    child.start()
    child.join()
    assert list(load(Reaching(), range(1), workers=1, pin_memory=False)) == [None]
"""


def test_the_block_notices_a_try_in_every_kind_of_process(record: Path) -> None:
    done = _run(TRIES, record)
    assert done.returncode == 0, done.stderr
    tries = record.read_text(encoding="utf-8")
    for kind in ("here", "child", "worker"):
        assert f"{kind}.invalid" in tries
    assert tries.count("127.0.0.1") >= 3


MAIN_JOB = """
import json, sys
from pathlib import Path
from foreseen import cli

def main():
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        try:
            cli.app(arguments, standalone_mode=False)
        except SystemExit as left:
            assert not left.code, (arguments, left.code)

if __name__ == "__main__":
    main()
"""


def _commands(pictures: Path, folder: Path) -> list[list[str]]:
    """A life: a folder is packed, pretrained on, probed, fine-tuned on; then a local Hugging Face set, and controls."""
    import datasets

    files = sorted(pictures.rglob("*.jpg"))
    classes = datasets.ClassLabel(names=["a", "b", "c"])
    rows = [
        {"image": {"bytes": file.read_bytes(), "path": None}, "label": classes.str2int(file.parent.name)}
        for file in files
    ]
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    (folder / "local").mkdir()
    for split in ("train", "test"):
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"local/{split}.parquet")

    def small(name: str, **more: object) -> list[str]:
        short = {"run__steps": 3, "optim__warmup_steps": 0, "batch__global_size": 8, "data__workers": 2}
        return small_recipe(folder / name, folder / "set", **short | more)

    encoder = folder / "run/encoder"
    begun = {"model__name": "null", "model__args": "null", "model__init_from": encoder}
    local = {"data__path": f"hf:{folder / 'local'}", "data__workers": 0, **begun}
    return [
        ["data", "pack", str(pictures), str(folder / "set"), "--labels", "folder", "--workers", "2"],
        ["pretrain", "mae_cpu_minutes", *small("run", probe__every=3, probe__labels=True)],
        ["probe", str(encoder), f"hf:{folder / 'local'}", "--workers", "0", "--no-linear"],
        ["finetune", "cpu_minutes", *small("tuned", data__shots=4, **begun)],
        ["pretrain", "mae_cpu_minutes", *small("again", **local)],
        ["results", str(folder / "tuned")],
        ["recipes", "mae_cpu_minutes"],
    ]  # fmt: skip


@pytest.mark.slow
def test_the_quickstart_and_the_controls_reach_for_nothing(small_shards: Path, record: Path) -> None:
    folder = record.parent
    run = small_recipe(folder / "study", small_shards, run__steps=2, optim__warmup_steps=0, batch__global_size=8)
    scratch = {"model.init_from": folder / "out/pretrain/encoder", "model.name": "null", "model.args": "null"}
    begun = [*run, "data.shots=4", *(f"{key}={value}" for key, value in scratch.items())]
    controls = ["finetune", "cpu_minutes", *begun, "views.size=48", "--controls", "--seeds", "1", "--jobs", "2"]
    commands = [["quickstart", "--out", str(folder / "out")], controls]
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    shrunk = "def main():\n    from tests.small_quickstart import shrink\n    shrink(setattr)\n"
    done = _run(MAIN_JOB.replace("def main():\n", shrunk), record, "commands.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not record.exists(), record.read_text(encoding="utf-8")
    assert (folder / "out/summary.html").is_file()
    assert (folder / "study/controls.json").is_file()


def _may_be_alone() -> bool:
    try:
        return not subprocess.run([*ALONE, "true"], check=False, capture_output=True).returncode
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "alone",
    [
        False,
        pytest.param(True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_the_main_job_reaches_for_nothing(alone: bool, picture_folder: Path, record: Path) -> None:
    if alone and not _may_be_alone():
        pytest.skip("this system lets no process have a network of its own")
    shutil.copytree(picture_folder, record.parent / "pictures")
    commands = _commands(record.parent / "pictures", record.parent)
    (record.parent / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    done = _run(MAIN_JOB, record, "commands.json", alone=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not record.exists(), record.read_text(encoding="utf-8")
    assert "encoder:" in done.stdout
    assert "k-NN" in done.stdout
    assert "classifier:" in done.stdout
