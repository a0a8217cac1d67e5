"""`foreseen recipes`: what is shipped."""

from typing import Annotated

import typer

_STUDY = "study"


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
) -> None:
    """List the shipped recipes, or print one, resolved."""
    from foreseen.commands.verbs import VERBS, load_recipe
    from foreseen.config import RECIPES, find_recipe, recipe_names
    from foreseen.errors import BadInput

    if name is None:
        for verb in (*VERBS, _STUDY):
            for recipe in recipe_names(verb):
                first = (RECIPES / verb / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
                print(f"foreseen {verb} {recipe:24} {first.removeprefix('#').strip()}")
        return
    if name in recipe_names(_STUDY):
        print(f"# foreseen {_STUDY} {name}")
        print(_resolved_study(name))
        return
    found = [verb for verb in VERBS if name in recipe_names(verb)]
    if not found:
        find_recipe("pretrain", name)
        raise BadInput(f"{name} is no shipped recipe; `foreseen recipes` lists them")
    for verb in found:
        print(f"# foreseen {verb} {name}")
        print(load_recipe(verb, name).to_yaml())


def _resolved_study(name: str) -> str:
    """What the cells of a study share, and what it varies, as YAML."""
    import yaml

    from foreseen.commands.study_options import load_study

    raw, study = load_study(name, [])
    whole = raw | {_STUDY: study.model_dump(mode="json", exclude_defaults=True)}
    return yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, width=120)
