"""What a study answers at a number of labels: what to train, by how much, and whether the folklore holds.

Every choice is made by validation, over the seeds of a cell; what is reported is test. Differences are taken seed by
seed, since all cells of a seed have the same labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

from foreseen.commands.study_options import TAUGHT, in_words
from foreseen.paired import PairedDifference, paired_difference

Record = dict[str, Any]
_PARTS = ("model", "start", "augmentation")
_STARTS = {"hard": "distilled hard", "soft": "distilled soft"}


@dataclass(frozen=True)
class Comparison:
    """Cells against others, pair by pair.

    Attributes:
        name: for `study.json`.
        sentence: with {} where the difference goes.
        pairs: of which the mean is taken, seed by seed.
    """

    name: str
    sentence: str
    pairs: Sequence[tuple[Record, Record]]

    def difference(self) -> PairedDifference:
        """Of the mean over the pairs, over the seeds, in points of test top-1."""
        above, below = (
            [mean(scores) for scores in zip(*(cell["test"] for cell in side), strict=True)]
            for side in zip(*self.pairs, strict=True)
        )
        return paired_difference(above, below)


def find(cells: list[Record]) -> Record:
    """What came out with so many labels.

    Args:
        cells: of one level, as in `study.json`.

    Returns:
        The name of the cell to train, sentences, and the differences that they state.
    """
    best = best_of(cells)
    sentences, differences = [_answer(best, cells)], {}
    for comparison in _comparisons(best, cells):
        difference = comparison.difference()
        differences[comparison.name] = asdict(difference)
        sentences.append(comparison.sentence.replace("{}", describe_difference(difference)))
    top = max(cells, key=lambda cell: cell["mean"])
    if top["mean"] > best["mean"]:
        apart = describe_difference(paired_difference(top["test"], best["test"]))
        sentences.append(
            f"On test {title(top)} came out highest, at {top['mean']:.1f} % ({apart}); the highest of {len(cells)} is "
            "partly luck."
        )
    if (chance := best.get("chance")) is not None and _low_end(best) <= chance:
        sentences.append(f"The best cell cannot be told from guessing ({chance:.1f} %): nothing here is to be taken.")
    return {"best": name_of(best), "sentences": sentences, "differences": differences}


def _low_end(cell: Record) -> float:
    """Of the 95 % interval of a cell's accuracy over its seeds, or the accuracy where one seed allows none."""
    interval = paired_difference(cell["test"], [0.0] * len(cell["test"]))
    return cell["mean"] if interval.low is None else interval.low


def describe_difference(difference: PairedDifference) -> str:
    """A paired difference in words."""
    gain = f"{difference.mean:+.1f} points"
    if difference.low is None or difference.high is None:
        return f"{gain}, on one seed, so without an interval"
    few = "; two seeds allow no useful interval" if len(difference.each) == 2 else ""
    interval = f"{gain}, 95 % interval {difference.low:+.1f} to {difference.high:+.1f}{few}"
    if few:
        return interval
    if difference.low > 0:
        return f"better by {interval}"
    if difference.high < 0:
        return f"worse, {interval}"
    return f"no difference that can be told, {interval}"


def title(cell: Record) -> str:
    """A cell in words."""
    return f"{cell['model']}, {start_in_words(cell['start'])}, {cell['augmentation']}"


def start_in_words(start: str) -> str:
    """Where a cell starts from, for people."""
    return _STARTS.get(start, start)


def name_of(cell: Record) -> str:
    """A cell as `study.teacher` would name it."""
    return "/".join(cell[part] for part in _PARTS)


def best_of(cells: Sequence[Record]) -> Record:
    """The cell that validation prefers."""
    return max(cells, key=lambda cell: mean(cell["validation"]))


def _answer(best: Record, cells: list[Record]) -> str:
    shots = "" if best["labels"] == "all" else f" ({in_words(best['labels'])})"
    spread = "" if best["sd"] is None else f" ± {best['sd']:.1f}"
    seeds = "one seed" if len(best["seeds"]) == 1 else f"{len(best['seeds'])} seeds"
    return (
        f"With {best['training_labels']} labels{shots} and {best['validation_labels']} more to choose by, train "
        f"{title(best)}: {best['mean']:.1f}{spread} % of the test pictures, over {seeds}; validation chose it among "
        f"{len(cells)}."
    )


