"""SIGKILL at every moment of a save, and disks that fail: older checkpoints are intact, the run comes out the same."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foreseen.engine import checkpoint, log
from foreseen.engine.checkpoint import Checkpoints
from foreseen.engine.run_folder import RunLock, disk_trouble
from foreseen.errors import BadInput
from tests.engine.crash import LENGTH, MOMENTS
from tests.engine.test_train import configure, run

ROOT = Path(__file__).parents[2]
# The third save is the first that drops a checkpoint: the second keeps the last and the best.
KILLS = [(moment, save) for moment in MOMENTS for save in (1, 2, 3) if moment != "in retention" or save == 3]


def _state(folder: Path) -> dict[str, bytes]:
    """The last checkpoint's tensors, and all that is in the folder beside it."""
    found = {path.name: path.read_bytes() for path in (folder / "checkpoints/step-12").glob("*.safetensors")}
    return found | {path.name: b"" for path in (folder / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def unbroken(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("unbroken")
    run(small_shards, configure(folder, **LENGTH), validate=True)
    return _state(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "save"), KILLS)
def test_a_kill_at_any_moment_of_a_save_loses_nothing(
    small_shards: Path, tmp_path: Path, unbroken: dict[str, bytes], moment: str, save: int
) -> None:
    command = [sys.executable, "-m", "tests.engine.crash", str(small_shards), str(tmp_path), moment, str(save)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    before = Checkpoints(tmp_path / "checkpoints", 1)
    published = save - (0 if moment in ("after the rename", "in retention", "before the best is marked") else 1)
    assert before.newest_sound() == (3 * published or None)
    assert run(small_shards, configure(tmp_path, **LENGTH), validate=True).step == 12
    assert _state(tmp_path) == unbroken


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one_and_keeps_no_count_of_it(
    small_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    config = configure(tmp_path / "run", run__steps=12, run__save_every=3, run__keep_last=2)
    run(small_shards, configure(tmp_path / "unbroken", run__steps=12, run__save_every=3, run__keep_last=2))
    run(small_shards, config, signal_at=8)
    victim = tmp_path / "run/checkpoints/step-9/optimizer.safetensors"
    content = bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    assert run(small_shards, config).step == 12
    assert "step-9 is damaged (optimizer.safetensors does not match its checksum)" in caplog.text
    names = {path.name for path in (tmp_path / "run/checkpoints").iterdir()}
    assert names == {"step-9", "step-12", "damaged-step-9"}  # the new step-9 among them
    weights = [(tmp_path / name / "checkpoints/step-12/model.safetensors").read_bytes() for name in ("run", "unbroken")]
    assert weights[0] == weights[1]


def test_a_run_does_not_begin_anew_over_checkpoints_that_are_all_damaged(small_shards: Path, tmp_path: Path) -> None:
    config = configure(tmp_path, run__steps=12, run__save_every=3, run__keep_last=2)
    run(small_shards, config)
    for manifest in tmp_path.glob("checkpoints/step-*/manifest.json"):
        manifest.write_text("{", encoding="utf-8")
    with pytest.raises(BadInput, match=r"all 2 checkpoints in .* are damaged, such as step-12 .* begin anew"):
        run(small_shards, config)
    assert len(list(tmp_path.glob("checkpoints/step-*"))) == 2


def test_leftovers_are_not_touched_by_a_process_that_is_refused(
    small_shards: Path, tmp_path: Path, recipe: Any
) -> None:
    leftover = tmp_path / "run/checkpoints/.tmp-5"
    leftover.mkdir(parents=True)
    code = "import sys, time; from pathlib import Path; from foreseen.engine.run_folder import RunLock\n"
    code += "with RunLock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        from foreseen.commands import pretrain
        from foreseen.commands.verbs import load_recipe

        with pytest.raises(BadInput, match=f"is in use by process {holder.pid}"):
            pretrain.run(load_recipe("pretrain", "mae_cpu_minutes", recipe()))
        holder.communicate("")
    assert leftover.is_dir()


def test_a_disk_that_fills_up_while_numbers_are_logged_is_a_sentence(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(tmp_path, run__log_every=1)
    scalars = log.RunLog.scalars

    def full(self: log.RunLog, step: int, *args: Any, **more: Any) -> None:
        if step == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        scalars(self, step, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(log.RunLog, "scalars", full)
        with pytest.raises(BadInput, match=r"cannot be written: No space left .* checkpoints are intact"):
            with disk_trouble(tmp_path):
                run(small_shards, config)
    assert run(small_shards, config).step == 8


@pytest.mark.parametrize("what", ["optimizer", "manifest", "folder"])
def test_a_disk_that_fills_up_in_the_middle_of_a_save_leaves_the_older_checkpoint(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    config = configure(tmp_path)
    save_file, write_text, mkdir = checkpoint.save_file, Path.write_text, Path.mkdir

    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def refuse(path: Path) -> bool:
        return f".tmp-6/{what}" in str(path) or (what == "folder" and path.name == ".tmp-6")

    def no_file(tensors: Any, file: Path) -> None:
        if refuse(file):
            file.write_bytes(b"half")
            raise full()
        save_file(tensors, file)

    def no_text(self: Path, *args: Any, **more: Any) -> int:
        if refuse(self):
            raise full()
        return write_text(self, *args, **more)

    def no_folder(self: Path, *args: Any, **more: Any) -> None:
        if refuse(self):
            raise full()
        mkdir(self, *args, **more)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_file", no_file)
        patched.setattr(Path, "write_text", no_text)
        patched.setattr(Path, "mkdir", no_folder)
        with pytest.raises(BadInput, match=r"the checkpoint of step 6 cannot be written .* No space left .* intact"):
            run(small_shards, config)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-3"]
    assert run(small_shards, config).step == 8


def test_a_run_folder_that_may_not_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(self: Path, *args: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with (
        pytest.raises(BadInput, match=r"run.dir .* cannot be written: Read-only file system"),
        RunLock(tmp_path / "run"),
    ):
        pass


def test_the_mark_of_a_run_that_was_told_to_stop_goes_when_it_goes_on(small_shards: Path, tmp_path: Path) -> None:
    run(small_shards, configure(tmp_path), signal_at=3)
    mark = json.loads((tmp_path / "PREEMPTED").read_text(encoding="utf-8"))
    assert mark["step"] == 4
    run(small_shards, configure(tmp_path))
    assert not (tmp_path / "PREEMPTED").exists()
