"""`torch.compile`, block by block and in place: names of weights stay, and blocks of one kind share a graph.

Keys are drawn outside of blocks, so nothing random is ever compiled.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from foreseen.errors import BadInput

_GRAPHS = 256  # of one run: kinds of blocks × sizes × training or evaluation


def check_backend(name: str) -> None:
    """Refuse a backend that torch does not have.

    Raises:
        BadInput: names those that it has.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if name not in known:
        raise BadInput(
            f"compute.compile {name!r} is no backend of torch.compile; set it to true for inductor, "
            f"to false, or to one of {', '.join(known)}"
        )


def compile_blocks(blocks: Sequence[nn.Module], backend: str) -> None:
    """Compile blocks at their first forward.

    What is compiled must not depend on what ran before, or a resumed run would differ in bits from an unbroken one. So
    every size gets a graph of its own, where torch would turn the second size it meets into a dynamic one; running out
    of graphs is an error, where torch would go on without compiling; and kernels are not chosen by a race.

    Args:
        blocks: on their device.
        backend: of torch.compile.
    """
    torch._dynamo.config.recompile_limit = _GRAPHS
    torch._dynamo.config.accumulated_recompile_limit = _GRAPHS
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # Gradients leave for the other ranks whenever a block ends; DDP's own optimizer would cut each block once more.
    torch._dynamo.config.optimize_ddp = False
    # torch's own, while it looks at the inputs of a block.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    options = {"deterministic": True} if backend == "inductor" else None
    for block in blocks:
        block.compile(backend=backend, dynamic=False, options=options)


@contextlib.contextmanager
def compile_advice(backend: str | None) -> Iterator[None]:
    """Turn a failure of torch's compiler, such as for want of a C++ compiler or Triton, into a sentence with a remedy.

    Args:
        backend: of the run; None where nothing is compiled.
    """
    try:
        yield
    except Exception as error:
        if backend is None or not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(
            f"compute.compile {backend!r} cannot compile this model here ({reason}); install what it misses, or set "
            "compute.compile=false"
        ) from error


def uncompiled(backend: str | None) -> contextlib.AbstractContextManager[Any]:
    """Inside, compiled blocks run as they were, for what runs too rarely to be worth a graph.

    Args:
        backend: of the run; None where nothing is compiled.
    """
    return contextlib.nullcontext() if backend is None else torch.compiler.set_stance("force_eager")
