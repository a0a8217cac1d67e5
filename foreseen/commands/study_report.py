"""What a study leaves behind: study.json, study.csv and study.md."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from foreseen.commands.controls import scores
from foreseen.commands.study_findings import Record, find, name_of, start_in_words
from foreseen.commands.study_options import TAUGHT, shots_of
from foreseen.files import read_json, write_atomically
from foreseen.masked import masked

if TYPE_CHECKING:
    from foreseen.commands.study_cells import Cell, Key, Plan

_COLUMNS = ("labels", "model", "family", "start", "augmentation", "taught_by", "base_lr", "steps")


def validation(cell: "Cell") -> float:
    """The mean top-1 of a finished cell on validation, over its seeds."""
    return float(mean(scores(cell.chosen(), cell.seeds)["validation"]))


def write_report(plan: "Plan", cells: "Sequence[Cell]") -> Record:
    """Write `study.json`, `study.csv` and `study.md` from finished cells.

    Returns:
        What `study.json` holds.
    """
    from foreseen.engine.run_folder import describe_start

    found = [_record(cell) for cell in cells]
    levels = {}
    for labels in dict.fromkeys(cell["labels"] for cell in found):
        here = [cell for cell in found if cell["labels"] == labels]
        levels[labels] = find(here)
    record = {
        "data": masked(str(plan.raw["data"].get("path") or "procedural pets")),
        "cells": found,
        "levels": levels,
        "left_out": [{"what": what, "why": why} for what, why in plan.left_out],
        "notes": _notes(plan, found),
        "made_by": describe_start({}),
    }
    plan.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(plan.folder / "study.json", json.dumps(record, indent=2) + "\n")
    write_atomically(plan.folder / "study.csv", _csv(found))
    write_atomically(plan.folder / "study.md", markdown(record))
    return record


def reported(folder: Path) -> "set[Key]":
    """The cells that a study's folder has a report of."""
    from foreseen.commands.study_cells import Key

    path = folder / "study.json"
    cells = read_json(path)["cells"] if path.is_file() else []
    return {Key(*(cell[name] for name in Key._fields)) for cell in cells}


def _record(cell: "Cell") -> Record:
    fit = cell.chosen()
    run = fit.seeded(cell.seeds[0]).run.dir
    result, encoder = read_json(run / "result.json"), run / "encoder"
    made = read_json(encoder / "lineage.json")["config"]
    return {
        **cell.key._asdict(),
        "family": cell.family,
        "taught_by": cell.taught_by,
        "folder": str(fit.config.run.dir),
        "run_steps": made["run"]["steps"],
        "passes": made["run"]["steps"] * made["batch"]["global_size"] / result["training_samples"],
        "chance": 100 / read_json(encoder / "config.json")["num_classes"],
        "training_labels": result["training_samples"],
        "validation_labels": int(result["validation"]["count"]),
        "test_pictures": int(result["test"]["count"]),
        "rates": {f"{other.config.optim.base_lr:.3g}": _first_validation(other, cell) for other in cell.rates},
        **scores(fit, cell.seeds),
    }


def _first_validation(fit: Any, cell: "Cell") -> float:
    value: float = scores(fit, cell.seeds[:1])["validation"][0]
    return value


def _notes(plan: "Plan", cells: list[Record]) -> list[str]:
    """What a reader must know to believe the numbers."""
    held_out = cells[0]["validation_labels"]
    notes = [
        f"Validation, {held_out} more labels, chose checkpoints and cells; who has only the labels that are trained on "
        "chooses less well. Test was read once a run.",
        "All cells of a seed have the same labels; intervals are over seeds of labels and fine-tuning, by Student's t.",
    ]
    if len(plan.study.rates) == 1:
        notes.append("Each cell has one learning rate, that of the recipe; none was searched for.")
    else:
        notes.append(f"Validation chose each cell's learning rate on the first seed, of {len(plan.study.rates)}.")
    if any(cell["start"] in TAUGHT for cell in cells):
        if any(cell["taught_by"] == plan.study.teacher for cell in cells):
            notes.append(
                f"The teacher is {plan.study.teacher}, from outside the study: it may know more than a student."
            )
        else:
            notes.append(
                "A student's teacher is the run of the same seed of the cell that is named: it has learned from the "
                "very labels of its student, and no others."
            )
    if any(cell["start"] == "pretrained" for cell in cells):
        for model in dict.fromkeys(cell["model"] for cell in cells if cell["start"] == "pretrained"):
            pretrained = plan.study.models[model].pretrained
            assert pretrained is not None
            source = pretrained.recipe or pretrained.init_from
            made = "elsewhere"
            if pretrained.recipe is not None:
                made = "on the unlabelled training pictures, those of validation among them, in one run for all seeds"
            notes.append(f"{model} is pretrained by {source}, {made}; its computing is not counted.")
            notes += _seen_test(next(c for c in cells if (c["model"], c["start"]) == (model, "pretrained")))
    return notes


