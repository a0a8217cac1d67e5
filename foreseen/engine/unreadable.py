"""The samples that a run could not read: counted, listed by name in `unreadable.jsonl`, and when they are too many.

A sample counts once, however many epochs, ranks or substitutes meet it: the count is then the share of the set that is
bad, and a shard that breaks in the hundredth epoch weighs as much as one that was broken from the start. Occurrences
would be diluted by all the epochs before.

All ranks know the same, and what they know is a function of the positions read so far; so the list of a run that was
killed, or that had other ranks or workers, is the list of the unbroken one.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import Accelerator

from foreseen.data.batch import Problem
from foreseen.engine.objective import all_reduce_sum
from foreseen.errors import BadInput
from foreseen.files import parse_json, write_atomically

FILE_NAME = "unreadable.jsonl"
TRAINING: Final = "training"
_NAMED = 3  # in a refusal; the file has them all


class UnreadableList:
    """The list of one run.

    Args:
        folder: the run folder.
        accelerator: its rank 0 writes.

    Attributes:
        trained: numbers of the training samples that could not be read, the same on every rank.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.file = folder / FILE_NAME
        self.trained: set[int] = set()
        self._accelerator = accelerator
        self._listed: set[tuple[str, str, int]] = set()
        self._examples: list[Problem] = []

    def recall(self, step: int | None = None, trained: Iterable[int] = ()) -> None:
        """Take up what earlier processes of the run listed.

        Args:
            step: updates made; later lines, of a run that was killed, are dropped. None keeps all, and 0 none.
            trained: as the checkpoint knew them.
        """
        lines: list[list[dict[str, Any]]] = [[]]
        if self._accelerator.is_main_process and self.file.is_file():
            lines = [[line for line in _read(self.file) if step is None or (step and line["step"] <= step)]]
            if step is not None:
                write_atomically(self.file, "".join(json.dumps(line) + "\n" for line in lines[0]))
        if self._accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(lines, src=0)
        self.trained, self._listed, self._examples = set(trained), set(), []
        for line in lines[0]:
            problem = Problem(0, *(line[name] for name in Problem._fields[1:]))
            self._listed.add(_identity(problem))
            if line["use"] == TRAINING and len(self._examples) < _NAMED:
                self._examples.append(problem)

    def add(self, problems: Sequence[Problem], use: str, step_of: Callable[[Problem], int]) -> list[Problem]:
        """List what is new of the problems of all ranks; to be called on each of them.

        Args:
            problems: of this rank.
            use: "training", "validation", "test" or "probe".
            step_of: the step that a problem is listed under.

        Returns:
            Those that are new, in the order of their positions; the same on every rank.
        """
        new = []
        for problem in gather_problems(problems, self._accelerator):
            if use == TRAINING:
                self.trained.add(problem.sample)
            if _identity(problem) not in self._listed:
                self._listed.add(_identity(problem))
                new.append(problem)
        if use == TRAINING:
            self._examples += new[: _NAMED - len(self._examples)]
        if new and self._accelerator.is_main_process:
            with open(self.file, "a", encoding="utf-8") as out:
                for problem in new:
                    out.write(json.dumps({"step": step_of(problem), "use": use, **describe_problem(problem)}) + "\n")
        return new

    def check(self, limit: float, total: int) -> None:
        """Refuse to go on past the limit.

        Args:
            limit: `data.max_bad_fraction`.
            total: samples that are trained on.

        Raises:
            BadInput: says how many there are, where the list is, the first of them, and what to do.
        """
        if len(self.trained) <= limit * total:
            return
        such = "; ".join(map(str, self._examples))
        path = self._examples[0].path if self._examples else "SET"
        raise BadInput(
            f"{len(self.trained):,} of the {total:,} samples trained on cannot be read, more than "
            f"data.max_bad_fraction {limit:g} allows: {self.file} lists them ({such}); `foreseen data check {path}` "
            "looks at all of the set and `foreseen data repair` writes a clean copy, or raise data.max_bad_fraction"
        )

    def summary(self, total: int) -> str | None:
        """A sentence for the end of the run; None where everything could be read."""
        if not self._listed:
            return None
        others = len(self._listed) - len(self.trained)
        beside = f", and {others:,} that it was judged by" if others > 0 else ""
        return (
            f"{len(self.trained):,} of the {total:,} samples trained on could not be read and were replaced{beside}: "
            f"{self.file} lists them"
        )


def gather_problems(problems: Sequence[Problem], accelerator: Accelerator) -> list[Problem]:
    """The problems of all ranks without repetitions, in the order of their positions; the same on every rank."""
    count = all_reduce_sum(torch.tensor(len(problems), dtype=torch.int64, device=accelerator.device))
    parts: list[list[Problem]] = [list(problems)]
    if accelerator.num_processes > 1 and int(count):
        parts = [[] for _ in range(accelerator.num_processes)]
        torch.distributed.all_gather_object(parts, list(problems))
    return sorted({problem for part in parts for problem in part})


def describe_problem(problem: Problem) -> dict[str, Any]:
    """A problem as plain values, without the position."""
    described = problem._asdict()
    del described["position"]
    return described


def _identity(problem: Problem) -> tuple[str, str, int]:
    return problem.path, problem.split, problem.sample


def _read(file: Path) -> list[dict[str, Any]]:
    """The lines that are whole: a kill may have cut the last one short."""
    kinds = {"step": int, "use": str} | {name: Problem.__annotations__[name] for name in Problem._fields[1:]}
    found = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in kinds.items()):
            found.append(entry)
    return found
