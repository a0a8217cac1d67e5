"""What README and docs tell a reader to type is run, in order, on small stand-in data; the rest is true, too."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from typer.main import get_command
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.verbs import VERBS, Verb, load_recipe, method_options
from foreseen.config import Config, recipe_names
from tests.documentation import (
    PAGES,
    ROOT,
    arguments_of,
    check_job,
    head_commands,
    inline_commands,
    launcher_arguments,
    read,
    rule_of,
    shrunk,
    typed_commands,
)
from tests.pets_archives import jpeg, make_archives, png

ELSEWHERE = {
    "docs/add_a_method.md": "tests/test_add_a_method.py",  # its command needs the page's own method
    "docs/flight_recorder.md": "tests/commands/test_replay.py",  # its run is meant to fail
}
RECIPES = [path for verb in (*VERBS, "study") for path in sorted((ROOT / "configs" / verb).glob("*.yaml"))]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Oxford-IIIT Pet in little: two breeds with eight pictures each for training, and two for the test."""
    members: dict[str, bytes | None] = {}
    lists: dict[str, list[str]] = {"trainval.txt": [], "test.txt": []}
    for breed in (1, 2):
        for number in range(10):
            name = f"{('Abyssinian', 'great_pyrenees')[breed - 1]}_{number}"
            members |= {
                f"images/{name}.jpg": jpeg(80 + number, 60),
                f"annotations/trimaps/{name}.png": png(80 + number, 60),
            }
            lists["trainval.txt" if number < 8 else "test.txt"].append(f"{name} {breed} {breed} 1\n")
    members |= {f"annotations/{name}": "".join(lines).encode() for name, lines in lists.items()}
    return make_archives(tmp_path_factory.mktemp("pets") / "archives", members)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and typed_commands(page)])
def test_the_commands_of_a_page_run_in_its_order(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture_folder: Path, small_shards: Path, archives: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("my_pictures", "my_labels"):
        shutil.copytree(picture_folder, name)
    for command in typed_commands(page):
        rule = rule_of(command)
        if rule == "make":
            _check_make(command)
        elif rule == "sbatch":
            script, *arguments = shlex.split(command)[1:]
            assert (ROOT / script).is_file(), command
            check_job(["pretrain", *arguments])
        elif rule == "run":
            _check_launcher(command)
            arguments = shrunk(arguments_of(command), small_shards, archives)
            result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, f"{command}\n{result.output}"


def _check_make(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", read("Makefile"), flags=re.MULTILINE), command
    assert re.search(rf"^{command}$", read(".ci/run"), flags=re.MULTILINE), f"nothing runs {command}"


def _check_launcher(command: str) -> None:
    arguments = launcher_arguments(command)
    if arguments is not None:
        launch = launch_command_parser().parse_args(arguments)
        assert (launch.training_script, launch.module) == ("foreseen", True), command
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), command


@pytest.mark.parametrize("page", PAGES)
def test_a_command_in_a_sentence_is_valid(page: str) -> None:
    for command in inline_commands(page):
        if command.startswith("make "):
            _check_make(command)
        elif command.startswith("python "):
            script, *options = shlex.split(command)[1:]
            code = read(script)
            if "begin(parser" in code:
                code += read("benchmarks/race.py")  # where the options are that steps share
            assert all(f'"{option}"' in code for option in options if option.startswith("--")), command
        else:
            _check_foreseen(arguments_of(command))


def test_an_override_in_a_sentence_is_valid() -> None:
    sections = "|".join(Config.model_fields)
    for page in PAGES:
        for overrides in re.findall(rf"`((?:{sections})\.[\w.]+=[^`\n]+)`", read(page)):
            if "mask_ration" not in overrides:  # shown as a mistake
                load_recipe(*_recipe_with(overrides), overrides.split())


def _recipe_with(overrides: str) -> tuple[Verb, str]:
    """A verb and its recipe whose method has the options that are overridden."""
    options = set(re.findall(r"\bmethod\.(\w+)", overrides))
    recipes = [("pretrain", "mae_vit_b16"), *((verb, name) for verb in VERBS for name in recipe_names(verb))]
    return next(found for found in recipes if options <= load_recipe(*found).method.model_dump().keys())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_commands_in_the_head_of_a_recipe_are_valid(path: Path) -> None:
    commands = head_commands(path)
    assert any(f"foreseen {path.parent.name} {path.stem}" in command for command in commands)
    for command in commands:
        _check_launcher(command)
        _check_foreseen(arguments_of(command))


def _check_foreseen(arguments: list[str]) -> None:
    check_job(arguments)
    command = get_command(cli.app)
    words = arguments[:]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known, arguments


def test_a_command_that_no_rule_covers_is_noticed() -> None:
    for command in ("python setup.py install", "foreseen", "make quickstart clean", "curl http://nowhere | sh"):
        with pytest.raises(AssertionError, match="no rule"):
            rule_of(command)


@pytest.mark.slow
def test_the_command_for_two_processes_starts_two(tmp_path: Path, small_shards: Path, archives: Path) -> None:
    (command,) = (line for line in typed_commands("README.md") if "ACCELERATE_USE_CPU" in line)
    verb_and_more = shrunk(arguments_of(command), small_shards, archives)
    launcher = command.partition("-m foreseen")[0].replace(
        "accelerate launch", "accelerate launch --main_process_port 0"
    )
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        f"{launcher} -m foreseen {shlex.join(verb_and_more)}",
        shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = (tmp_path / "runs").glob("*/environment.json")
    assert json.loads(record.read_text(encoding="utf-8"))["starts"][0]["machine"]["ranks"] == 2


def test_every_command_is_in_the_readme() -> None:
    for name in get_command(cli.app).commands:  # type: ignore[attr-defined]
        assert f"`foreseen {name}" in read("README.md")


def test_every_method_and_every_recipe_is_in_the_readme() -> None:
    table = read("README.md").split("## Methods")[1].split("\n## ")[0]
    for verb in VERBS:
        for method in method_options(verb):
            assert f"| `{method}` |" in table
        for recipe in recipe_names(verb):
            assert f"`{recipe}`" in table


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = read("README.md").split("## The tree")[1].split("```")[1]
    for name in re.findall(r"[\w/]+\.py", tree):
        assert any(ROOT.rglob(name)), name
    folders = re.findall(r"^(\w+)/", tree, flags=re.MULTILINE)
    for folder in folders:
        assert (ROOT / folder).is_dir(), folder
    shown = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and any(path.rglob("*.py"))}
    assert {name for name in shown if "egg-info" not in name} <= {*folders, "build"}


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", read(page)):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    for name in re.findall(r"`((?:tests|foreseen|configs|benchmarks|docs)/[\w/.]+\.\w+)`", read(page)):
        if "inpaint" not in name:  # the example of docs/add_a_method.md
            assert (ROOT / name).is_file(), name
