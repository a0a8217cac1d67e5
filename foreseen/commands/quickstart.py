"""`foreseen quickstart`: the whole life on a laptop, in minutes and without a download."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from foreseen.commands.controls import Plan
    from foreseen.commands.jobs import Jobs
    from foreseen.config import Config

TRAIN, TEST, SIZE_PX = 6000, 1200, 48
SEEDS = 5
_RECIPE = "{}_cpu_minutes"
_SHORTER = {  # of recipes that take longer than the rest of it, to be done within minutes
    "dino": ("run.steps=350", "optim.warmup_steps=35", "run.log_every=50"),
    "ibot": ("run.steps=300", "optim.warmup_steps=30", "run.log_every=50"),
    "dinov2": ("run.steps=300", "optim.warmup_steps=30", "run.log_every=50"),
}
_FINETUNING = {  # of networks that want other rates than a plain ViT (by validation, on other seeds), or are slower
    "dino": ("optim.base_lr=8e-3", "optim.layer_decay=null"),
    "ibot": ("run.steps=250",),
    "dinov2": ("run.steps=250",),
}
_PROBE = ("probe.every=1000", "probe.samples=1800", "probe.validation_fraction=0.33")


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the pictures, the runs and summary.html.")] = Path("quickstart"),
    method: Annotated[str, typer.Option(help="A pretraining method with a recipe METHOD_cpu_minutes.")] = "mae",
    seed: Annotated[int, typer.Option(help="Of pretraining, and the first of five of fine-tuning.")] = 0,
) -> None:
    """Draw procedural pets, pretrain, probe, fine-tune on few labels against scratch, and make a page of it.

    Killed, it goes on when the same command is given again.
    """
    import os
    import time

    from foreseen.commands import controls
    from foreseen.commands.jobs import Jobs, Preempted
    from foreseen.commands.summary_page import write_page
    from foreseen.commands.verbs import leave
    from foreseen.data.parallel import count_cpus
    from foreseen.errors import BadInput

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("quickstart starts its own processes; run it as plain `foreseen quickstart`")
    began = time.monotonic()
    pretraining, finetuning = configs(out, method, seed)
    _draw(out / "shards")
    plan = controls.make_plan(finetuning, seeds=SEEDS, tuning_seeds=1, triple_seeds=1)
    try:
        with Jobs(min(2, count_cpus())) as jobs:
            report = _live(jobs, pretraining, plan)
    except Preempted as stopped:
        print(f"{stopped}; the same command goes on from there")
        return leave(preempted=True)
    page = write_page(out, pretraining, plan)
    print(f"\n{report}\n")
    print(f"The page of it, with pictures: {page}   ({time.monotonic() - began:.0f} s)")
    print(f"Everything in TensorBoard: tensorboard --logdir {out}   (with the environment's bin folder on the PATH)")


def configs(out: Path, method: str, seed: int) -> "tuple[Config, Config]":
    """The jobs of a quickstart: pretraining, and the fine-tuning that it is judged by."""
    from foreseen.commands.verbs import load_recipe, method_options
    from foreseen.config import recipe_names
    from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD
    from foreseen.errors import BadInput

    known = [name for name in method_options("pretrain") if _RECIPE.format(name) in recipe_names("pretrain")]
    if method not in known:
        raise BadInput(f"--method {method} has no recipe for minutes on a CPU; there are {', '.join(known)}")
    common = ["data.workers=0", f"seed={seed}"]
    # The probe reads labels of pretraining pictures, to show; nothing is chosen by it.
    probe = ["run.log_every=250", "probe.labels=true", *_PROBE]
    shorter = _SHORTER.get(method, ())
    pretraining = load_recipe("pretrain", _RECIPE.format(method), [*common, *probe, *shorter])
    finetuning = load_recipe("finetune", "cpu_minutes", [*common, *_FINETUNING.get(method, ())])
    views, model = pretraining.views, pretraining.model
    # Scratch runs before there is an encoder to take these from.
    shared = {"mean": views.mean or IMAGENET_MEAN, "std": views.std or IMAGENET_STD}
    begin = {"name": model.name, "args": model.args, "init_from": str(out / "pretrain" / "encoder")}
    return _placed(pretraining, out, "pretrain"), _placed(finetuning, out, "finetune").model_copy(
        update={
            "views": finetuning.views.model_copy(update=shared),
            "model": finetuning.model.model_copy(update=begin),
        }
    )


def _placed(config: "Config", out: Path, name: str) -> "Config":
    """The config with its folders, which may have any name that YAML would take for something else."""
    run = config.run.model_copy(update={"dir": out / name})
    data = config.data.model_copy(update={"path": str(out / "shards")})
    return config.model_copy(update={"run": run, "data": data})


def network_word(pretraining: "Config") -> str:
    """What to call the network that a quickstart trains."""
    return "ViT" if (pretraining.model.name or "").startswith(("vit", "beit")) else "network"


def _draw(shards: Path) -> None:
    from foreseen.data.procedural import write_procedural_pets

    if (shards / "manifest.json").is_file():
        return
    print(f"1. Draw {TRAIN:,} cartoon pets of twelve breeds, and {TEST:,} for the test, into {shards}.", flush=True)
    write_procedural_pets(shards, train=TRAIN, test=TEST, size=SIZE_PX)


def _live(jobs: "Jobs", pretraining: "Config", plan: "Plan") -> str:
    from foreseen.commands import controls
    from foreseen.handoff.encoder import load_encoder

    network = network_word(pretraining)
    method, shots = pretraining.method.name, plan.pretrained.config.data.shots
    print(f"2. Pretrain a tiny {network} on them without labels ({method}). Beside it, the same learns from scratch")
    print(f"   on {shots} labels a breed, by four recipes, of which validation chooses one: the same as the pretrained")
    print(
        "   side's (scratch-same), and its own, without layer decay, at three rates. Four to five minutes in all.",
        flush=True,
    )
    pretrained = jobs.submit("pretrain", pretraining)
    tell = _teller(pretraining)
    controls.make_runs(jobs, plan.tuning(), beside=[pretrained], look=tell)
    chosen = plan.chosen()
    print(f"   Chosen: {chosen.title}. Now the other seeds of it, and one with three times the passes.")
    left = controls.submit(jobs, plan.remaining_scratch(chosen))
    list(jobs.wait([pretrained], look=tell))
    print(f"3. Fine-tune the pretrained {network} on the same labels, while the last runs of scratch end.", flush=True)
    controls.claim_folder(plan.pretrained.config)
    left |= controls.submit(jobs, plan.treated())
    controls.finish(jobs, left)
    return controls.conclude(plan, chosen, load_encoder(pretraining.run.dir / "encoder").lineage)


def _teller(config: "Config") -> Callable[[], None]:
    """Repeats what a run in another process writes to its log."""
    from foreseen.commands.jobs import LOG

    told = 0

    def tell() -> None:
        nonlocal told
        log = config.run.dir / LOG
        if log.is_file():
            lines = log.read_text(encoding="utf-8").split("\n")[:-1]
            for line in lines[told:]:
                if line.startswith(("step", "tokenizer ", "  ")):
                    print(f"   {line}", flush=True)
            told = len(lines)

    return tell
