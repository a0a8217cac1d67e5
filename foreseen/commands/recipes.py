"""`foreseen recipes`: what is shipped."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from foreseen.config import MethodOptions


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
) -> None:
    """List the shipped recipes, or print one, resolved."""
    from foreseen.config import RECIPES, find_recipe, load, recipe_names
    from foreseen.errors import BadInput

    verbs = [verb for verb in ("pretrain", "finetune") if recipe_names(verb)]
    if name is None:
        for verb in verbs:
            for recipe in recipe_names(verb):
                first = (RECIPES / verb / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
                print(f"foreseen {verb} {recipe:24} {first.removeprefix('#').strip()}")
        return
    found = [verb for verb in verbs if name in recipe_names(verb)]
    if not found:
        find_recipe("pretrain", name)
        raise BadInput(f"{name} is no shipped recipe; `foreseen recipes` lists them")
    for verb in found:
        print(f"# foreseen {verb} {name}")
        print(load(verb, name, [], _options(verb)).to_yaml())


def _options(verb: str) -> "dict[str, type[MethodOptions]]":
    from foreseen.finetune.methods import METHODS as FINETUNING
    from foreseen.pretrain.methods import METHODS as PRETRAINING

    if verb == "pretrain":
        return {name: method.options for name, method in PRETRAINING.items()}
    return {name: method.options for name, method in FINETUNING.items()}
