"""The house stands: links, one import name, and imports that run one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("pretrain", "finetune", "tokenizers")
CORE = ("data", "models", "engine", "handoff")


def _modules(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def _imports(path: Path) -> set[str]:
    """Names of foreseen's own modules that a file imports, anywhere in it, but for type checking."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("foreseen.")}


@pytest.mark.parametrize("name", [*STAGES, "configs"])
def test_stage_folders_are_relative_links_without_init(name: str) -> None:
    link = ROOT / "foreseen" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name
    assert not (ROOT / name / "__init__.py").exists()


def test_bare_tokenizers_at_the_root_does_not_hide_hugging_face() -> None:
    code = "import tokenizers; print(hasattr(tokenizers, 'Tokenizer'))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "True", result.stderr


FORBIDDEN = {
    "data": ("models", "engine", "handoff", "commands", *STAGES),
    "models": ("data", "engine", "handoff", "commands", *STAGES),
    "engine": ("handoff", "commands", *STAGES),
    "handoff": ("commands", *STAGES),
}


@pytest.mark.parametrize("part", sorted(FORBIDDEN))
def test_imports_within_the_core_run_one_way(part: str) -> None:
    for path in _modules(ROOT / "foreseen" / part):
        for name in _imports(path):
            assert name.split(".")[1] not in FORBIDDEN[part], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    ("stage", "forbidden"),
    [
        ("pretrain", ("commands", "finetune")),
        ("finetune", ("commands", "pretrain")),
        ("tokenizers", ("commands", "finetune", "pretrain")),
    ],
)
def test_stages_import_the_core_and_not_each_other(stage: str, forbidden: tuple[str, ...]) -> None:
    for path in _modules(ROOT / stage):
        for name in _imports(path):
            assert name.split(".")[1] not in forbidden, f"{path.relative_to(ROOT)} imports {name}"


def test_only_commands_name_the_stages() -> None:
    for path in _modules(ROOT / "foreseen"):
        part = path.relative_to(ROOT / "foreseen").parts[0]
        if part in ("commands", *STAGES):
            continue
        for name in _imports(path):
            assert name.split(".")[1] not in STAGES, f"{path.relative_to(ROOT)} imports {name}"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, foreseen.cli; "
        "heavy = ('torch', 'timm', 'numpy', 'PIL', 'datasets', 'accelerate', 'pydantic'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
