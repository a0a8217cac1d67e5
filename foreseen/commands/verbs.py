"""Recipes of every verb, read with the options of the methods that the verb knows."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from foreseen.config import Config, MethodOptions

Verb = Literal["tokenizer", "pretrain", "finetune"]
VERBS: tuple[Verb, ...] = ("tokenizer", "pretrain", "finetune")


def method_options(verb: Verb) -> "dict[str, type[MethodOptions]]":
    """The options class of each method of a verb, by the method's name."""
    if verb == "tokenizer":
        from foreseen.tokenizers.methods import METHODS as tokenizing

        return {name: method.options for name, method in tokenizing.items()}
    if verb == "pretrain":
        from foreseen.pretrain.methods import METHODS as pretraining

        return {name: method.options for name, method in pretraining.items()}
    from foreseen.finetune.methods import METHODS as finetuning

    return {name: method.options for name, method in finetuning.items()}


def command_of(verb: Verb) -> Any:
    """The module of a verb's command: its `run(config)` makes a run, its `make_job(config, pictures)` what it is of."""
    from foreseen.commands import finetune, pretrain, tokenizer

    return {"tokenizer": tokenizer, "pretrain": pretrain, "finetune": finetune}[verb]


def load_recipe(verb: Verb, recipe: str, overrides: Sequence[str] = ()) -> "Config":
    """Read a recipe of a verb; see `foreseen.config.load`.

    Raises:
        BadInput: also where it asks for what only another verb does.
    """
    from foreseen.config import load

    config = load(verb, recipe, overrides, method_options(verb))
    if verb != "finetune":
        check_views(config)
    return config


def check_views(config: "Config") -> None:
    """Refuse what only fine-tuning does to pictures, and other verbs would overlook."""
    from foreseen.errors import BadInput

    for key, none in (("rand_augment", None), ("three_augment", None), ("erase", 0.0)):
        value = getattr(config.views, key)
        if value != none:
            raise BadInput(
                f"views.{key} {value} is of fine-tuning alone: set views.{key}={'null' if none is None else 0}; "
                "colours are changed by views.colour, or by a method's own"
            )


def leave(preempted: bool) -> None:
    """End a command: out of the launcher's job, with the exit code of one that was told to stop if this one was."""
    import torch.distributed as dist
    import typer

    from foreseen.engine.preempt import EXIT_PREEMPTED

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    if preempted:
        raise typer.Exit(EXIT_PREEMPTED)
