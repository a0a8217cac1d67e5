"""What the documentation tells a reader to type, and how a test runs it small."""

import re
import shlex
from pathlib import Path

from foreseen.commands.study_options import load_study
from foreseen.commands.verbs import VERBS, Verb, load_recipe
from tests.small_methods import patch_of, small_method

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]

# Between them every command of a page: what no pattern covers fails the test.
_ALLOWED = r"(pip install|tensorboard|source) .*"
_RULES = {
    "run": r"(foreseen|(\w+=\S+ )*accelerate launch) .*",
    "make": r"make \w+",
    "sbatch": r"sbatch .*",
    "not ours": _ALLOWED,
}


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def typed_commands(page: str) -> list[str]:
    """The lines of a page's code blocks without a language, in order, without comments."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", read(page), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(code for language, code in blocks if language in ("", "sh", "bash")).splitlines()
    return [command for line in lines if (command := line.partition("  #")[0].strip())]


def inline_commands(page: str) -> list[str]:
    """Commands within sentences and tables, but for synopses with their PLACEHOLDERS."""
    quoted = re.findall(r"`((?:foreseen |python benchmarks/|make )[^`\n]+)`", read(page))
    return [command for command in quoted if not re.search(r"\b[A-Z]{3,}\b|\.\.\.", command)]


def head_commands(path: Path) -> list[str]:
    """Commands in the comments of a recipe."""
    lines = [line.removeprefix("#   ") for line in path.read_text(encoding="utf-8").splitlines() if line[:4] == "#   "]
    return [line for line in lines if re.fullmatch(_RULES["run"], line)]


def rule_of(command: str) -> str:
    """Which rule covers a command.

    Raises:
        AssertionError: none does.
    """
    for rule, pattern in _RULES.items():
        if re.fullmatch(pattern, command):
            return rule
    raise AssertionError(f"no rule of tests/documentation.py covers {command!r}")


def arguments_of(command: str) -> list[str]:
    """Arguments of `foreseen` in a plain or a launched command."""
    return shlex.split(re.sub(r"^.* -m foreseen ", "foreseen ", command))[1:]


def launcher_arguments(command: str) -> list[str] | None:
    """Arguments of `accelerate launch` in a launched command, else None."""
    launched = re.match(r"(?:\w+=\S+ )*accelerate launch (.*)", command)
    return shlex.split(launched[1]) if launched else None


def split_job(arguments: list[str]) -> tuple[Verb, str, list[str], list[str]] | None:
    """Verb, recipe, overrides and options of a command that trains; None for others."""
    verb = next((verb for verb in VERBS if verb == arguments[0]), None)
    if verb is None:
        return None
    overrides = [word for word in arguments[2:] if re.match(r"[\w.]+=", word)]
    return verb, arguments[1], overrides, [word for word in arguments[2:] if word not in overrides]


def check_job(arguments: list[str]) -> None:
    """Load the recipe of a command that trains, with its overrides."""
    if arguments[0] == "study" and len(arguments) > 1:
        load_study(arguments[1], [word for word in arguments[2:] if re.match(r"[\w.]+=", word)])
    job = split_job(arguments) if len(arguments) > 1 else None
    if job is not None:
        verb, recipe, overrides, _ = job
        load_recipe(verb, recipe, overrides)


def shrunk(arguments: list[str], shards: Path, archives: Path) -> list[str]:
    """The same command on stand-in data, in seconds.

    Args:
        arguments: of `foreseen`.
        shards: a small labelled set, for a recipe that would draw or look for a larger one.
        archives: of a small Oxford-IIIT Pet.
    """
    if arguments[:2] == ["data", "pets"]:
        return [*arguments[:3], "--from", str(archives), "--workers", "1"]
    if arguments[:2] == ["data", "pack"]:
        return [*arguments, "--workers", "1"]
    if arguments[0] in ("probe", "predict", "embed"):
        return [*arguments, "--workers", "0"]
    if arguments[0] == "study":  # tests/commands/test_study.py makes one
        return [*arguments, f"data.path={shards}", "--plan"]
    job = split_job(arguments)
    if job is None:
        return arguments
    verb, recipe, overrides, options = job
    config = load_recipe(verb, recipe, overrides)
    patch = patch_of(config)
    smaller: dict[str, object] = {
        "run.steps": 2, "run.epochs": "null", "optim.warmup_steps": 1, "optim.warmup_epochs": "null",
        "batch.global_size": 4, "batch.micro_size": "null", "data.workers": 0, "compute.precision": "fp32",
        "views.size": 4 * (patch or 8),
    }  # fmt: skip
    if config.model.name is None or patch is not None:  # a ViT
        smaller["model.args"] = "{embed_dim: 48, depth: 2, num_heads: 3}"
    if config.data.path is None:
        smaller["data.path"] = shards
    given = {override.partition("=")[0] for override in overrides}
    smaller |= {key: value for key, value in small_method(config).items() if key not in given}
    if verb == "finetune":
        smaller |= {"data.shots": 2, "data.validation_fraction": 0.2}
        if isinstance(getattr(config.method, "freeze", None), int):
            smaller["method.freeze"] = 1
    if "--seeds" in options:
        options[options.index("--seeds") + 1] = "1"
    return [verb, recipe, *overrides, *(f"{key}={value}" for key, value in smaller.items()), *options]
