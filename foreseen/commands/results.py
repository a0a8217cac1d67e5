"""`foreseen results`: a table of what runs came out at, from their folders alone."""

from pathlib import Path
from typing import Annotated, Any

import typer

_BEGIN, _END = "<!-- foreseen results: begin -->", "<!-- foreseen results: end -->"


def results(
    runs: Annotated[list[Path], typer.Argument(help="Run folders of fine-tuning.")],
    out: Annotated[
        Path | None, typer.Option(help="A Markdown file whose table between the two marks is replaced; else printed.")
    ] = None,
) -> None:
    """Write a row for each group of fine-tuning runs that differ in nothing but their seeds."""
    from foreseen.errors import BadInput
    from foreseen.files import write_atomically

    table = make_table(runs)
    if out is None:
        print(table)
        return
    text = out.read_text(encoding="utf-8") if out.is_file() else f"{_BEGIN}\n{_END}\n"
    if _BEGIN not in text or _END not in text:
        raise BadInput(f"{out} has no lines {_BEGIN!r} and {_END!r} between which the table goes")
    before, rest = text.split(_BEGIN, 1)
    write_atomically(out, f"{before}{_BEGIN}\n{table}\n{_END}{rest.split(_END, 1)[1]}")
    print(f"{out}: {table.count(chr(10)) - 1} rows")


def make_table(folders: list[Path]) -> str:
    """A Markdown table with one row for each group of runs that differ only in seeds, in the order given."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for folder in folders:
        run = _read(folder)
        groups.setdefault(_group(run), []).append(run)
    lines = [
        "| begins from | model | labels | steps × batch | lr, layer decay | seeds | validation top-1 | "
        "test top-1, mean ± sd (each) | machine | date | command |",
        "| --- " * 11 + "|",
    ]
    lines += [_row(runs) for runs in groups.values()]
    return "\n".join(lines)


def _read(folder: Path) -> dict[str, Any]:
    from foreseen.config import read_yaml
    from foreseen.errors import BadInput
    from foreseen.files import read_json

    try:
        return {
            "config": read_yaml(folder / "config.yaml"),
            "result": read_json(folder / "result.json"),
            "lineage": read_json(folder / "encoder" / "lineage.json"),
            "starts": read_json(folder / "environment.json")["starts"],
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder} is no finished fine-tuning run: {error}") from error


def _group(run: dict[str, Any]) -> str:
    import json

    config = {key: value for key, value in run["config"].items() if key != "seed"}
    config["run"] = {key: value for key, value in config["run"].items() if key != "dir"}
    config["data"] = {key: value for key, value in config["data"].items() if key != "subset_seed"}
    return json.dumps(config, sort_keys=True)


def _beginning(config: dict[str, Any]) -> str:
    """What weights a run began from, and what it learned from besides labels."""
    begin, teacher = str(config["model"]["init_from"] or "scratch"), config["method"].get("teacher")
    return begin if teacher is None else f"{begin}, with the teacher {teacher}"


def _row(runs: list[dict[str, Any]]) -> str:
    from statistics import mean, stdev

    first = runs[0]
    config, start = first["config"], first["starts"][-1]
    scores = [100 * run["result"]["test"]["top1"] if "test" in run["result"] else float("nan") for run in runs]
    chosen = [100 * run["result"]["validation"]["top1"] for run in runs]
    spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
    each = ", ".join(f"{score:.1f}" for score in scores)
    machine = start["machine"]
    shots = config["data"]["shots"]
    cells = [
        _beginning(config),
        f"{config['model']['name'] or 'of the encoder'} {'×'.join(map(str, config['views']['size']))} px",
        f"{shots} a class" if shots else f"all but validation ({first['result']['training_samples']})",
        f"{config['run']['steps']} × {config['batch']['global_size']}",
        f"{config['optim']['base_lr']:g}, {config['optim']['layer_decay'] or 1.0:g}",
        ", ".join(str(run["config"]["seed"]) for run in runs),
        f"{mean(chosen):.1f}",
        f"{mean(scores):.1f}{spread} ({each})",
        f"{machine['ranks']} × {machine['device']}" + (f", {machine['cpu']}" if machine["device"] == "cpu" else ""),
        start["started"][:10],
        f"`{' '.join(start['command'])}`",
    ]
    return "| " + " | ".join(cells) + " |"
