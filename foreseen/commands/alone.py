"""The start of a command that one process does alone."""

from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from accelerate import Accelerator

    from foreseen.config import Compute


def start_alone(name: str, precision: str) -> "tuple[Accelerator, Compute]":
    """The machine's device, and how arithmetic is done on it.

    Args:
        name: of the command.
        precision: of the networks.

    Raises:
        BadInput: it was started on several ranks, or there is no such precision.
    """
    from foreseen.config import Compute
    from foreseen.engine.launch import start
    from foreseen.errors import BadInput

    known = [word for word in get_args(Compute.model_fields["precision"].annotation) if word != "fp64"]
    if precision not in known:
        raise BadInput(f"--precision is {precision!r}, there are {', '.join(known)}")
    compute = Compute.model_validate({"precision": precision})
    accelerator = start(compute)
    if accelerator.num_processes > 1:
        raise BadInput(f"foreseen {name} is one process: start it without a launcher")
    return accelerator, compute


def batch_size_advice(batch_size: int) -> "AbstractContextManager[None]":
    """Turn running out of memory in a command with --batch-size into a sentence; nothing it makes depends on that."""
    from foreseen.engine.memory import memory_advice

    less = "give a smaller one" if batch_size > 1 else "take a machine with more"
    return memory_advice(f"at --batch-size {batch_size}", lambda: less)
