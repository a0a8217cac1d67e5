"""Runs the skeletons through the real loop on as many ranks as the launcher starts; `-m tests.engine.two_ranks OUT`."""

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from foreseen.config import BatchSize, Compute, Config, Data, MethodOptions, Model, Optim, Run
from foreseen.data.batch import Batch
from foreseen.data.loader import BatchBuilder
from foreseen.engine import checkpoint
from foreseen.engine.job import Job, Outcome
from foreseen.engine.launch import start
from foreseen.engine.objective import Objective, Progress
from foreseen.engine.train import train
from foreseen.errors import BadInput
from tests.engine.driver import GLOBAL_SIZE, OPTIM, SEED, STEPS, History, Pictures
from tests.engine.skeletons import IBOT, SKELETONS, CentredIBOT, Supervised

MICRO_SIZES = (8, 4)
EXACT = Compute(precision="fp64")


class CentreOfOneRank(CentredIBOT):
    """A mistake that one process cannot show."""

    def mean_logits(self, bottlenecks: list[Tensor]) -> Tensor:
        return torch.cat([self.teacher_logits(x).flatten(0, -2) for x in bottlenecks]).mean(0)


class GoesWrong(Supervised):
    """Meets a loss that is not finite in two steps in a row, on another rank each."""

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        losses = super().forward(batch, prepared, progress)
        spoiled = sum(batch.position == place for place in (3 * GLOBAL_SIZE + 1, 5 * GLOBAL_SIZE - 1)).any()
        return losses | {"loss": losses["loss"] * torch.where(spoiled, torch.nan, 1.0)}


def fail(what: str, folder: Path, accelerator: Accelerator) -> None:
    """Save on a full disk, or begin where every checkpoint is damaged, and note what each rank is told."""

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if what == "sha256_of":
        run(Supervised, folder, 4, accelerator)
    real = getattr(checkpoint, what)
    setattr(checkpoint, what, full)
    try:
        run(Supervised, folder, 4, accelerator)
    except BadInput as error:
        (folder / f"told-{accelerator.process_index}").write_text(str(error), encoding="utf-8")
    finally:
        setattr(checkpoint, what, real)


GOING_WRONG = {"save_every": 1, "rewind_after": 2}


def run(
    make: Callable[[], Objective], folder: Path, micro_size: int, accelerator: Accelerator, *,
    compute: Compute = EXACT, optim: Optim = OPTIM, save_every: int = STEPS, rewind_after: int = 10,
) -> Outcome:  # fmt: skip
    """Run an objective through the real loop, and leave its state at the end in `rank-<n>.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    objective = make()
    torch.seed()
    config = Config(
        seed=SEED,
        run=Run(
            dir=folder,
            steps=STEPS,
            epochs=STEPS * GLOBAL_SIZE / len(Pictures.labels),
            log_every=1,
            keep_last=STEPS,
            save_every=save_every,
            rewind_after=rewind_after,
        ),
        data=Data(workers=0),
        model=Model(name="tiny"),
        method=MethodOptions(name="skeleton"),
        optim=optim,
        batch=BatchSize(global_size=GLOBAL_SIZE, micro_size=micro_size),
        compute=compute,
    )
    outcome = train(Job(config, objective, BatchBuilder(Pictures(), objective.request, SEED)), accelerator)
    save_file(objective.state_dict(), folder / f"rank-{accelerator.process_index}.safetensors")
    return outcome


def history(folder: Path, rank: int = 0) -> History:
    """What a run left in its folder, with the weights of one rank."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses, norms = (
        torch.tensor([line[name] for line in lines], dtype=torch.float64) for name in ("loss", "grad_norm")
    )
    return History(losses, norms, load_file(folder / f"rank-{rank}.safetensors"))


# Ways to compute that change no result, and the average of weights: each is compared with one process.
VARIANTS: dict[str, tuple[type[Objective], Compute, Optim]] = {
    "recomputed": (IBOT, EXACT.model_copy(update={"checkpoint_activations": True}), OPTIM),
    "compiled": (Supervised, EXACT.model_copy(update={"compile": "aot_eager"}), OPTIM),
    "compiled and recomputed": (
        Supervised, EXACT.model_copy(update={"compile": "aot_eager", "checkpoint_activations": True}), OPTIM,
    ),
    "averaged": (Supervised, EXACT, OPTIM.model_copy(update={"ema_decay": 0.5})),
}  # fmt: skip


def main(out: Path) -> None:
    torch.set_num_threads(1)
    accelerator = start(Compute(precision="fp64"))
    assert accelerator.num_processes == 2
    for name, make in (*SKELETONS.items(), (CentreOfOneRank.__name__, CentreOfOneRank)):
        for micro_size in MICRO_SIZES:
            run(make, out / f"{name}-{micro_size}", micro_size, accelerator)
    for name, (make, compute, optim) in VARIANTS.items():
        run(make, out / name, 4, accelerator, compute=compute, optim=optim)
    for what in ("save_file", "sha256_of"):
        fail(what, out / f"no-{what}", accelerator)
    run(GoesWrong, out / GoesWrong.__name__, 4, accelerator, **GOING_WRONG)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
