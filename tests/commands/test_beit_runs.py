"""BEiT runs as a user meets them: without a tokenizer named, killed, replayed, on several ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from foreseen import cli
from foreseen.commands.launched import LaunchedJob, metrics
from foreseen.commands.verify_resume import make_plan
from foreseen.errors import BadInput
from foreseen.tokenizers.folder import load_tokenizer, save_tokenizer
from foreseen.tokenizers.pixel_clusters import PixelClusters

Recipe = Callable[..., list[str]]
DEADLINE_S = 300
SMALL = {
    "run__steps": 4, "run__save_every": 2, "run__log_every": 1, "optim__warmup_steps": 1, "batch__global_size": 8,
    "method__pixel_clusters": "{clusters: 16}",
}  # fmt: skip


def _foreseen(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


def _beit(overrides: list[str]) -> str:
    result = _foreseen("pretrain", "beit_cpu_minutes", *overrides)
    assert result.exit_code == 0, result.output
    return result.output


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in metrics(run) if "loss" in line}


def _forget_the_last_steps(run: Path) -> None:
    shutil.rmtree(run / "checkpoints/step-4")
    shutil.rmtree(run / "encoder")


def test_a_run_that_names_no_tokenizer_makes_one_and_tells_how_it_does(recipe: Recipe, tmp_path: Path) -> None:
    output = _beit(recipe(**SMALL))
    folder = (tmp_path / "run/tokenizer").resolve()
    assert f"tokenizer {folder}: 16 of 16 codes used (100%), perplexity" in output
    for name in ("tokenizer_health.json", "tokenizer_health.png", "tokenizer/health.json", "tokenizer/health.png"):
        assert (tmp_path / "run" / name).is_file(), name
    lineage = json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))
    assert lineage["config"]["method"]["tokenizer"] == str(folder)
    assert lineage["frozen_inputs"] == {"tokenizer": load_tokenizer(folder).sha256}


def test_going_on_reads_the_tokenizer_and_is_the_same_run(recipe: Recipe, tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    _beit(recipe(**SMALL, run__dir=unbroken))
    _beit(recipe(**SMALL, run__dir=broken))
    _forget_the_last_steps(broken)
    output = _beit(recipe(**SMALL, run__dir=broken))
    assert "going on from step 2 of 4" in output
    assert "codes used" not in output
    assert _losses(broken) == _losses(unbroken)


def test_a_run_whose_folder_moved_goes_on(recipe: Recipe, tmp_path: Path) -> None:
    _beit(recipe(**SMALL, run__dir=tmp_path / "here"))
    _forget_the_last_steps(tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    assert "going on from step 2 of 4" in _beit(recipe(**SMALL, run__dir=tmp_path / "there"))


def test_going_on_with_another_tokenizer_or_none_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    _beit(recipe(**SMALL))
    _beit(recipe(**SMALL, seed=1, run__dir=tmp_path / "other"))
    _forget_the_last_steps(tmp_path / "run")
    with pytest.raises(BadInput, match="the tokenizer changed"):
        _beit(recipe(**SMALL, method__tokenizer=tmp_path / "other/tokenizer"))
    shutil.rmtree(tmp_path / "run/tokenizer")
    with pytest.raises(BadInput, match="is no tokenizer folder"):
        _beit(recipe(**SMALL))


def test_another_jobs_run_folder_gets_no_tokenizer(recipe: Recipe, tmp_path: Path) -> None:
    small = {key: value for key, value in SMALL.items() if "clusters" not in key}
    assert _foreseen("pretrain", "mae_cpu_minutes", *recipe(**small)).exit_code == 0
    with pytest.raises(BadInput, match="holds a checkpoint of another job"):
        _beit(recipe(**SMALL))
    assert not (tmp_path / "run/tokenizer").exists()


def test_a_dead_tokenizer_is_refused_before_anything_is_trained(recipe: Recipe, tmp_path: Path) -> None:
    dead = PixelClusters(512, 4, (16, 16))
    dead.centroids.fill_(9.0)
    dead.centroids[0] = 0.5
    save_tokenizer(dead, tmp_path / "dead", lineage={})
    with pytest.raises(BadInput, match=r"only 1 of 512 codes are used \(0\.2%\).*method\.min_usage 0\.5"):
        _beit(recipe(**SMALL, method__tokenizer=tmp_path / "dead"))
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/config.yaml").exists()
    assert "not fit" not in _beit(recipe(**SMALL, method__tokenizer=tmp_path / "dead", method__min_usage=0))


def test_a_proof_of_resuming_is_planned_before_there_is_a_tokenizer(recipe: Recipe, tmp_path: Path) -> None:
    small = recipe(batch__global_size=8, batch__micro_size="null")
    for name in ("beit_cpu_minutes", "beit_b16"):
        plan = make_plan(name, small, kills=1, saves=0, steps=8, ranks=2, out=tmp_path / "verify", seed=0)
        assert plan.usual.ranks == 2


@pytest.mark.slow
def test_two_ranks_learn_from_one_tokenizer_as_one_process_does(recipe: Recipe, tmp_path: Path) -> None:
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = tmp_path / f"ranks-{ranks}"
        overrides = recipe(**SMALL, run__dir=runs[ranks], compute__precision="fp64", batch__micro_size=2)
        log = tmp_path / f"ranks-{ranks}.log"
        with LaunchedJob(["pretrain", "beit_cpu_minutes", *overrides], run=runs[ranks], log=log, ranks=ranks) as job:
            assert job.wait(DEADLINE_S) == 0, job.output()
            assert job.output().count("codes used (100%)") == 1
    one, two = (runs[ranks] / "tokenizer" for ranks in (1, 2))
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    assert load_tokenizer(one).sha256 == load_tokenizer(two).sha256
    assert _losses(runs[1]) == pytest.approx(_losses(runs[2]), rel=1e-9)


@pytest.mark.slow
def test_a_tokenizer_that_rank_0_refuses_ends_all_ranks_with_the_sentence(recipe: Recipe, tmp_path: Path) -> None:
    dead = PixelClusters(512, 4, (16, 16))
    save_tokenizer(dead, tmp_path / "dead", lineage={})
    overrides = recipe(**SMALL, method__tokenizer=tmp_path / "dead")
    arguments = ["pretrain", "beit_cpu_minutes", *overrides]
    with LaunchedJob(arguments, run=tmp_path / "run", log=tmp_path / "log", ranks=2) as job:
        assert job.wait(DEADLINE_S) not in (0, None)
        assert "has collapsed on these pictures" in job.output()
        assert "Traceback (most recent call last):\n  File" not in job.output().split("foreseen:")[0]
