"""What a study found: study.json, study.csv, study.md, and the sentences that answer its question.

Every choice is made by validation, over the seeds of a cell; what is reported is test. Differences are taken seed by
seed, since all cells of a seed have the same labels.
"""

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from foreseen.commands.controls import scores
from foreseen.commands.study_options import TAUGHT, in_words, shots_of
from foreseen.files import read_json, write_atomically
from foreseen.masked import masked
from foreseen.paired import PairedDifference, paired_difference

if TYPE_CHECKING:
    from foreseen.commands.study_plan import Cell, Plan

Record = dict[str, Any]
_COLUMNS = ("labels", "model", "family", "start", "augmentation", "taught_by", "base_lr", "steps")


def validation(cell: "Cell") -> float:
    """The mean top-1 of a finished cell on validation, over its seeds."""
    return mean(scores(cell.chosen(), cell.seeds)["validation"])


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
        levels[labels] = _level(labels, here)
    record = {
        "data": masked(str((plan.raw.get("data") or {}).get("path") or "procedural pets")),
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


def _record(cell: "Cell") -> Record:
    fit = cell.chosen()
    result = read_json(fit.seeded(cell.seeds[0]).run.dir / "result.json")
    lineage = read_json(fit.seeded(cell.seeds[0]).run.dir / "encoder" / "lineage.json")
    return {
        **cell.key._asdict(),
        "family": cell.family,
        "taught_by": cell.taught_by,
        "folder": str(fit.config.run.dir),
        "images_seen": lineage["config"]["run"]["steps"] * lineage["config"]["batch"]["global_size"],
        "training_labels": result["training_samples"],
        "validation_labels": int(result["validation"]["count"]),
        "test_pictures": int(result["test"]["count"]),
        "rates": {f"{other.config.optim.base_lr:.3g}": _first_validation(other, cell) for other in cell.rates},
        **scores(fit, cell.seeds),
    }


def _first_validation(fit: Any, cell: "Cell") -> float:
    value: float = scores(fit, cell.seeds[:1])["validation"][0]
    return value


def _level(labels: str, cells: list[Record]) -> Record:
    """What came out with so many labels: sentences, the comparisons that they state, and the names of the chosen."""
    best = _chosen(cells)
    sentences = [_answer(best, cells)]
    comparisons: dict[str, Any] = {}

    def compare(name: str, above: Iterable[Record], below: Iterable[Record], say: Callable[[str], str]) -> None:
        pairs = list(zip(above, below, strict=True))
        if not pairs:
            return
        treated, control = ([mean(values) for values in zip(*(cell["test"] for cell in side), strict=True)]
                            for side in zip(*pairs, strict=True))  # fmt: skip
        difference = paired_difference(treated, control)
        comparisons[name] = asdict(difference)
        sentences.append(say(describe_difference(difference)))

    for part, word in (("start", "start"), ("model", "model")):
        if others := [cell for cell in cells if cell[part] != best[part]]:
            next_best = _chosen(others)
            compare(
                f"against the next {word}", [best], [next_best],
                lambda text, word=word, next_best=next_best: (  # type: ignore[misc]
                    f"Against the best of another {word}, {title(next_best)}: {text}."
                ),
            )  # fmt: skip
    for cell in _by(cells, start="pretrained", chosen="model"):
        control = _chosen([other for other in cells if other["model"] == cell["model"] and other["start"] == "scratch"])
        compare(
            f"pretraining of {cell['model']}", [cell], [control],
            lambda text, cell=cell: f"Pretraining {cell['model']}, each side at its best: {text}.",  # type: ignore[misc]
        )  # fmt: skip
    for start in TAUGHT:
        pairs = _pairs(cells, "start", start, "scratch")
        compare(
            f"{start} distillation", [a for a, _ in pairs], [b for _, b in pairs],
            lambda text, start=start, pairs=pairs: (  # type: ignore[misc]
                f"{start.capitalize()} distillation against the same student on labels alone "
                f"({_over(pairs)}; the teacher is {pairs[0][0]['taught_by']}): {text}."
            ),
        )  # fmt: skip
    pairs = _pairs(cells, "start", "hard", "soft")
    compare(
        "hard against soft", [a for a, _ in pairs], [b for _, b in pairs],
        lambda text: f"Folklore says that hard beats soft distillation. Here, hard against soft ({_over(pairs)}): {text}.",
    )  # fmt: skip
    scratch = {cell["family"]: cell for cell in reversed(_by(cells, start="scratch", chosen="family"))}
    if {"CNN", "ViT"} <= scratch.keys():
        cnn, vit = scratch["CNN"], scratch["ViT"]
        compare(
            "CNN against ViT, from scratch", [cnn], [vit],
            lambda text: (
                "Folklore says that without pretraining a small CNN beats a small ViT. Here, the best from scratch of "
                f"either, {title(cnn)} against {title(vit)}: {text}."
            ),
        )  # fmt: skip
    first, *more = dict.fromkeys(cell["augmentation"] for cell in cells)
    for augmentation in more:
        pairs = _pairs(cells, "augmentation", augmentation, first)
        compare(
            f"{augmentation} against {first}", [a for a, _ in pairs], [b for _, b in pairs],
            lambda text, augmentation=augmentation, pairs=pairs: (  # type: ignore[misc]
                f"Augmentation, {augmentation} against {first} ({_over(pairs)}): {text}."
            ),
        )  # fmt: skip
    top = max(cells, key=lambda cell: cell["mean"])
    if top is not best:
        sentences.append(f"On test, {title(top)} came out higher ({top['mean']:.1f}), which validation did not see.")
    return {"best": _name(best), "sentences": sentences, "comparisons": comparisons}


def describe_difference(difference: PairedDifference) -> str:
    """A paired difference in words."""
    gain = f"{difference.mean:+.1f} points"
    if difference.low is None or difference.high is None:
        return f"{gain}, on one seed, so without an interval"
    few = "; two seeds allow no useful interval" if len(difference.each) == 2 else ""
    interval = f"{gain}, 95 % interval {difference.low:+.1f} to {difference.high:+.1f}{few}"
    if difference.low > 0:
        return f"better, {interval}"
    if difference.high < 0:
        return f"worse, {interval}"
    return f"no difference that can be told, {interval}"


def title(cell: Record) -> str:
    """A cell in words."""
    return f"{cell['model']}, {cell['start']}, {cell['augmentation']}"


def _answer(best: Record, cells: list[Record]) -> str:
    count = best["training_labels"]
    shots = "" if best["labels"] == "all" else f" ({in_words(best['labels'])})"
    spread = "" if best["sd"] is None else f" ± {best['sd']:.1f}"
    return (
        f"With {count} labels{shots} and {best['validation_labels']} more to choose by, train {title(best)}: "
        f"{best['mean']:.1f}{spread} % of the test pictures, over {_seeds(best)}; validation chose it among {len(cells)}."
    )


def _seeds(cell: Record) -> str:
    count = len(cell["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


def _name(cell: Record) -> str:
    return "/".join(cell[part] for part in ("model", "start", "augmentation"))


def _chosen(cells: Sequence[Record]) -> Record:
    return max(cells, key=lambda cell: mean(cell["validation"]))


def _by(cells: list[Record], *, start: str, chosen: str) -> list[Record]:
    """The best by validation of each kind among those of a start, the best first."""
    kinds = dict.fromkeys(cell[chosen] for cell in cells if cell["start"] == start)
    found = [_chosen([cell for cell in cells if cell["start"] == start and cell[chosen] == kind]) for kind in kinds]
    return sorted(found, key=lambda cell: -mean(cell["validation"]))


def _pairs(cells: list[Record], part: str, one: str, other: str) -> list[tuple[Record, Record]]:
    """Cells that differ in one part alone."""

    def rest(cell: Record) -> tuple[str, ...]:
        return tuple(cell[name] for name in ("model", "start", "augmentation") if name != part)

    others = {rest(cell): cell for cell in cells if cell[part] == other}
    return [(cell, others[rest(cell)]) for cell in cells if cell[part] == one and rest(cell) in others]


def _over(pairs: list[tuple[Record, Record]]) -> str:
    models = dict.fromkeys(cell["model"] for cell, _ in pairs)
    return f"mean over {len(pairs)} cells of {', '.join(models)}" if len(pairs) > 1 else title(pairs[0][0])


def _notes(plan: "Plan", cells: list[Record]) -> list[str]:
    """What a reader must know to believe the numbers."""
    notes = [
        "Validation chose checkpoints, learning rates and cells; it has more labels than the smallest k trains on, so the "
        "choice knows more than k labels a class. Test was read once a run.",
        "All cells of a seed have the same labels; intervals are over seeds of labels and fine-tuning, by Student's t.",
    ]
    if any(cell["start"] in TAUGHT for cell in cells):
        if any(cell["taught_by"] == plan.study.teacher for cell in cells):
            notes.append(f"The teacher is {plan.study.teacher}, from outside the study: it may know more than a student.")
        else:
            notes.append(
                "A student's teacher is the run of the same seed of the cell that is named: it has learned from the very "
                "labels of its student, and no others."
            )
    if plan.study.models and any(cell["start"] == "pretrained" for cell in cells):
        for model in dict.fromkeys(cell["model"] for cell in cells if cell["start"] == "pretrained"):
            pretrained = plan.study.models[model].pretrained
            assert pretrained is not None
            source = pretrained.recipe or pretrained.init_from
            made = "on the unlabelled training pictures, one run for all seeds" if pretrained.recipe else "made elsewhere"
            notes.append(f"{model} is pretrained by {source}, {made}; its computing is not counted.")
    return notes


def _csv(cells: list[Record]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow([*_COLUMNS, "seeds", "validation", "test", "test_sd", "test_each", "folder"])
    for cell in cells:
        row = {**cell, "steps": cell["steps"][0], "taught_by": cell["taught_by"] or ""}
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
        name = _name(cell)
        row = table.setdefault(name, [cell["model"], cell["family"], cell["start"], cell["augmentation"]] + [""] * len(levels))
        spread = "" if cell["sd"] is None else f" ± {cell['sd']:.1f}"
        mark = " *" if best[cell["labels"]] == name else ""
        row[4 + levels.index(cell["labels"])] = f"{cell['mean']:.1f}{spread}{mark}"
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
    pictures = record["cells"][0]["test_pictures"]
    return f"Top-1 on {pictures:,} test pictures in percent, mean ± standard deviation over seeds ({many}); * validation's choice."


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
