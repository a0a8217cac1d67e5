"""What a teacher costs: a step of distillation against the same student's step on labels and the teacher's forward.

    python benchmarks/distill_step.py [--student NAME] [--teacher NAME] [--batch 32] [--rounds 9] [--precision bf16]

The three take turns in one process, on the same fixed images. What is to be read is the ratio in the last line: a step
with a teacher should take no more than the other two together, and 10 %.
"""

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path

import torch
from race import Step, autocast, race
from torch import Tensor

from foreseen.commands.verbs import method_options
from foreseen.config import Config, resolve
from foreseen.data.batch import Batch
from foreseen.engine.launch import allow_fast_fp32, choose_attention
from foreseen.engine.objective import Objective, Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.finetune.distill import Distill
from foreseen.finetune.methods import METHODS
from foreseen.handoff.encoder import IMAGENET_MEAN, Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone

CLASSES, SIZE = 37, 224


def recipe(student: str, method: dict[str, object], batch: int) -> Config:
    """DeiT's mixing and erasing, for either method."""
    return resolve(
        {
            "run": {"dir": "unused", "steps": 10**6},
            "model": {"name": student},
            "method": {**method, "pool": None},
            "views": {"size": [SIZE, SIZE], "erase": 0.25},
            "optim": {"base_lr": 1e-4, "lr_scaling": "none", "warmup_steps": 0},
            "batch": {"global_size": batch},
        },
        method_options("finetune"),
    )


def training(config: Config, batch: Batch, precision: str) -> tuple[Objective, Step]:
    """The class and the optimizer that a recipe trains with."""
    torch.manual_seed(0)
    device = batch.position.device
    objective = METHODS[config.method.name].build(config, CLASSES).to(device).train()
    choose_attention(objective, device)
    optimizer = SteppedOptimizer(
        objective, objective.parameter_rules(None), config.optim, global_size=len(batch), total_steps=10**6
    )
    progress = Progress(0, 10**6, 1000.0, 0)

    def step() -> Tensor:
        with autocast(precision, device):
            with torch.no_grad():
                (prepared,) = objective.prepare([batch], progress)
            losses = objective(batch, prepared, progress)
        losses["loss"].backward()
        gradients = [p.grad for p in optimizer.parameters.values() if p.grad is not None]
        optimizer.step(1, torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        return losses["loss"].detach()

    return objective, step


def made_up_batch(size: int, device: torch.device) -> Batch:
    """Images, and draws that mix and erase every one of them."""
    position = torch.arange(size, device=device)
    pair = torch.tensor([0.7, 32.0, 160.0, 32.0, 160.0], dtype=torch.float64, device=device)
    return Batch(
        position=position,
        key=position * 0x9E3779B97F4A7C1 + 1,
        sample=position,
        images={"image": torch.randn(size, 3, SIZE, SIZE, device=device)},
        draws={
            "mix": pair.repeat(size, 1),
            "erase": torch.tensor([[0, 64, 0, 64]], device=device).repeat(size, 1),
        },
        label=position % CLASSES,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="deit_tiny_distilled_patch16_224")
    parser.add_argument("--teacher", default="regnety_016")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        allow_fast_fp32()
    batch = made_up_batch(args.batch, device)
    with tempfile.TemporaryDirectory() as folder:
        teacher = create_backbone(args.teacher, img_size=(SIZE, SIZE), num_classes=CLASSES)
        seen = Preprocessing(IMAGENET_MEAN, (0.2, 0.2, 0.2), "bicubic", 0.875, (SIZE, SIZE))
        save_encoder(teacher, Path(folder) / "teacher", preprocessing=seen, lineage={})
        method = {"name": "distill", "teacher": str(Path(folder) / "teacher")}
        distill, distillation = training(recipe(args.student, method, args.batch), batch, args.precision)
        _, labels = training(recipe(args.student, {"name": "supervised"}, args.batch), batch, args.precision)
    assert isinstance(distill, Distill)
    network, images = distill.teacher.network, batch.images["image"]

    def forward() -> Tensor:
        with torch.no_grad(), autocast(args.precision, device):
            found: Tensor = network(images)
        return found

    names = ("with the teacher", "student on labels", "the teacher's forward")
    times = race(dict(zip(names, (distillation, labels, forward), strict=True)), args.rounds, device)
    print(f"{args.student} from {args.teacher}, {args.precision}, batch {args.batch}, {device}, "
          f"{torch.get_num_threads()} threads, median of {args.rounds} rounds")  # fmt: skip
    for name, seconds in times.items():
        print(f"  {name:24} {1000 * statistics.median(seconds):9.1f} ms")
    ratios = [whole / (one + two) for whole, one, two in zip(*(times[name] for name in names), strict=True)]
    print(f"  with the teacher / (student + teacher's forward): {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
