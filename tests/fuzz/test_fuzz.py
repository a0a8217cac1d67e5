"""Mutated inputs of every kind: no hang, no crash but our own words, no memory past the limit.

`make test` feeds 25 of each kind, .ci/run 300; FORESEEN_FUZZ=5000 makes it 5,000 of each, from the same seeds on.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from foreseen.config import read_yaml
from foreseen.data.arrays import map_array
from foreseen.data.batch import BatchLayout
from foreseen.data.shards import INDEX_ROW
from foreseen.data.table import Columns, TableSource
from foreseen.data.tar_paths import find_tars, holds_tars
from foreseen.data.tar_samples import group_members, regroup
from foreseen.data.tars import Member, Tar, scan_tar
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.ledger import Ledger, read_ledger
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


@pytest.mark.parametrize(
    "bomb",
    [
        "{0..999999999}.tar", "{0..99}{0..99}{0..99}{0..99}.tar", "{a,b}" * 40 + ".tar", "{a..z}" * 9 + ".tar",
        "{x" + "{a,b}" * 40 + ",y}.tar", "{a{0..99999}{0..99999},b}.tar", "{0..99999}" + "x" * 5000 + ".tar",
    ],
)  # fmt: skip
def test_a_pattern_of_too_many_tars_is_refused_before_it_is_expanded(bomb: str) -> None:
    with pytest.raises(BadInput, match=r"names more than [\d,]+ tars: give the folder"):
        find_tars([bomb])


@pytest.mark.parametrize(
    "pattern", ["{" * 3000 + "a,b" + "}" * 3000 + ".tar", "{0.." + "9" * 5000 + "}.tar", "{" * 30 + "a.tar}"]
)
def test_a_pattern_that_no_person_writes_is_a_sentence(pattern: str) -> None:
    with pytest.raises(BadInput, match="is no pattern of tars"):
        find_tars([pattern])


def test_a_name_that_no_file_can_have_and_a_user_that_is_not_there_are_sentences() -> None:
    for place in ("x" * 5000 + ".tar", "~nobody-of-this-name/{0..3}.tar", "~nobody\0/a.tar"):
        assert not holds_tars(place) or "{" in place
        with pytest.raises(BadInput, match="does not exist"):
            find_tars([place])


@pytest.mark.parametrize(
    "damage", ["{'descr': (", "(" * 3000, "{'descr': '|O', 'fortran_order': False, 'shape': (3, 4)}"]
)
def test_a_run_goes_on_whose_ledger_was_damaged(damage: str, tmp_path: Path) -> None:
    from accelerate import Accelerator

    (tmp_path / "ledger").mkdir()
    header = damage.encode() + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(96)
    (tmp_path / "ledger/samples.npy").write_bytes(data)
    Ledger(tmp_path, BatchLayout(4, 4), 3, Accelerator(cpu=True), pixels=False).forget(1, 2)
    assert read_ledger(tmp_path).tolist() == [[-1] * 4] * 3


@pytest.mark.parametrize("name", ["table.csv", "table.jsonl"])
def test_a_table_of_a_hundred_thousand_columns_is_refused_at_once(name: str, tmp_path: Path) -> None:
    names = [str(number) for number in range(100_000)]
    head = ",".join(names) if name == "table.csv" else "{" + ", ".join(f'"{name}":1' for name in [*names, "9999"]) + "}"
    (tmp_path / name).write_text(f"{head}\n1\n", encoding="utf-8")
    began = time.process_time()
    with pytest.raises(BadInput):
        TableSource(tmp_path / name, Columns()).read()
    assert time.process_time() - began < 5


def test_a_key_with_very_many_members_is_sorted_out_in_linear_time(tmp_path: Path) -> None:
    members = [Member(f"k.{number}", 0, 0) for number in range(20_000)]
    grouped = group_members(Tar([*members, Member("other.jpg", 0, 0), Member("k.jpg", 0, 0)], {}, None))
    began = time.process_time()
    samples, troubles = regroup(grouped)
    assert (len(samples.keys), troubles) == (2, {})
    assert time.process_time() - began < 5
