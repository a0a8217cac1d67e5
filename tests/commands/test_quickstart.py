"""The quickstart, made small: what it leaves behind, and what it says. `.ci/run` makes it whole."""

import html
import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.verbs import load_recipe
from foreseen.errors import BadInput
from tests.small_quickstart import shrink


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch.setattr)


def commands_of(page: str) -> list[str]:
    """What the page says to type."""
    (shown,) = re.findall("<pre>(.*?)</pre>", page, re.DOTALL)
    commands = html.unescape(shown).replace("\\\n", "").splitlines()
    assert len(commands) == 4
    return commands


@pytest.mark.parametrize(
    ("method", "pictures"),
    [
        ("mae", 4),
        pytest.param("beit", 4, marks=pytest.mark.slow),
        pytest.param("dino", 5, marks=pytest.mark.slow),
        pytest.param("ibot", 6, marks=pytest.mark.slow),
        pytest.param("dinov2", 6, marks=pytest.mark.slow),
    ],
)
def test_a_quickstart_ends_in_a_page_with_its_verdict(small: None, tmp_path: Path, method: str, pictures: int) -> None:
    out = tmp_path / "a: ${b}"  # which YAML would not leave as it is
    command = ["quickstart", "--out", str(out), "--method", method]
    result = CliRunner().invoke(cli.app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((out / "finetune/controls.json").read_text(encoding="utf-8"))
    assert record["verdict"] in result.output
    assert len(record["arms"]["pretrained"]["test"]) == len(record["arms"]["scratch"]["test"]) == 2
    page = (out / "summary.html").read_text(encoding="utf-8")
    assert f"Did {method} pretraining help?" in page
    assert page.count("<img") == pictures, "scores, breeds, losses, and what the method shows"
    assert "<script" not in page
    assert "http" not in page, "the page needs nothing else"
    for line in commands_of(page):
        verb, recipe, *overrides = shlex.split(line)[1:]
        if verb in ("pretrain", "finetune"):
            load_recipe(verb, recipe, [word for word in overrides if not word.startswith("--")])
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
