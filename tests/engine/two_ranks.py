"""Runs the skeletons through the real loop on as many ranks as the launcher starts; `-m tests.engine.two_ranks OUT`."""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseen.config import BatchSize, Compute, Config, Data, MethodOptions, Model, Run
from foreseen.data.loader import BatchBuilder
from foreseen.engine.launch import start
from foreseen.engine.objective import Objective
from foreseen.engine.train import Job, train
from tests.engine.driver import GLOBAL_SIZE, OPTIM, SEED, STEPS, History, Pictures
from tests.engine.skeletons import SKELETONS, CentredIBOT

MICRO_SIZES = (8, 4)


class CentreOfOneRank(CentredIBOT):
    """A mistake that one process cannot show."""

    def mean_logits(self, bottlenecks: list[Tensor]) -> Tensor:
        return torch.cat([self.teacher_logits(x).flatten(0, -2) for x in bottlenecks]).mean(0)


def run(make: type[Objective], folder: Path, micro_size: int, accelerator: Accelerator) -> None:
    torch.manual_seed(SEED)
    objective = make()
    torch.seed()
    config = Config(
        seed=SEED,
        run=Run(dir=folder, steps=STEPS, epochs=STEPS * GLOBAL_SIZE / len(Pictures.labels), log_every=1),
        data=Data(workers=0),
        model=Model(name="tiny"),
        method=MethodOptions(name=make.__name__),
        optim=OPTIM,
        batch=BatchSize(global_size=GLOBAL_SIZE, micro_size=micro_size),
        compute=Compute(precision="fp64"),
    )
    train(Job(config, objective, BatchBuilder(Pictures(), objective.request, SEED)), accelerator)
    save_file(objective.state_dict(), folder / f"rank-{accelerator.process_index}.safetensors")


def history(folder: Path, rank: int = 0) -> History:
    """What a run left in its folder, with the weights of one rank."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses, norms = (
        torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in ("loss", "grad_norm")
    )
    return History(losses, norms, load_file(folder / f"rank-{rank}.safetensors"))


def main(out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = start(Compute(precision="fp64"))
    assert accelerator.num_processes == 2
    for name, make in (*SKELETONS.items(), (CentreOfOneRank.__name__, CentreOfOneRank)):
        for micro_size in MICRO_SIZES:
            folder = out / f"{name}-{micro_size}"
            folder.mkdir(parents=True, exist_ok=True)
            run(make, folder, micro_size, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
