"""The code itself has no way to what trust forbids; each exception stands here with its reason."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FILES = sorted(
    file for folder in ("foreseen", "pretrain", "finetune", "tokenizers") for file in (ROOT / folder).rglob("*.py")
)

# Modules that run what they read, start processes, or reach over the network.
FORBIDDEN_MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "pty", "code",
    "codeop", "runpy", "urllib.request", "urllib3", "requests", "httpx", "aiohttp", "http.client", "ftplib", "smtplib",
    "telnetlib", "xmlrpc", "socketserver", "webbrowser", "ctypes", "cffi",
}  # fmt: skip
ALLOWED_IMPORTS = {
    ("foreseen/data/pets.py", "urllib.request"): "`data pets` downloads two archives from one fixed address",
    ("foreseen/data/cifar.py", "pickle"): "an unpickler in which every class and function is an inert stand-in",
    ("foreseen/handoff/inert_pickle.py", "pickle"): "the same for files of torch.save, whose tensors come out",
    ("foreseen/data/http_ranges.py", "aiohttp"): "reads the URL that a user gives as data.path or data.shards_at",
    ("foreseen/data/stream.py", "subprocess"): "runs `pipe:COMMAND` if data.allow_shell_urls says so",
    ("foreseen/commands/launched.py", "subprocess"): "`verify-resume` starts foreseen itself, without a shell",
}
ALLOWED_FAULTS = {("foreseen/data/stream.py", "has shell=True"): "`pipe:COMMAND`, if data.allow_shell_urls says so"}
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnl",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "torch.hub.load", "np.fromstring",
    "np.load", "numpy.load", "torch.load", "timm.create_model_from_pickle", "importlib.reload",
}  # fmt: skip
FORBIDDEN_ARGUMENTS = {"shell", "allow_pickle", "trust_remote_code", "weights_only"}  # true for these but the last
FORBIDDEN_METHODS = {"decode_pickle", "extractall", "WebDataset", "gopen", "xdecode"}


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value) or '?'}.{node.attr}"
    return ""


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _name(node.func)
        if name in FORBIDDEN_CALLS or name.rpartition(".")[2] in FORBIDDEN_METHODS or name.endswith(".extract"):
            yield f"line {node.lineno} calls {name}"
        for keyword in node.keywords:
            value = getattr(keyword.value, "value", None)
            if keyword.arg in FORBIDDEN_ARGUMENTS and value is not (keyword.arg == "weights_only"):
                yield f"line {node.lineno} has {keyword.arg}={value}"


def _is_forbidden(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in FORBIDDEN_MODULES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_imports_and_calls_nothing_that_trust_forbids(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    place = str(file.relative_to(ROOT))
    imported = {module for module in _imports(tree) if _is_forbidden(module)}
    assert {module for module in imported if (place, module) not in ALLOWED_IMPORTS} == set()
    assert [fault for fault in _faults(tree) if (place, fault.split(" ", 2)[2]) not in ALLOWED_FAULTS] == []


def test_every_exception_is_still_needed() -> None:
    for place, module in ALLOWED_IMPORTS:
        assert module in set(_imports(ast.parse((ROOT / place).read_text(encoding="utf-8"))))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from urllib.request import urlopen", "import subprocess as s", "eval('1')", "os.system('x')",
        "np.load(f)", "np.load(f, allow_pickle=True)", "torch.load(f)", "yaml.load(f, Loader=L)", "run(x, shell=True)",
        "load(f, weights_only=False)", "tar.extractall(p)", "AutoModel(n, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_guard_notices(code: str) -> None:
    tree = ast.parse(code)
    assert list(_faults(tree)) or any(_is_forbidden(module) for module in _imports(tree))