def _comparisons(best: Record, cells: list[Record]) -> Iterator[Comparison]:
    yield from _rivals(best, cells)
    yield from _pretraining(cells)
    yield from _distillation(cells)
    yield from _families(cells)
    yield from _augmentations(cells)


def _rivals(best: Record, cells: list[Record]) -> Iterator[Comparison]:
    """The best cell against the best of another start, and of another model."""
    rivals: dict[str, tuple[Record, list[str]]] = {}
    for part in ("start", "model"):
        if others := [cell for cell in cells if cell[part] != best[part]]:
            rival = best_of(others)
            rivals.setdefault(name_of(rival), (rival, []))[1].append(f"another {part}")
    for rival, kinds in rivals.values():
        against = f"against the best of {' and of '.join(kinds)}"
        yield Comparison(against, f"{against.capitalize()}, {title(rival)}: {{}}.", [(best, rival)])


def _pretraining(cells: list[Record]) -> Iterator[Comparison]:
    for model in dict.fromkeys(cell["model"] for cell in cells):
        sides = [_having(cells, model=model, start=start) for start in ("pretrained", "scratch")]
        if all(sides):
            sentence = f"Pretraining of {model}, each side at its best augmentation: {{}}."
            yield Comparison(f"pretraining of {model}", sentence, [(best_of(sides[0]), best_of(sides[1]))])


def _distillation(cells: list[Record]) -> Iterator[Comparison]:
    for start in TAUGHT:
        if pairs := _pairs(cells, "start", start, "scratch"):
            teacher = pairs[0][0]["taught_by"]
            sentence = f"{start.capitalize()} distillation from {teacher}, against labels alone ({_over(pairs)}): {{}}."
            yield Comparison(f"{start} distillation against labels alone", sentence, pairs)
    if pairs := _pairs(cells, "start", "hard", "soft"):
        sentence = f"Folklore: hard beats soft distillation. Here, hard against soft ({_over(pairs)}): {{}}."
        yield Comparison("hard against soft", sentence, pairs)


def _families(cells: list[Record]) -> Iterator[Comparison]:
    sides = [_having(cells, family=family, start="scratch") for family in ("CNN", "ViT")]
    if all(sides):
        cnn, vit = map(best_of, sides)
        sentence = (
            "Folklore: without pretraining a small CNN beats a small ViT. Here, the best of either from scratch, "
            f"{title(cnn)} against {title(vit)}: {{}}."
        )
        yield Comparison("CNN against ViT, from scratch", sentence, [(cnn, vit)])


def _augmentations(cells: list[Record]) -> Iterator[Comparison]:
    first, *more = dict.fromkeys(cell["augmentation"] for cell in cells)
    for augmentation in more:
        if pairs := _pairs(cells, "augmentation", augmentation, first):
            what = f"{augmentation} against {first}"
            yield Comparison(what, f"Augmentation, {what} ({_over(pairs)}): {{}}.", pairs)


def _having(cells: list[Record], **parts: str) -> list[Record]:
    return [cell for cell in cells if all(cell[part] == value for part, value in parts.items())]


def _pairs(cells: list[Record], part: str, one: str, other: str) -> list[tuple[Record, Record]]:
    """Cells that differ in one part alone."""

    def rest(cell: Record) -> tuple[str, ...]:
        return tuple(cell[name] for name in _PARTS if name != part)

    others = {rest(cell): cell for cell in cells if cell[part] == other}
    return [(cell, others[rest(cell)]) for cell in cells if cell[part] == one and rest(cell) in others]


def _over(pairs: list[tuple[Record, Record]]) -> str:
    """Of which cells a mean is taken."""
    of = "; ".join(dict.fromkeys(cell["model"] for cell, _ in pairs))
    return f"mean of {len(pairs)} cells: {of}" if len(pairs) > 1 else f"of {of}"
