"""What the flight recorder, the ledger and checkpoints cost, as a share of training steps.

    python benchmarks/bookkeeping.py [--recipe mae_cpu_minutes] [--rounds 20] [key=value ...]

Steps of the real loop on batches held in memory, in blocks of `run.log_every`, with and without the recorder in turns
in one process; a block with it ends in reading and judging its steps. Compare the ratio, not the times. Beside it the
recorder's own calls are timed, on the host: the ratio of two long times says little of a small difference. On a CPU
the process's own time is taken, which other work on the machine moves less. The ledger's calls are timed alike. A
checkpoint is timed by the clock, since it waits for the disk; its share is that of the steps between two of them,
`run.save_every`.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch
from accelerate import Accelerator

from foreseen.commands.pretrain import make_job
from foreseen.commands.verbs import load_recipe
from foreseen.data.procedural import write_procedural_pets
from foreseen.data.shards import ShardSet
from foreseen.engine.job import Job
from foreseen.engine.launch import start
from foreseen.engine.ledger import Ledger
from foreseen.engine.recorder import FlightRecorder
from foreseen.engine.saving import save
from foreseen.engine.trainer import Trainer


class TimedRecorder(FlightRecorder):
    """The recorder with a clock on what a step and a log ask of it."""

    seconds = 0.0

    def add(self, *arguments: object) -> None:
        began = time.process_time()
        super().add(*arguments)  # type: ignore[arg-type]
        self.seconds += time.process_time() - began

    def look(self, lr: object) -> None:
        began = time.process_time()
        for record in self.read(1, lr):  # type: ignore[arg-type]
            self.judge(record)
        self.seconds += time.process_time() - began


def _wait(accelerator: Accelerator) -> None:
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()


def measure(job: Job, accelerator: Accelerator, rounds: int) -> tuple[float, float, float]:
    """Seconds of a step, the ratio of steps with and without the recorder, and the recorder's own share of a step."""
    trainer = Trainer(job, accelerator)
    recorder = TimedRecorder(job.config.run.recorder, job.config.run.explode_factor)
    batch = trainer.feed.example()
    job.objective.train()
    block, step = job.config.run.log_every, 0
    clock = time.perf_counter if accelerator.device.type == "cuda" else time.process_time
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(2 * rounds + 2):
        records = turn % 4 in (0, 3)  # neither is always the first
        trainer.recorder = recorder if records else None
        _wait(accelerator)
        began = clock()
        for _ in range(block):
            trainer.step(step, repeat(batch))
            step += 1
        _wait(accelerator)
        if records:
            recorder.look(trainer.optimizer.lr)
        times[records].append(clock() - began)
        if turn < 2:  # the first two warm up
            times[records].clear()
            recorder.seconds = 0.0
    ratio = statistics.median(on / off for on, off in zip(times[True], times[False], strict=True))
    spent = statistics.median(times[False]) / block
    return spent, ratio, recorder.seconds / (rounds * block) / spent


def measure_ledger(job: Job, accelerator: Accelerator, rounds: int) -> float:
    """Seconds that the ledger of samples takes of a step, its writing at the log among them."""
    trainer = Trainer(job, accelerator)
    block = job.config.run.log_every
    ledger = Ledger(job.config.run.dir, trainer.layout, rounds * block, accelerator, pixels=False)
    batch = trainer.feed.example()
    began = time.process_time()
    for step in range(rounds * block):
        ledger.add([batch])
        if (step + 1) % block == 0:
            ledger.write(step + 1)
    return (time.process_time() - began) / (rounds * block)


def measure_checkpoint(job: Job, accelerator: Accelerator) -> tuple[float, float]:
    """Seconds by the clock of a step and of saving a checkpoint with its optimizer, medians of five."""
    trainer = Trainer(job, accelerator)
    batch = trainer.feed.example()
    job.objective.train()
    steps, saves = [], []
    for step in range(6):
        _wait(accelerator)
        began = time.perf_counter()
        trainer.step(step, repeat(batch))
        _wait(accelerator)
        stepped = time.perf_counter()
        save(trainer, step + 1, None)
        steps.append(stepped - began)
        saves.append(time.perf_counter() - stepped)
    return statistics.median(steps[1:]), statistics.median(saves[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="mae_cpu_minutes")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        config = load_recipe("pretrain", args.recipe, [*args.overrides, f"run.dir={folder}/run"])
        write_procedural_pets(Path(folder) / "pets", train=64, test=8, size=max(config.views.size), seed=0, workers=1)
        shards = ShardSet.open(Path(folder) / "pets", "train")
        config = config.with_length(len(shards))
        torch.manual_seed(config.seed)
        accelerator = start(config.compute)
        job = make_job(config, shards)
        job = replace(job, config=config)
        seconds, ratio, share = measure(job, accelerator, args.rounds)
        ledger = measure_ledger(job, accelerator, args.rounds)
        step, saving = measure_checkpoint(job, accelerator)
    print(
        f"{args.recipe} {' '.join(args.overrides)}: {1e3 * seconds:.2f} ms a step of {config.batch.global_size}, "
        f"{torch.get_num_threads()} threads, {accelerator.device}; logged every {config.run.log_every} steps, "
        f"{args.rounds} rounds"
    )
    print(f"  with the recorder / without: {ratio:.4f} (median of the rounds)")
    print(f"  the recorder's own calls: {share:.3%} of a step")
    print(f"  the ledger's own calls: {ledger / seconds:.3%} of a step")
    every = config.run.save_every
    print(f"  a checkpoint every {every} steps: {saving / (every * step):.3%} of these steps")


if __name__ == "__main__":
    main()
