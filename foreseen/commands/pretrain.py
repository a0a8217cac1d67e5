"""`foreseen pretrain`: from shards of unlabelled pictures to an encoder folder."""

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreseen.config import Config
    from foreseen.data.feed import Feeder
    from foreseen.data.shards import ShardSet
    from foreseen.data.stream import TarStream
    from foreseen.data.views import Request
    from foreseen.engine.job import Job, Outcome
    from foreseen.engine.online_probe import OnlineProbe
    from foreseen.handoff.encoder import Preprocessing


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `foreseen recipes`) or the path of a YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Dotted overrides, such as optim.base_lr=1e-3.")] = None,
    on_collapse: Annotated[
        str | None,
        typer.Option(
            help="For DINO, iBOT and DINOv2, short for method.on_collapse=: warn or stop.", show_default=False
        ),
    ] = None,
) -> None:
    """Pretrain a backbone; goes on by itself when the run folder holds a checkpoint."""
    from foreseen.commands.verbs import leave, load_recipe

    short = [] if on_collapse is None else [f"method.on_collapse={on_collapse}"]
    leave(run(load_recipe("pretrain", recipe, [*(overrides or []), *short])).preempted)


def run(config: "Config") -> "Outcome":
    """Make a pretraining run, to its encoder folder if it reaches the end.

    Args:
        config: of the verb "pretrain".
    """
    from dataclasses import replace
    from functools import partial

    from foreseen.commands.session import open_training_pictures, record_config, session
    from foreseen.engine.train import train
    from foreseen.handoff.encoder import Preprocessing, save_encoder
    from foreseen.handoff.lineage import describe_lineage
    from foreseen.pretrain.methods import METHODS

    with session(config) as (accelerator, say):
        pictures = open_training_pictures(config, accelerator)
        config = config.with_length(len(pictures))
        if (ready := METHODS[config.method.name].ready) is not None:
            config = ready(config, partial(_builder, config, pictures), accelerator)
        record_config(config, accelerator)
        job = make_job(config, pictures)
        objective = job.objective
        seen = Preprocessing.of_view(objective.request.views[0])
        probe = _online_probe(config, pictures, seen, accelerator)
        outcome = train(replace(job, probe=probe), accelerator)
        if accelerator.is_main_process:
            if outcome.preempted:
                say(f"told to stop: saved at step {outcome.step}; the same command goes on from there")
            else:
                folder = config.run.dir / "encoder"
                lineage = describe_lineage(
                    config, pictures, outcome.step, outcome.parents, objective.frozen_inputs(), objective.teachers()
                )
                save_encoder(objective.encoder(), folder, preprocessing=seen, lineage=lineage)
                say(f"encoder: {folder}   timm.create_model('local-dir:{folder}', pretrained=True)")
    return outcome


def make_job(config: "Config", pictures: "ShardSet | TarStream") -> "Job":
    """What a run is made of, but for its probe; `replay` makes it, too.

    Args:
        config: of the verb "pretrain", its length resolved.
        pictures: to train on.
    """
    from foreseen.engine.job import Job
    from foreseen.handoff.encoder import parents_of
    from foreseen.pretrain.methods import METHODS

    objective = METHODS[config.method.name].build(config)
    builder = _builder(config, pictures, objective.request)
    return Job(config, objective, builder, parents=parents_of(objective.encoder()), verb="pretrain")


def _builder(config: "Config", pictures: "ShardSet | TarStream", request: "Request") -> "Feeder":
    from foreseen.data.loader import BatchBuilder
    from foreseen.data.shards import ShardSet
    from foreseen.errors import BadInput

    if isinstance(pictures, ShardSet):
        return BatchBuilder.configured(pictures, request, config)
    if config.data.repeats > 1:
        raise BadInput(
            f"data.repeats {config.data.repeats} needs samples by number, which a stream has not: set it to 1"
        )
    if config.run.ledger:
        raise BadInput(
            f"run.ledger {config.run.ledger} names samples by number, and a stream has none: set it to false"
        )
    from foreseen.data.stream import StreamBuilder

    return StreamBuilder.configured(pictures, request, config)


def _online_probe(
    config: "Config", pictures: "ShardSet | TarStream", seen: "Preprocessing", accelerator: "Accelerator"
) -> "OnlineProbe | None":
    from foreseen.commands.session import open_data
    from foreseen.data.loader import BatchBuilder
    from foreseen.data.shards import ShardSet
    from foreseen.data.views import Request
    from foreseen.engine.online_probe import OnlineProbe
    from foreseen.errors import BadInput

    options = config.probe
    if options.every is None:
        return None
    if options.data is not None:
        # Cut as fine-tuning will cut it.
        named = config.data.model_copy(update={"path": options.data, "shards_at": None})
        pictures = open_data(named, options.split, accelerator, size=max(config.views.size))
    if not isinstance(pictures, ShardSet):
        raise BadInput(
            f"data.path {pictures.place} is a stream, and a probe looks at the same pictures again and again; name a "
            "packed set in probe.data, or set probe.every=null"
        )
    return OnlineProbe(
        options,
        BatchBuilder.configured(pictures, Request(views=(seen.view(),)), config),
        has_labels=options.data is not None or options.labels,
        has_start=config.model.init_from is not None,
        seed=config.data.subset_seed,
    )
