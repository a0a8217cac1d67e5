"""The quickstart, made small: what it leaves behind, and what it says. `.ci/run` makes it whole."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands import quickstart
from foreseen.config import Config
from foreseen.errors import BadInput


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """144 pictures, two seeds, some steps, one process."""
    whole = quickstart.configs

    def shorter(config: Config, steps: int) -> Config:
        run = config.run.model_copy(update={"steps": steps, "save_every": steps, "log_every": 1})
        optim = config.optim.model_copy(update={"warmup_steps": 1})
        data = config.data.model_copy(update={"shots": config.data.shots and 2})
        probe = config.probe.model_copy(update={"every": config.probe.every and steps, "samples": 60})
        batch = config.batch.model_copy(update={"global_size": 8})
        return config.model_copy(update={"run": run, "optim": optim, "data": data, "batch": batch, "probe": probe})

    def configs(out: Path, method: str, seed: int) -> tuple[Config, Config]:
        pretraining, finetuning = whole(out, method, seed)
        return shorter(pretraining, 3), shorter(finetuning, 2)

    monkeypatch.setattr(quickstart, "configs", configs)
    monkeypatch.setattr(quickstart, "TRAIN", 96)
    monkeypatch.setattr(quickstart, "TEST", 24)
    monkeypatch.setattr(quickstart, "SEEDS", 2)
    monkeypatch.setattr("foreseen.data.parallel.count_cpus", lambda: 1)


def test_a_quickstart_ends_in_a_page_with_its_verdict(small: None, tmp_path: Path) -> None:
    out = tmp_path / "a: ${b}"  # which YAML would not leave as it is
    command = ["quickstart", "--out", str(out)]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "finetune/controls.json").read_text(encoding="utf-8"))
    assert record["verdict"] in result.output
    assert len(record["arms"]["pretrained"]["test"]) == len(record["arms"]["scratch"]["test"]) == 2
    page = (out / "summary.html").read_text(encoding="utf-8")
    assert "Did mae pretraining help?" in page
    assert page.count("<img") == 4, "scores, breeds, reconstruction, losses"
    assert "<script" not in page
    assert "http" not in page, "the page needs nothing else"
    card = (out / "pretrain/encoder/README.md").read_text(encoding="utf-8")
    assert record["verdict"] in card

    again = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert record["verdict"] in again.output
    assert "step 2/2" not in again.output, "finished runs are not made again"


def test_a_method_without_a_recipe_for_minutes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--method mea has no recipe for minutes on a CPU; there are .*mae"):
        CliRunner().invoke(
            cli.app, ["quickstart", "--out", str(tmp_path), "--method", "mea"], catch_exceptions=False
        )  # fmt: skip


def test_a_launcher_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="plain `foreseen quickstart`"):
        CliRunner().invoke(cli.app, ["quickstart", "--out", str(tmp_path)], catch_exceptions=False)
