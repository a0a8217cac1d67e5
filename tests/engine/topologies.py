"""Every method's own command on as many ranks as the launcher starts, cut in many ways; `-m tests.engine.topologies`.

Each run is one of a verb's own command on packed pictures, in `<job>-<ranks>x<accumulation>`.
"""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from foreseen.commands.verbs import VERBS, Verb, command_of, load_recipe, method_options
from foreseen.config import Config, recipe_names
from foreseen.data.loader import BatchBuilder
from foreseen.data.shards import ShardSet
from foreseen.engine.job import Job
from foreseen.pretrain.methods import METHODS
from tests.small_methods import plain_vit, small_method

if TYPE_CHECKING:
    from tests.engine.driver import History

STEPS, GLOBAL_SIZE = 20, 16
WORLDS, ACCUMULATIONS, WORKERS = (1, 2, 4), (1, 2, 4), (0, 1, 3)
RESUMED_FROM = 10

# A method whose runs may depend on how a batch is cut, and why; docs/guarantees.md says so, too.
EXEMPT: dict[str, str] = {}
# Methods that relate images two by two here: mixup, and KoLeo in groups of two.
PAIRS = {"supervised", "distill", "dinov2"}

_SMALL = [
    "data.workers=0", "views.size=32", f"batch.global_size={GLOBAL_SIZE}", f"run.steps={STEPS}", "run.epochs=null",
    "run.log_every=1", f"run.save_every={RESUMED_FROM}", f"run.eval_every={STEPS}", "run.ledger=pixels",
    "optim.warmup_epochs=null", "optim.warmup_steps=4", "optim.clip_grad=0.05", "optim.ema_decay=0.9",
    "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",
]  # fmt: skip
_HARDER = {
    "tokenizer": ["model.drop_path_rate=0.2", "views.scale=[0.3,1.0]"],
    "pretrain": ["model.drop_path_rate=0.2", "views.scale=[0.3,1.0]"],
    "finetune": [
        "model.drop_path_rate=0.2", "model.init_from=null", "method.mixup=0.8", "method.cutmix=1.0",
        "views.rand_augment=rand-m9-mstd0.5-inc1", "views.erase=0.25", "data.shots=null", "data.test_split=none",
        "data.validation_fraction=0.2", "data.repeats=3",
    ],
}  # fmt: skip
_HARDER_METHOD = {
    "mae": [
        "views.colour={jitter: {brightness: 0.4, contrast: 0.4, saturation: 0.2, hue: 0.1, probability: 0.8}, "
        "grey: 0.2, blur: {probability: 0.5}, solarise: {probability: 0.2}}"
    ],
    # Fewer patches than asked for are hidden in some images, so images count unevenly.
    "beit": ["method.mask={num_masked: 7, min_block: 4, exact: false}"],
    "vqkd": ["method.revive_after=5"],
    "distill": ["optim.name=lamb"],
    "dino": ["method.centering=centre"],
    "ibot": ["method.centering=centre"],  # DINOv2 has Sinkhorn-Knopp
}


@dataclass(frozen=True)
class Topology:
    ranks: int
    accumulation: int
    workers: int = 0
    precision: str = "fp64"

    @property
    def name(self) -> str:
        return f"{self.ranks}x{self.accumulation}-{self.workers}-{self.precision}"


def methods() -> list[tuple[Verb, str]]:
    return [(verb, name) for verb in VERBS for name in method_options(verb)]


def config_of(verb: Verb, method: str, shards: Path, folder: Path, topology: Topology) -> Config:
    """The first shipped recipe of a method, small and with everything random switched on."""
    recipes = [name for name in recipe_names(verb) if load_recipe(verb, name).method.name == method]
    micro_size = GLOBAL_SIZE // (topology.ranks * topology.accumulation)
    own = [
        f"data.path={shards}", f"run.dir={folder}", f"batch.micro_size={micro_size}",
        f"data.workers={topology.workers}", f"compute.precision={topology.precision}",
    ]  # fmt: skip
    overrides = [*_SMALL, *_HARDER[verb], *own]
    shipped = load_recipe(verb, recipes[0])
    overrides += [f"{key}={value}" for key, value in (small_method(shipped) | plain_vit(shipped)).items()]
    overrides += _HARDER_METHOD.get(method, [])
    return load_recipe(verb, recipes[0], overrides)


def made_ready(verb: Verb, config: Config, shards: ShardSet) -> Config:
    """The config with what the method needs before its objective is built, as its command makes it."""
    ready = METHODS[config.method.name].ready if verb == "pretrain" else None
    if ready is None:
        return config
    config.run.dir.mkdir(parents=True, exist_ok=True)
    return ready(config, lambda request: BatchBuilder.configured(shards, request, config), Accelerator(cpu=True))


def job_of(verb: Verb, config: Config, pictures: Path) -> Job:
    """What a run of the config would be made of."""
    shards = ShardSet.open(pictures, "train")
    job: Job = command_of(verb).make_job(made_ready(verb, config.with_length(37), shards), shards)
    return job


def run(verb: Verb, config: Config) -> None:
    command_of(verb).run(config)


def history(folder: Path) -> "History":
    """What a run left: loss and norm of each step, and its weights, their average among them."""
    from tests.engine.driver import History  # slow to import, and each loader worker imports the main module anew

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "grad_norm" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    losses, norms = (
        torch.tensor([line[name] for line in steps], dtype=torch.float64) for name in ("loss", "grad_norm")
    )
    last = folder / f"checkpoints/step-{STEPS}"
    average = {f"average/{name}": value for name, value in load_file(last / "average.safetensors").items()}
    return History(losses, norms, load_file(last / "model.safetensors") | average)


def begin_from_the_middle(whole: Path, folder: Path) -> None:
    """A run folder as if the run had been killed after its first checkpoint."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / f"checkpoints/step-{STEPS}")
    # A run that hands on an encoder learns from its tokenizer, which was there before the first step.
    shutil.rmtree(folder / ("encoder" if (folder / "encoder").exists() else "tokenizer"), ignore_errors=True)


def main(out: Path, shards: Path, chosen: Sequence[str]) -> None:
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    for verb, method in methods():
        if method not in chosen:
            continue
        for accumulation in ACCUMULATIONS:
            config = config_of(verb, method, shards, Path("none"), Topology(ranks, accumulation))
            if config.batch.micro_size == 1 and method in PAIRS:
                continue
            for precision in ("fp64", "fp32") if accumulation == 2 else ("fp64",):
                topology = Topology(ranks, accumulation, precision=precision)
                run(verb, config_of(verb, method, shards, out / f"{method}-{topology.name}", topology))
        topology = Topology(ranks, 2)
        for name in ("elsewhere", "again"):
            # Taken up from a run of one process, and from one of as many ranks as here.
            origin = Topology(1, 2) if name == "elsewhere" else topology
            folder = out / f"{method}-{topology.name}-{name}"
            if rank == 0:
                begin_from_the_middle(out / f"{method}-{origin.name}", folder)
            if ranks > 1:
                torch.distributed.barrier()
            run(verb, config_of(verb, method, shards, folder, topology))
    for workers in WORKERS[1:] if "mae" in chosen else ():
        for accumulation in ACCUMULATIONS:
            topology = Topology(ranks, accumulation, workers, "fp32")
            run("pretrain", config_of("pretrain", "mae", shards, out / f"mae-{topology.name}", topology))
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
