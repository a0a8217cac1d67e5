"""`foreseen import`: published weights of others become a tokenizer folder or an encoder folder."""

from typing import Annotated

import typer


def import_(
    paths: Annotated[
        list[str], typer.Argument(metavar="FILE... OUT", help="Files of weights, and the folder to write.")
    ],
) -> None:
    """Make a tokenizer folder or an encoder folder of published weights; no code in the files is run."""
    from pathlib import Path

    from foreseen import __version__
    from foreseen.commands.layouts import LAYOUTS
    from foreseen.errors import BadInput
    from foreseen.handoff.weight_files import open_weights

    if len(paths) < 2:
        raise BadInput("give the files of weights and, last, the folder to write: foreseen import FILE... OUT")
    *names, out = paths
    files = [open_weights(name) for name in names]
    for layout in LAYOUTS:
        in_order = layout.recognise(files)
        if in_order is not None:
            lineage = {
                "imported": layout.what,
                "files": [file.describe() for file in in_order],
                "licences": [layout.licence] if layout.licence else [],
                "parents": [],
                "foreseen": __version__,
            }
            try:
                made = layout.write(in_order, Path(out), lineage)
            except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, ArithmeticError) as error:
                if isinstance(error, BadInput):
                    raise
                what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                raise BadInput(f"these weights have the names of {layout.what}, but are none: {what}") from error
            print(f"{made}: {out}   from {layout.what}")
            return
    seen = "; ".join(
        f"{file.path} has {len(file.tensors)} tensors, {', '.join(sorted(file.tensors)[:4]) or 'none'}"
        + (" ..." if len(file.tensors) > 4 else "")
        for file in files
    )
    known = "".join(f"\n  {layout.what}" for layout in LAYOUTS)
    raise BadInput(f"these weights have a layout that is not known: {seen}. Known are:{known}")
