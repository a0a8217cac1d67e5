"""`foreseen tokenizer`: from shards of unlabelled pictures to a tokenizer folder."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from foreseen.config import Config
    from foreseen.data.shards import ShardSet
    from foreseen.engine.job import Job, Outcome


def tokenizer(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `foreseen recipes`) or the path of a YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as optim.base_lr=1e-3.")] = None,
) -> None:
    """Train a visual tokenizer, for BEiT; goes on by itself when the run folder holds a checkpoint."""
    from foreseen.commands.verbs import leave, load_recipe

    leave(run(load_recipe("tokenizer", recipe, overrides or [])).preempted)


def run(config: "Config") -> "Outcome":
    """Train a tokenizer, to its folder if the run reaches the end.

    Args:
        config: of the verb "tokenizer".
    """
    from functools import partial

    from foreseen.commands.session import open_shards, record_config, session
    from foreseen.data.loader import BatchBuilder
    from foreseen.engine.train import train
    from foreseen.handoff.lineage import describe_lineage
    from foreseen.tokenizers.folder import save_tokenizer
    from foreseen.tokenizers.health import measure_health
    from foreseen.tokenizers.training import TokenizerObjective

    with session(config) as (accelerator, say):
        pictures = open_shards(config, config.data.split, accelerator)
        config = config.with_length(len(pictures))
        record_config(config, accelerator)
        job = make_job(config, pictures)
        assert isinstance(job.objective, TokenizerObjective)
        outcome = train(job, accelerator)
        if accelerator.is_main_process:
            if outcome.preempted:
                say(f"told to stop: saved at step {outcome.step}; the same command goes on from there")
            else:
                folder = config.run.dir / "tokenizer"
                frozen_inputs = job.objective.frozen_inputs()
                lineage = describe_lineage(config, pictures, outcome.step, outcome.parents, frozen_inputs)
                tokenizer = job.objective.tokenizer.eval()
                cut = partial(BatchBuilder.configured, pictures, config=config)
                workers, device = config.data.workers, accelerator.device
                health, sheet = measure_health(tokenizer, cut, workers=workers, device=device)
                save_tokenizer(tokenizer, folder, lineage=lineage, health=health.as_dict(), pictures=sheet)
                say(health.sentence())
                say(f"  {health.verdict()}")
                (height, width), (rows, columns) = tokenizer.input_size, tokenizer.grid(tokenizer.input_size)
                say(f"tokenizer: {folder}   {rows}×{columns} codes of {height}×{width} px")
                say(f"  to learn from it: foreseen pretrain RECIPE method.tokenizer={folder}, RECIPE a BEiT (beit_...)")
    return outcome


def make_job(config: "Config", pictures: "ShardSet") -> "Job":
    """What a run is made of; `replay` makes it, too.

    Args:
        config: of the verb "tokenizer", its length resolved.
        pictures: to train on.
    """
    from foreseen.data.loader import BatchBuilder
    from foreseen.engine.job import Job
    from foreseen.tokenizers.methods import METHODS

    objective = METHODS[config.method.name].build(config)
    builder = BatchBuilder.configured(pictures, objective.request, config)
    return Job(config, objective, builder, parents=objective.parents(), verb="tokenizer")
