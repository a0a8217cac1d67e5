"""The door: `foreseen <verb>`. Light to import, so that help answers at once."""

import os
import sys
import time

import typer

from foreseen import __version__
from foreseen.commands import (
    data,
    embed,
    finetune,
    import_,
    predict,
    pretrain,
    probe,
    quickstart,
    recipes,
    replay,
    results,
    study,
    tokenizer,
    verify_resume,
)
from foreseen.errors import BadInput
from foreseen.printable import printable

EXIT_BAD_INPUT = 2

app = typer.Typer(
    name="foreseen",
    help="Pretrain vision backbones on your own unlabelled images, and hand them to fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing help with rich takes longer than all the rest of it
)
app.command()(quickstart.quickstart)
app.add_typer(data.app, name="data")
app.command()(recipes.recipes)
app.command()(tokenizer.tokenizer)
app.command()(pretrain.pretrain)
app.command()(probe.probe)
app.command()(finetune.finetune)
app.command()(predict.predict)
app.command()(embed.embed)
app.command("import")(import_.import_)
app.command()(replay.replay)
app.command()(study.study)
app.command()(results.results)
app.command()(verify_resume.verify_resume)


def _version(asked: bool) -> None:
    if asked:
        print(f"foreseen {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", callback=_version, is_eager=True),
) -> None:
    pass


def main() -> None:
    """Run a command; what the user gave wrong is a sentence on standard error and exit code 2."""
    try:
        app()
    except BadInput as error:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(3)  # rank 0 says it; the launcher then ends this process before it repeats it
        print("foreseen:", printable(str(error), keep="\n"), file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
