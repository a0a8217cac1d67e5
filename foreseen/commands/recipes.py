"""`foreseen recipes`: what is shipped."""

from typing import Annotated

import typer


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
) -> None:
    """List the shipped recipes, or print one, resolved."""
    from foreseen.commands.verbs import VERBS, load_recipe
    from foreseen.config import RECIPES, find_recipe, recipe_names
    from foreseen.errors import BadInput

    if name is None:
        for verb in VERBS:
            for recipe in recipe_names(verb):
                first = (RECIPES / verb / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
                print(f"foreseen {verb} {recipe:24} {first.removeprefix('#').strip()}")
        return
    found = [verb for verb in VERBS if name in recipe_names(verb)]
    if not found:
        find_recipe("pretrain", name)
        raise BadInput(f"{name} is no shipped recipe; `foreseen recipes` lists them")
    for verb in found:
        print(f"# foreseen {verb} {name}")
        print(load_recipe(verb, name).to_yaml())
