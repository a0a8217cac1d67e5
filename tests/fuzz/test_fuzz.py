"""Mutated inputs of every kind: no hang, no crash but our own words, no memory past the limit.

`make test` feeds 25 of each kind, .ci/run 300; FORESEEN_FUZZ=5000 makes it 5,000 of each, from the same seeds on.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from foreseen.config import read_yaml
from foreseen.data.arrays import map_array
from foreseen.data.shards import INDEX_ROW
from foreseen.data.tars import scan_tar
from foreseen.engine.checkpoint import Checkpoints
from foreseen.errors import BadInput
from tests.fuzz.driver import make
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parent.parent.parent
SHARE = "FORESEEN_FUZZ"


def _fuzz(count: int, out: Path, *options: str) -> str:
    command = [sys.executable, "-m", "tests.fuzz.driver", str(count), *options, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    at_work = "".join(f"; at work: {file}" for file in out.glob("*.bin"))
    assert done.returncode == 0, f"exit {done.returncode}{at_work}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def test_a_share_of_every_kind(tmp_path: Path) -> None:
    said = _fuzz(25, tmp_path)
    assert len(said.splitlines()) == len(TARGETS)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_many_of_every_kind(target: str, tmp_path: Path) -> None:
    print(_fuzz(int(os.environ.get(SHARE, "300")), tmp_path, target))


@pytest.mark.parametrize("target", TARGETS)
def test_an_input_is_a_function_of_its_number(target: str) -> None:
    assert [make(target, number) for number in range(5)] == [make(target, number) for number in range(5)]
    assert len({make(target, number) for number in range(20)}) > 10


def test_a_fault_is_kept_and_says_how_to_repeat_it(tmp_path: Path) -> None:
    code = """
import sys
from tests.fuzz import driver, targets
def crash(data, folder):
    if len(data) % 2: raise KeyError("no words of ours")
driver.TARGETS = {"tar": targets.Target(targets.TARGETS["tar"].make, crash)}
sys.argv = ["driver", "20", "tar", "--out", sys.argv[1]]
sys.exit(driver.main())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    kept = list(tmp_path.glob("tar-*.bin"))
    assert kept
    for file in kept:
        number = file.stem.removeprefix("tar-")
        assert f"python -m tests.fuzz.driver 1 'tar' --first {number}" in done.stdout
        assert file.read_bytes() == make("tar", int(number))


# What it found once.


def test_a_negative_size_in_a_tar_is_refused(tmp_path: Path) -> None:
    from tests.trust.payload import write_tar

    write_tar(tmp_path / "a.tar", {"0.jpg": b"x", "1.jpg": b"y"})
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    raw[1024 + 124 : 1024 + 136] = b"\xff" * 8 + (-1024).to_bytes(4, "big", signed=True)  # back to the first header
    raw[1024 + 148 : 1024 + 156] = b" " * 8
    raw[1024 + 148 : 1024 + 156] = b"%06o\0 " % sum(raw[1024:1536])
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(BadInput, match=r"the size of '1\.jpg' is no number of bytes"):
        scan_tar(tmp_path / "a.tar")


@pytest.mark.parametrize(
    "header", ["{'descr': '", "(" * 5000, "{'descr': '<u4', 'shape': (3", "{**{}}", "lambda: 0", "{1: 2}"]
)
def test_a_header_of_an_array_that_is_no_literal_is_a_sentence(header: str, tmp_path: Path) -> None:
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadInput, match="cannot be read"):
        map_array(tmp_path / "a.npy", INDEX_ROW, 3)


def test_a_checkpoint_whose_manifest_names_no_files_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "step-3").mkdir()
    (tmp_path / "step-3/manifest.json").write_text('{"files": {}}', encoding="utf-8")
    assert "does not name model.safetensors" in (Checkpoints(tmp_path, 3).find_damage(3) or "")


def test_a_resolved_config_with_an_alias_of_itself_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: &x [*x]\n", encoding="utf-8")
    with pytest.raises(BadInput):
        read_yaml(tmp_path / "config.yaml")
