"""Bad data as a user meets it: in pretraining, fine-tuning and probes, on one rank and on two."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.data.shards import ShardSet
from tests.commands.test_two_processes import finish, launched
from tests.damage import samples_of, with_a_shard_of_garbage

Recipe = Callable[..., list[str]]
SHORT = {
    "run__steps": 12, "run__log_every": 5, "run__save_every": 6, "optim__warmup_steps": 1, "batch__global_size": 8,
    "data__max_bad_fraction": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def damaged(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In `train` and in `test` the second of four shards is garbage."""
    folder = tmp_path_factory.mktemp("damaged")
    with_a_shard_of_garbage(small_shards, folder / "part")
    whole = ShardSet.open(small_shards, "test")
    content = bytearray((folder / "part/test-000001.tar").read_bytes())
    for sample in samples_of(whole, "test-000001.tar"):
        picture = whole.read(sample)
        content = content.replace(picture, bytes(len(picture)))
    (folder / "part/test-000001.tar").write_bytes(content)
    return folder / "part"


def _foreseen(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "unreadable.jsonl").read_text(encoding="utf-8").splitlines()]


def test_pretraining_probing_and_finetuning_list_what_they_could_not_read(
    damaged: Path, recipe: Recipe, tmp_path: Path
) -> None:
    probing = {"probe__every": 6, "probe__labels": True}
    said = _foreseen("pretrain", "mae_cpu_minutes", *recipe(**SHORT, **probing, data__path=damaged))
    assert "unreadable, in probe: train-000001.tar: sample" in said
    assert "samples trained on could not be read and were replaced" in said
    assert {line["shard"] for line in _listed(tmp_path / "run")} == {"train-000001.tar"}

    out = tmp_path / "probe.json"
    said = _foreseen("probe", tmp_path / "run/encoder", damaged, "--out", out, "--workers", 0, "--no-linear")
    assert "20 pictures could not be read and are left out; --out lists them" in said
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["unreadable"] == len(found["unreadable_pictures"]) == 20
    assert {(line["split"], line["shard"]) for line in found["unreadable_pictures"]} == {
        ("train", "train-000001.tar"), ("test", "test-000001.tar"),
    }  # fmt: skip

    finetuning = recipe(**SHORT, run__dir=tmp_path / "tuned", data__path=damaged, model__init_from="null")
    _foreseen("finetune", "cpu_minutes", *finetuning, "data.shots=null")
    uses = {(line["use"], line["shard"]) for line in _listed(tmp_path / "tuned")}
    assert {("training", "train-000001.tar"), ("test", "test-000001.tar")} <= uses
    assert sum(line["use"] == "test" for line in _listed(tmp_path / "tuned")) == 10


@pytest.mark.slow
def test_two_ranks_list_and_learn_what_one_does(damaged: Path, recipe: Recipe, tmp_path: Path) -> None:
    long = SHORT | {"run__steps": 40, "data__path": damaged, "data__workers": 1}
    exact = {"compute__precision": "fp64", "batch__micro_size": 4}
    folders = [tmp_path / f"ranks{ranks}" for ranks in (1, 2)]
    for ranks, folder in enumerate(folders, start=1):
        finish(recipe(**long, **exact, run__dir=folder), ranks=ranks)
    one, two = ((folder / "unreadable.jsonl").read_bytes() for folder in folders)
    assert one == two != b""
    lines = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for folder in folders
    ]
    assert [line["unreadable_samples"] for line in lines[0]] == [line["unreadable_samples"] for line in lines[1]]
    assert [line["loss"] for line in lines[0]] == pytest.approx([line["loss"] for line in lines[1]], rel=1e-9)


@pytest.mark.slow
def test_past_the_limit_both_ranks_stop_with_one_sentence(damaged: Path, recipe: Recipe, tmp_path: Path) -> None:
    strict = SHORT | {"run__steps": 40, "data__path": damaged, "data__max_bad_fraction": 0.01}
    with launched(recipe(**strict, batch__micro_size=4), ranks=2) as job:
        assert job.wait(300) != 0
        output = job.output()
    (sentence,) = [line for line in output.splitlines() if line.startswith("foreseen: ")]
    assert "of the 37 samples trained on cannot be read" in sentence
    assert f"{tmp_path / 'run' / 'unreadable.jsonl'} lists them" in sentence
