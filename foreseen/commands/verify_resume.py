"""`foreseen verify-resume`: proof, on this machine and these pictures, that a job is a function of its seed.

The job runs three times, shortened: without a break; killed again and again with SIGKILL, and started again; and cut
into other ranks, micro-batches and loader workers. The three are compared by what each step consumed (the ledger), the
checksums of the pixels made of it, losses, gradient norms and weights.
"""

import json
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from foreseen.commands.compare_runs import Sentence
    from foreseen.commands.launched import LaunchedJob
    from foreseen.commands.verbs import Verb
    from foreseen.config import Config
    from foreseen.engine.objective import Objective

_PATIENCE_S = 3600.0  # without a step
_STEPS_A_KILL = 4  # at the least: it waits for a step that is new, and some for the next save
_RUNS = ("unbroken", "killed", "other-topology")


def verify_resume(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `foreseen recipes`) or the path of a YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as data.path=shards.")] = None,
    kills: Annotated[int, typer.Option(min=1, help="How often the second run is killed.")] = 3,
    saves: Annotated[int | None, typer.Option(min=0, help="Kills in the middle of a save. Default: a third.")] = None,
    steps: Annotated[int | None, typer.Option(min=4, help="Length of each run. Default: 24, or 8 a kill.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Default: the GPUs, or two CPU processes.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for the runs and verify.json; those of an earlier time are removed.")
    ] = Path("verify"),
    seed: Annotated[int, typer.Option(help="Of the moments of the kills.")] = 0,
) -> None:
    """Kill a job at random and run it on another topology; exit 0 if every run came out the same, else 1."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # else the jobs would go on alone
    plan = make_plan(recipe, overrides or [], kills=kills, saves=saves, steps=steps, ranks=ranks, out=out, seed=seed)
    verdict = verify(plan)
    print(verdict.text())
    if not verdict.passed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Topology:
    """How a global batch is cut.

    Attributes:
        accumulation: micro-batches of each rank in a step.
        workers: loader processes of each rank.
    """

    ranks: int
    accumulation: int
    workers: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks × {self.accumulation} micro-batches, {self.workers} loader workers"


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        arguments: the command and its overrides, but for folder and topology.
        usual, other: the topology of the first two runs, and of the third.
        kills, saves: of the second run, and how many of them while it saves.
    """

    arguments: tuple[str, ...]
    global_size: int
    precision: str
    steps: int
    usual: Topology
    other: Topology
    on_cpu: bool
    kills: int
    saves: int
    out: Path
    seed: int


