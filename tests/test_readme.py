"""What README and docs tell a reader to type exists and is valid."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.verbs import VERBS, load_recipe

ROOT = Path(__file__).parent.parent


def _commands() -> list[str]:
    found = []
    for page in [
        ROOT / "README.md",
        *sorted((ROOT / "docs").glob("*.md")),
        *sorted((ROOT / "configs").rglob("*.yaml")),
    ]:
        for line in page.read_text(encoding="utf-8").splitlines():
            line = line.removeprefix("#").strip().partition("  ")[0].replace(" -m foreseen ", " foreseen ")
            typed = re.search(
                r"^(?:\w+=\S+ )?(?:accelerate launch .*)?(foreseen (?:data|pretrain|finetune|recipes) .*)", line
            )
            if typed and "..." not in line and "[" not in line.split("=")[0]:
                found.append(typed[1])
    return sorted(set(found))


@pytest.mark.parametrize("command", _commands())
def test_a_command_of_the_documentation_is_valid(command: str) -> None:
    _, verb, *arguments = shlex.split(command)
    if verb in VERBS:
        load_recipe(verb, arguments[0], arguments[1:])
    elif verb == "data":
        known = CliRunner().invoke(cli.app, ["data", arguments[0], "--help"])
        assert known.exit_code == 0
        for option in (word for word in arguments if word.startswith("--")):
            assert option in known.output


def test_the_documentation_shows_enough_commands_to_be_worth_testing() -> None:
    assert len(_commands()) >= 8


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in get_command(cli.app).commands:  # type: ignore[attr-defined]
        assert f"foreseen {name}" in readme


def test_the_tree_in_the_readme_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.split("## The tree")[1].split("```")[1]
    for name in re.findall(r"[\w/]+\.py", tree):
        assert any(ROOT.rglob(name)), name
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_files_named_in_the_guarantees_exist() -> None:
    for name in re.findall(r"`(tests/[\w/]+\.py)`", (ROOT / "docs/guarantees.md").read_text(encoding="utf-8")):
        assert (ROOT / name).is_file(), name
