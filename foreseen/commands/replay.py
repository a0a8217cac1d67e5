"""`foreseen replay`: make one step of a run again, and tell which samples and which module it went wrong in."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from foreseen.commands.verbs import Verb
    from foreseen.config import Config
    from foreseen.engine.bundle import Bundle
    from foreseen.engine.replay import Findings, Number, Replay

NOT_REPRODUCED = 1
_SHOWN = 5


def replay(
    bundle: Annotated[Path, typer.Argument(help="RUN/bundles/step-N, which a run writes when a step goes wrong.")],
    data: Annotated[
        str | None, typer.Option(help="Where the pictures lie now, if not where the run found them.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for what the replay keeps, in place of the bundle itself.")
    ] = None,
) -> None:
    """Make one step of a run again, in one process, from a bundle that the run wrote when the step went wrong.

    Says whether loss and gradient norm come out as recorded, the first module whose output is not finite, parameters
    whose gradient is not, and the samples that stand out. The state before the step is kept, so the next replay
    computes the step alone. Exit code 0: reproduced; 1: not.
    """
    from foreseen.commands.verbs import leave
    from foreseen.engine.bundle import read_bundle

    reproduced = run(read_bundle(bundle), bundle, data=data, out=out)
    leave(preempted=False)
    if not reproduced:
        raise typer.Exit(NOT_REPRODUCED)


def run(bundle: "Bundle", folder: Path, *, data: str | None, out: Path | None) -> bool:
    """Whether the step of a bundle is reproduced; tells the rest.

    Args:
        bundle: what lies in `folder`.
        folder: is written to, unless there is `out`.
        data: of the option.
        out: of the option.
    """
    from dataclasses import asdict

    from pydantic_core import to_json

    from foreseen.commands.session import open_shards, session
    from foreseen.commands.verbs import command_of
    from foreseen.engine.replay import replay as make_again
    from foreseen.errors import BadInput
    from foreseen.files import write_atomically

    work = _prepare(bundle, folder, out)
    verb, config = _config(bundle, work, data)
    with session(config) as (accelerator, say):
        if accelerator.num_processes > 1:
            raise BadInput("foreseen replay is one process, also for a run of several ranks: start it without launcher")
        shards = open_shards(config, config.data.split, accelerator)
        job = command_of(verb).make_job(config, shards)
        result = make_again(job, bundle, accelerator, say, keep=out is not None)
        facts = asdict(result) | {"equal": result.is_equal, "reproduced": result.is_reproduced}
        write_atomically(work / "replay.json", to_json(facts, indent=1, inf_nan_mode="strings"))
        for line in lines(bundle, result, work):
            say(line)
    return result.is_reproduced


def _prepare(bundle: "Bundle", folder: Path, out: Path | None) -> Path:
    """The folder to work in, with the bundle's checkpoint in it."""
    from foreseen.engine.bundle import share_checkpoint
    from foreseen.errors import BadInput

    work = out or folder
    try:
        work.mkdir(parents=True, exist_ok=True)
        (work / ".lock").touch()
        found = (folder / "checkpoints").glob("step-*") if out is not None else ()
        for checkpoint in found:
            if not (work / "checkpoints" / checkpoint.name).exists():
                share_checkpoint(folder / "checkpoints", int(checkpoint.name[5:]), work / "checkpoints")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{work} cannot be written ({error}); give --out FOLDER, where the state before the step may be kept"
        ) from error
    return work


def _config(bundle: "Bundle", work: Path, data: str | None) -> "tuple[Verb, Config]":
    from foreseen.commands.verbs import VERBS, method_options
    from foreseen.config import resolve
    from foreseen.engine.replay import config_for
    from foreseen.errors import BadInput

    verb = next((verb for verb in VERBS if verb == bundle.verb), None)
    if verb is None:
        raise BadInput(f"the bundle is of foreseen {bundle.verb or '?'}, and {', '.join(VERBS)} can be replayed")
    config = config_for(bundle, resolve(bundle.run["config"], method_options(verb)))
    where = config.data if data is None else config.data.model_copy(update={"path": data})
    return verb, config.model_copy(update={"data": where, "run": config.run.model_copy(update={"dir": work})})


def lines(bundle: "Bundle", result: "Replay", work: Path) -> Iterator[str]:
    """What a person is told."""
    yield bundle.sentence
    yield from map(_number, result.numbers)
    yield _verdict(result)
    yield from _inside(result.findings)
    yield from _samples(bundle, result)
    if result.kept:
        yield f"{work}/checkpoints/step-{result.step} is the state before the step: the next replay begins there"
    else:
        yield (
            "the state before the step is not kept in the bundle, since it may not be the run's to the bit; "
            "--out FOLDER keeps it elsewhere"
        )


def _number(number: "Number") -> str:
    agrees = "equal" if number.is_equal else f"relative difference {number.difference:.1e}"
    return f"  {number.name:12} recorded {number.recorded:<12.7g} made again {number.found:<12.7g} {agrees}"


def _verdict(result: "Replay") -> str:
    steps, equal = result.way
    way = f"; of {steps} steps on the way there, {equal} are, too" if steps else ""
    if result.is_equal:
        return f"reproduced, bit for bit{way}"
    verdict = (
        f"reproduced, to within {result.tolerance:g}" if result.is_reproduced else "NOT reproduced"
    ) + f", not bit for bit{way}"
    if result.differs:
        return f"{verdict}; bits are promised only where nothing differs: {', '.join(result.differs)}"
    return verdict + (", though nothing differs" if result.promised else "; a GPU does not promise bits")


def _inside(findings: "Findings") -> Iterator[str]:
    if findings.weights:
        yield f"weights that were not finite before the step: {_some(findings.weights)}"
    if findings.module is not None:
        module = f"module {findings.module}" if findings.module else "the loss itself, outside of every module"
        cause = "from finite input" if findings.input_was_finite else "its input was not finite already"
        yield f"first output that is not finite: {module}, {cause}"
    if findings.gradients:
        yield f"gradients that are not finite, the last layers first: {_some(findings.gradients)}"
    elif findings.largest:
        largest = sorted(findings.largest.items(), key=lambda item: item[1], reverse=True)
        yield "largest gradients: " + ", ".join(f"{name} {norm:.3g}" for name, norm in largest[:_SHOWN])


def _samples(bundle: "Bundle", result: "Replay") -> Iterator[str]:
    if result.groups is None:
        yield "samples cannot be told apart: the method has BatchNorm, which needs several at a time"
        return
    size = len(bundle.samples) // len(result.groups)
    of = f"of {len(result.groups)} {'samples' if size == 1 else f'groups of {size} samples'}"
    if not result.outlying:
        yield f"none {of} stands out"
        return
    yield f"{len(result.outlying)} {of} stand out, by loss or gradient:"
    for group in result.outlying[:_SHOWN]:
        yield f"  loss {group.loss:<10.4g} gradient norm {group.grad_norm:<10.4g} {', '.join(group.samples)}"
    if len(result.outlying) > _SHOWN:
        yield f"  and {len(result.outlying) - _SHOWN} more, in replay.json"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
