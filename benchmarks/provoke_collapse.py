"""Whether the collapse alarm is loud on runs that are made to collapse, and silent on healthy ones.

    python benchmarks/provoke_collapse.py                        # all: some 20 minutes of one core
    python benchmarks/provoke_collapse.py --methods ibot --runs uniform rank
    python benchmarks/provoke_collapse.py --runs healthy --seeds 0 1 2 --steps 2000 --batch 32

Provoked runs are 500 steps of 16 images with a tiny network, and are stopped by the alarm:

* uniform: the teacher is no sharper than the student, so nothing works against the centre;
* one-hot: nothing is centred;
* rank: a huge lr and weight decay, so that features shrink to one.

None of them has KoLeo, which keeps features apart.

Healthy runs are the method's own CPU recipe, as it is but for length and batch, and the size of KoLeo's groups, which
divides the batch. Each line ends with the last health numbers. docs/self_distillation.md has what came out.
"""

import argparse
import contextlib
import json
import math
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.data.procedural import write_procedural_pets
from foreseen.errors import BadInput

METHODS = ("dino", "ibot", "dinov2")
MASKED = ("ibot", "dinov2")
TINY = [
    "run.steps=500", "run.log_every=25", "views.size=32", "batch.global_size=16", "optim.warmup_steps=50",
    "model.name=vit_tiny_patch16_224", "model.args={patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",
    "optim.base_lr=1e-3", "optim.weight_decay_end=0.1", "optim.min_lr=1e-5", "method.teacher_momentum=null",
    "method.crops.colours=dino", "views.colour=null", "compute.precision=fp32",
    "method.out_dim=128", "method.head_layers=3", "method.hidden_dim=64", "method.bottleneck_dim=32",
    "method.centering=centre", "method.crops.local_count=2", "method.crops.local_size=16",
    # KoLeo keeps features apart, whatever becomes of the targets, so only in its absence can their rank collapse.
    "method.koleo_weight=0",
]  # fmt: skip
PROVOKED = {
    "uniform": ["method.teacher_temp=0.1", "method.warmup_teacher_temp=0.1"],
    "one-hot": ["method.center_momentum=1.0"],
    "rank": ["optim.base_lr=0.05", "optim.weight_decay=1.0", "optim.weight_decay_end=1.0", "optim.warmup_steps=0"],
}
OF_MASKED = {
    "uniform": ["method.teacher_patch_temp=0.1", "method.warmup_teacher_patch_temp=0.1"],
    "one-hot": ["method.patch_center_momentum=1.0"],
}
OF_METHOD = {"dinov2": ["method.patch_bottleneck_dim=32"]}
ALARM = re.compile(r"step (\d+): COLLAPSE \(([\w-]+)\)")


def provoking(method: str, sign: str) -> list[str]:
    """Overrides that make a method collapse."""
    return [*TINY, *OF_METHOD.get(method, []), *PROVOKED[sign], *(OF_MASKED.get(sign, []) if method in MASKED else [])]


def run(method: str, pets: Path, folder: Path, overrides: list[str]) -> tuple[str, dict[str, float]]:
    """What the alarm said, and the run's last numbers."""
    own = [f"run.dir={folder}", f"data.path={pets}", "data.workers=0", "method.on_collapse=stop", "probe.every=null"]
    own += ["run.rewind_after=null", "run.save_every=100000"]
    said = "silent"
    folder.mkdir(parents=True)
    with (folder / "log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            if pretrain.run(load_recipe("pretrain", f"{method}_cpu_minutes", [*own, *overrides])).preempted:
                sys.exit("told to stop")
        except BadInput as stopped:
            found = ALARM.match(str(stopped))
            if found is None:
                raise
            said = f"step {found[1]}: {found[2]}"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return said, [line for line in map(json.loads, lines) if "teacher_entropy" in line][-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--runs", nargs="+", choices=(*PROVOKED, "healthy"), default=(*PROVOKED, "healthy"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the healthy runs")
    parser.add_argument("--steps", type=int, default=700, help="of the healthy runs")
    parser.add_argument("--batch", type=int, default=16, help="of the healthy runs")
    parser.add_argument("--train", type=int, default=2000, help="pictures")
    parser.add_argument("--keep", type=Path, help="an empty folder for the runs, with their metrics.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        out = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pets = out / "pets"
        if not pets.exists():
            write_procedural_pets(pets, train=options.train, test=8, size=48, seed=0, workers=1)
        healthy = [f"run.steps={options.steps}", f"batch.global_size={options.batch}", "run.log_every=20"]
        group = math.gcd(options.batch, 32)
        healthy.append(f"method.koleo_group={group}" if group > 1 else "method.koleo_weight=0")
        for method in options.methods:
            for name in options.runs:
                for seed in options.seeds if name == "healthy" else [0]:
                    overrides = healthy if name == "healthy" else provoking(method, name)
                    began = time.monotonic()
                    said, last = run(method, pets, out / f"{method}-{name}-{seed}", [*overrides, f"seed={seed}"])
                    numbers = "  ".join(
                        f"{key.removeprefix('health/')} {value:.3g}" for key, value in last.items()
                        if key in ("teacher_entropy", "kl", "patch_teacher_entropy", "patch_loss")
                        or key.startswith("health/")
                    )  # fmt: skip
                    print(f"{method:7} {name:8} seed {seed}  {said:22} {time.monotonic() - began:4.0f} s  {numbers}")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