@dataclass
class Verdict:
    """What came out; `lines` holds one sentence a comparison and whether it went well.

    Attributes:
        kills: how the second run was ended, each with the step seen and whether a save was under way.
        resumes: steps that it went on from.
    """

    plan: Plan
    lines: list[tuple[bool, str]] = field(default_factory=list)
    kills: list[dict[str, Any]] = field(default_factory=list)
    resumes: list[int] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every comparison went well."""
        return all(good for good, _ in self.lines)

    def add(self, good: bool, sentence: str) -> None:
        """Take in a comparison."""
        self.lines.append((good, sentence))

    def add_all(self, name: str, sentences: "list[Sentence]") -> None:
        """Take in the comparisons of one run with another."""
        self.lines += [(good, f"{name}: {sentence}") for good, sentence in sentences]

    def text(self) -> str:
        """For a person."""
        lines = [f"{'ok  ' if good else 'FAIL'}  {sentence}" for good, sentence in self.lines]
        end = "the job is the same whatever happens to it" if self.passed else "this job cannot be trusted to go on"
        return "\n".join([*lines, f"verdict: {end}"])

    def save(self) -> None:
        """Write verify.json."""
        from foreseen.files import write_atomically

        facts = {
            "passed": self.passed, "checks": [{"passed": good, "what": what} for good, what in self.lines],
            "kills": self.kills, "resumes": self.resumes, "plan": asdict(self.plan),
        }  # fmt: skip
        write_atomically(self.plan.out / "verify.json", json.dumps(facts, indent=2, default=str) + "\n")


def make_plan(
    recipe: str, overrides: Sequence[str], *, kills: int, saves: int | None, steps: int | None, ranks: int | None,
    out: Path, seed: int,
) -> Plan:  # fmt: skip
    """Decide lengths and topologies for a recipe.

    Raises:
        BadInput: there is no such recipe, or its global batch cannot be cut in two ways.
    """
    from foreseen.errors import BadInput

    verb, config = _find(recipe, overrides)
    gpus = _count_gpus()
    ranks = ranks or (gpus or 2)
    if gpus and ranks > gpus:
        raise BadInput(f"--ranks is {ranks}, and this machine has {gpus} GPUs")
    size, steps = config.batch.global_size, steps or max(24, 8 * kills)
    saves = kills // 3 if saves is None else saves
    if saves > kills:
        raise BadInput(f"--saves is {saves}, more than the {kills} of --kills")
    if steps < _STEPS_A_KILL * kills:
        raise BadInput(f"--steps is {steps}, too few for {kills} kills: give at least {_STEPS_A_KILL * kills}")
    warmup = max(1, steps // 4)
    save_every = max(2, min(steps // 6, steps // (2 * kills)))
    shortened = [
        f"run.steps={steps}", "run.epochs=null", f"run.save_every={save_every}", "run.log_every=1",
        f"run.eval_every={steps}", f"run.pictures_every={steps}", "run.keep_last=3", "run.ledger=pixels",
        "optim.warmup_epochs=null", f"optim.warmup_steps={warmup}", "probe.every=null",
    ]  # fmt: skip
    arguments = (verb, recipe, *overrides, *shortened)
    _, short = _find(recipe, [*overrides, *shortened])
    usual, other = _topologies(verb, short.with_length(size), ranks)
    return Plan(arguments, size, config.compute.precision, steps, usual, other, not gpus, kills, saves, out, seed)


def _count_gpus() -> int:
    """Those that jobs will use."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return 0 if parse_flag_from_env("ACCELERATE_USE_CPU") else torch.cuda.device_count()