def _seen_test(cell: Record) -> list[str]:
    """A note where the weights that a cell begins from have seen test pictures, or that could not be told."""
    from foreseen.data.open_set import recall_set
    from foreseen.handoff.seen import count_seen, describe_seen

    run = Path(cell["folder"]) / f"seed-{cell['seeds'][0]}"
    data = read_json(run / "result.json")["test_data"]
    test = recall_set(data["path"], data["split"])
    (weights,) = read_json(run / "encoder" / "lineage.json")["parents"]
    said = describe_seen(count_seen(weights["lineage"], test), test)
    return [] if said is None else [said]


def _csv(cells: list[Record]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*_COLUMNS, "seeds", "validation", "test", "test_sd", "test_each", "folder"])
    for cell in cells:
        row = {**cell, "steps": cell["run_steps"], "taught_by": cell["taught_by"] or ""}
        spread = "" if cell["sd"] is None else f"{cell['sd']:.2f}"
        each = " ".join(f"{score:.2f}" for score in cell["test"])
        writer.writerow(
            [
                *(row[column] for column in _COLUMNS), len(cell["seeds"]), f"{mean(cell['validation']):.2f}",
                f"{cell['mean']:.2f}", spread, each, cell["folder"],
            ]
        )  # fmt: skip
    return out.getvalue()


def rows(record: Record) -> tuple[list[str], list[list[str]]]:
    """The table of a study: its head, and a row for each model, start and augmentation."""
    levels = list(record["levels"])
    heads = [f"{level_title(level)}, {_count(record, level)} labels" for level in levels]
    best = {level: record["levels"][level]["best"] for level in levels}
    table: dict[str, list[str]] = {}
    for cell in record["cells"]:
        name = name_of(cell)
        titles = [cell["model"], cell["family"], start_in_words(cell["start"]), cell["augmentation"]]
        row = table.setdefault(name, titles + [""] * len(levels))
        spread = "" if cell["sd"] is None else f" ± {cell['sd']:.1f}"
        mark = " *" if best[cell["labels"]] == name else ""
        row[len(titles) + levels.index(cell["labels"])] = f"{cell['mean']:.1f}{spread}{mark}"
    order = {name: place for place, name in enumerate(dict.fromkeys(cell["model"] for cell in record["cells"]))}
    body = sorted(table.values(), key=lambda row: order[row[0]])
    return ["model", "family", "start", "augmentation", *heads], body


def level_title(labels: str) -> str:
    """A number of labels a class in words."""
    shots = shots_of(labels)
    return "all" if shots is None else f"k = {shots}"


def _count(record: Record, level: str) -> int:
    return next(int(cell["training_labels"]) for cell in record["cells"] if cell["labels"] == level)


def caption(record: Record) -> str:
    """What the numbers of the table are."""
    seeds = {level_title(cell["labels"]): len(cell["seeds"]) for cell in record["cells"]}
    many = ", ".join(f"{name}: {count}" for name, count in seeds.items())
    first = record["cells"][0]
    return (
        f"Top-1 on {first['test_pictures']:,} test pictures in percent (chance is {first['chance']:.1f}), mean ± "
        f"standard deviation over seeds ({many}); * is validation's choice."
    )


def summary(record: Record) -> str:
    """The sentences of all levels, for a terminal."""
    parts = []
    for labels, level in record["levels"].items():
        parts.append(f"{level_title(labels)}:")
        parts += [f"  {sentence}" for sentence in level["sentences"]]
    return "\n".join([*parts, *(f"note: {note}" for note in record["notes"])])


def markdown(record: Record) -> str:
    """`study.md`."""
    head, body = rows(record)
    lines = [f"# What to train on few labels of {record['data']}", ""]
    for labels, level in record["levels"].items():
        lines += [f"## {level_title(labels)}", "", *(f"* {sentence}" for sentence in level["sentences"]), ""]
    lines += ["## The table", "", caption(record), ""]
    lines += [_line(head), _line(["---"] * len(head)), *(_line(row) for row in body), ""]
    lines += ["![the same as a plot](study.png)", ""]
    lines += [f"* {note}" for note in record["notes"]]
    lines += [f"* Left out: {entry['what']}: {entry['why']}." for entry in record["left_out"]]
    made = record["made_by"]
    lines += ["", f"`{' '.join(made['command'])}`, {made['started'][:10]}, {made['machine']['cpu']}."]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
