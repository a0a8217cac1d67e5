"""`foreseen pretrain`: from shards of unlabelled pictures to an encoder folder."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreseen.config import Config
    from foreseen.data.shards import ShardSet
    from foreseen.engine.online_probe import OnlineProbe
    from foreseen.engine.train import Job, Outcome
    from foreseen.handoff.encoder import Preprocessing


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `foreseen recipes`) or the path of a YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as optim.base_lr=1e-3.")] = None,
) -> None:
    """Pretrain a backbone; goes on by itself when the run folder holds a checkpoint."""
    from foreseen.commands.verbs import leave, load_recipe

    leave(run(load_recipe("pretrain", recipe, overrides or [])).preempted)


def run(config: "Config") -> "Outcome":
    """Make a pretraining run, to its encoder folder if it reaches the end.

    Args:
        config: of the verb "pretrain".
    """
    from dataclasses import replace

    from foreseen.commands.session import open_shards, record_config, session
    from foreseen.engine.train import train
    from foreseen.handoff.encoder import Preprocessing, save_encoder
    from foreseen.handoff.lineage import describe_lineage

    with session(config) as (accelerator, say):
        shards = open_shards(config, config.data.split, accelerator)
        config = config.with_length(len(shards))
        record_config(config, accelerator)
        job = make_job(config, shards)
        objective = job.objective
        seen = Preprocessing.of_view(objective.request.views[0])
        probe = _online_probe(config, shards, seen, accelerator)
        outcome = train(replace(job, probe=probe), accelerator)
        if accelerator.is_main_process:
            if outcome.preempted:
                say(f"told to stop: saved at step {outcome.step}; the same command goes on from there")
            else:
                folder = config.run.dir / "encoder"
                lineage = describe_lineage(config, shards, outcome.step, outcome.parents)
                save_encoder(objective.encoder(), folder, preprocessing=seen, lineage=lineage)
                say(f"encoder: {folder}   timm.create_model('local-dir:{folder}', pretrained=True)")
    return outcome


def make_job(config: "Config", shards: "ShardSet") -> "Job":
    """What a run is made of, but for its probe; `replay` makes it, too.

    Args:
        config: of the verb "pretrain", its length resolved.
        shards: to train on.
    """
    from foreseen.data.loader import BatchBuilder
    from foreseen.engine.train import Job
    from foreseen.handoff.encoder import parents_of
    from foreseen.pretrain.methods import METHODS

    objective = METHODS[config.method.name].build(config)
    builder = BatchBuilder(shards, objective.request, config.seed, fast_decode=config.data.fast_decode)
    return Job(config, objective, builder, parents=parents_of(objective.encoder()), verb="pretrain")


def _online_probe(
    config: "Config", shards: "ShardSet", seen: "Preprocessing", accelerator: "Accelerator"
) -> "OnlineProbe | None":
    from foreseen.commands.session import open_data
    from foreseen.engine.online_probe import OnlineProbe

    options = config.probe
    if options.every is None:
        return None
    if options.data is not None:
        named = config.data.model_copy(update={"path": options.data})  # cut as fine-tuning will cut it
        shards = open_data(named, options.split, accelerator, size=max(config.views.size))
    return OnlineProbe(
        options,
        shards,
        seen.view(),
        has_labels=options.data is not None or options.labels,
        seed=config.data.subset_seed,
        fast_decode=config.data.fast_decode,
    )