def _topologies(verb: "Verb", config: "Config", ranks: int) -> tuple[Topology, Topology]:
    """Two cuts of a recipe's global batch, whose micro-batches differ and are no larger than the recipe's.

    BatchNorm's statistics are over a micro-batch, so a network that has them keeps its size.
    """
    from foreseen.engine.batch_statistics import batch_statistics
    from foreseen.errors import BadInput

    objective = _build(verb, config)
    size, most = config.batch.global_size, config.batch.micro_size or config.batch.global_size

    def micro_sizes(share: int) -> list[int]:
        return [m for m in range(objective.group, min(share, most) + 1, objective.group) if share % m == 0]

    if size % ranks or not (fitting := micro_sizes(size // ranks)):
        among = f" in groups of {objective.group}" if objective.group > 1 else ""
        advice = objective.group_advice(min(size // ranks, most)) if among and size % ranks == 0 else ""
        raise BadInput(
            f"batch.global_size {size} is no multiple of {ranks} ranks{among}: give another --ranks"
            + (f", or set {advice}" if advice else "")
        )
    micro = max((m for m in fitting if m < size // ranks), default=fitting[-1])  # several of them, if it can be
    workers = max(1, config.data.workers)
    usual = Topology(ranks, size // (ranks * micro), workers)
    other_ranks = max(count for count in range(1, max(1, ranks // 2) + 1) if size % count == 0)
    other_micro = micro
    if not batch_statistics(objective):
        others = [m for m in micro_sizes(size // other_ranks) if m != micro]
        other_micro = max((m for m in others if m < micro), default=min(others, default=micro))
    elif (size // other_ranks) % micro:
        other_ranks = ranks
    other = Topology(other_ranks, size // (other_ranks * other_micro), workers + 2)
    if (other.ranks, other.accumulation) == (usual.ranks, usual.accumulation) and not batch_statistics(objective):
        raise BadInput(f"batch.global_size {size} cannot be cut in two ways: take a multiple of 4")
    return usual, other


def _build(verb: "Verb", config: "Config") -> "Objective":
    """The objective of a recipe; without weights, unless it begins from some."""
    import torch

    from foreseen.finetune.methods import METHODS as finetuning
    from foreseen.pretrain.methods import METHODS as pretraining
    from foreseen.tokenizers.methods import METHODS as tokenizing

    name = config.method.name
    with torch.device("meta" if config.model.init_from is None else "cpu"):
        if verb == "finetune":
            return finetuning[name].build(config, 10)
        return pretraining[name].build(config) if verb == "pretrain" else tokenizing[name].build(config)


def verify(plan: Plan) -> Verdict:
    """Make the three runs and compare them."""
    from foreseen.commands.compare_runs import check_epochs, check_moves, compare_other_topology, compare_same_topology

    _clear(plan.out)
    verdict = Verdict(plan)
    started = time.monotonic()
    whole, killed, other = (plan.out / name for name in _RUNS)
    print(f"unbroken: {plan.steps} steps of {plan.global_size} on {plan.usual}", flush=True)
    if _run_to_end(plan, plan.usual, whole, verdict):
        verdict.add(*check_moves(whole))
        print(f"killed: {plan.kills} times, {plan.saves} of them in a save", flush=True)
        if _kill_and_go_on(plan, killed, verdict):
            verdict.add_all("killed", compare_same_topology(whole, killed, on_cpu=plan.on_cpu))
        print(f"another topology: {plan.other}", flush=True)
        if _run_to_end(plan, plan.other, other, verdict):
            compared = compare_other_topology(whole, other, precision=plan.precision, on_cpu=plan.on_cpu)
            verdict.add_all("other topology", compared)
        verdict.add(*check_epochs(whole))
    print(f"took {time.monotonic() - started:.0f} s; runs and verify.json: {plan.out}")
    plan.out.mkdir(parents=True, exist_ok=True)
    verdict.save()
    return verdict


def _clear(out: Path) -> None:
    """Remove what an earlier time left, or runs would go on from there, and nothing else that lies beside it."""
    for name in _RUNS:
        _log_of(out / name).unlink(missing_ok=True)
        if (out / name).exists():
            shutil.rmtree(out / name)
    (out / "verify.json").unlink(missing_ok=True)


def _find(recipe: str, overrides: Sequence[str]) -> "tuple[Verb, Config]":
    """The verb that knows a recipe, and its config."""
    import yaml

    from foreseen.commands.verbs import VERBS, load_recipe, method_options
    from foreseen.config import find_recipe, recipe_names
    from foreseen.errors import BadInput

    if not recipe.endswith((".yaml", ".yml")):
        for verb in VERBS:
            if recipe in recipe_names(verb):
                return verb, load_recipe(verb, recipe, overrides)
        names = ", ".join(name for verb in VERBS for name in recipe_names(verb))
        raise BadInput(f"there is no recipe {recipe!r}; there are {names}, or give the path of a .yaml file")
    raw = yaml.safe_load(find_recipe("pretrain", recipe).read_text(encoding="utf-8"))
    method = (raw.get("method") or {}).get("name") if isinstance(raw, dict) else None
    verb = next((verb for verb in VERBS if method in method_options(verb)), VERBS[0])
    return verb, load_recipe(verb, recipe, overrides)


def _start(plan: Plan, topology: Topology, run: Path) -> "LaunchedJob":
    from foreseen.commands.launched import LaunchedJob

    micro_size = plan.global_size // (topology.ranks * topology.accumulation)
    arguments = [
        *plan.arguments, f"run.dir={json.dumps(str(run), ensure_ascii=False)}", f"batch.micro_size={micro_size}",
        f"data.workers={topology.workers}",
    ]  # fmt: skip
    return LaunchedJob(arguments, run=run, log=_log_of(run), ranks=topology.ranks, on_cpu=plan.on_cpu)


def _log_of(run: Path) -> Path:
    """Where all starts of a run print."""
    return run.with_name(f"{run.name}.log")


def _run_to_end(plan: Plan, topology: Topology, run: Path, verdict: Verdict) -> bool:
    with _start(plan, topology, run) as job:
        code = job.wait_while_it_moves(_PATIENCE_S)
        if code != 0:
            verdict.add(False, f"the run on {topology} {_how_it_ended(job)}")
        left = job.survivors() if code is not None else []
        if left:
            verdict.add(False, f"{len(left)} processes outlived the run on {topology}")
    return code == 0


def _how_it_ended(job: "LaunchedJob") -> str:
    code = job.launcher.poll()
    if code is None:
        return f"made no step in {_PATIENCE_S:.0f} s ({job.log})"
    last = job.output().strip().splitlines()[-1:] or ["it said nothing"]
    return f"ended with exit code {code}: {last[0]} ({job.log})"


def _kill_and_go_on(plan: Plan, run: Path, verdict: Verdict) -> bool:
    """Kill and start a run until it has been killed often enough, then let it end; whether it did."""
    choose = random.Random(plan.seed)
    in_save = set(choose.sample(range(plan.kills), plan.saves))
    missed = 0
    for number in range(plan.kills):
        # Spread over the run, so that the kills find progress and leave steps for those that follow.
        step = round((number + choose.uniform(0.2, 0.9)) * (plan.steps - 1) / plan.kills)
        wants_save = number in in_save or missed > 0
        with _start(plan, plan.usual, run) as job:
            kill = _kill_at(job, max(1, step), wants_save, choose)
            if kill is None:
                ended = _how_it_ended(job)
                if job.launcher.poll() == 0:
                    ended = "came too late: the run was at its end; give more --steps, or fewer --kills"
                verdict.add(False, f"kill {number + 1}, meant for step {step}: {ended}")
                return False
            verdict.kills.append(kill)
        # A save that was over before the kill came is made up for by a later one.
        missed += (number in in_save) - (wants_save and kill["in_save"])
    if not _run_to_end(plan, plan.usual, run, verdict):
        return False
    output = _log_of(run).read_text(encoding="utf-8", errors="replace")
    verdict.resumes = [int(step) for step in re.findall(r"^going on from step (\d+)", output, flags=re.MULTILINE)]
    in_saves = sum(kill["in_save"] for kill in verdict.kills)
    steps = ", ".join(str(kill["step"]) for kill in verdict.kills)
    verdict.add(
        all(kill["step"] > 0 for kill in verdict.kills) and in_saves >= plan.saves,
        f"{len(verdict.kills)} kills at steps {steps}, {in_saves} of them inside a save",
    )
    verdict.add(any(verdict.resumes), f"it went on from steps {', '.join(map(str, verdict.resumes)) or 'none'}")
    left = sum(kill["survivors"] for kill in verdict.kills)
    verdict.add(not left, f"{left or 'no'} processes outlived their job")
    return True


def _kill_at(job: "LaunchedJob", step: int, in_save: bool, choose: random.Random) -> dict[str, Any] | None:
    """Kill a job once it has made progress; what was killed and where, or None if it ended before."""
    from foreseen.commands.launched import last_step

    before = last_step(job.run)
    if not job.wait_for_step(max(step, before + 1), _PATIENCE_S):
        return None
    members = job.processes()
    if in_save and not job.wait_for_save(_PATIENCE_S):
        return None
    victims = ["everything", "one rank", "the launcher"] if job.ranks > 1 else ["everything"]
    victim = "everything" if in_save else choose.choice(victims)
    if victim == "one rank":
        job.kill_one_rank(choose)
    elif victim == "the launcher":
        job.kill_launcher()
    else:
        job.kill(members)
    survivors = len(job.survivors())
    if job.launcher.poll() == 0:
        return None
    unfinished = sorted(path.name for path in (job.run / "checkpoints").glob(".*-*"))
    return {"victim": victim, "step": last_step(job.run), "in_save": bool(unfinished), "survivors": survivors}
