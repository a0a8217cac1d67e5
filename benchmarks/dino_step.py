"""One training step of DINO against its peers, and the memory that each takes.

    python benchmarks/dino_step.py [--official DIR] [--precision bf16] [--batch 4] [--rounds 7]

The step is the teacher's forward, the student's, loss, backward, clipping of each gradient, AdamW, and the moves of the
teacher and the centre, on fixed crops: 2 of 224 px and 4 of 96 px per image, ViT-S/16, 65,536 prototypes. Peers are the
authors' code (a checkout of facebookresearch/dino, named by --official), lightly's head, loss and momentum around
timm's ViT as its example has them, and a plain loop over timm's ViT. A peer that documents a switch for its attention
kernel runs with each. The candidates take turns in one process, with the same threads, precision and optimizer. Before
that each runs in a process of its own, which tells how far its resident memory rose above what imports and crops took.
Compare the ratios, not the times. Peers that are not installed are left out. Needs the extra `bench`.
"""

import argparse
import copy
import importlib
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from race import OURS, Step, autocast, begin, race, report, set_attention
from torch import Tensor, nn

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.engine.clip import clip
from foreseen.engine.launch import choose_attention
from foreseen.engine.objective import Progress
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.pretrain.dino import DINO

LARGE, SMALL, PROTOTYPES = (2, 224), (4, 96), 65536
CROPS = LARGE[0] + SMALL[0]
CLIP, MOMENTUM, TEACHER_TEMP = 3.0, 0.996, 0.04
MEMORY_STEPS = 2

Views = list[Tensor]
"""The large crops and the small ones, each size in one tensor, crop-major."""


def ours(views: Views, precision: str) -> Step:
    """The class, the clipping and the optimizer that the recipe trains with."""
    batch_size = len(views[0]) // LARGE[0]
    given = [
        f"batch.global_size={batch_size}", f"method.out_dim={PROTOTYPES}", "method.freeze_last_layer_epochs=0",
        f"method.crops.local_count={SMALL[0]}", "model.drop_path_rate=0",
    ]  # fmt: skip
    config = load_recipe("pretrain", "dino_vit_s16", given).with_length(10**6)
    device = views[0].device
    objective = DINO.build(config).to(device).train()
    choose_attention(objective, device)
    rules = objective.parameter_rules(None)
    optimizer = SteppedOptimizer(objective, rules, config.optim, global_size=batch_size, total_steps=10**6)
    progress = Progress(0, 10**6, 1000.0, 0)
    position = torch.arange(batch_size, device=device)
    key = position * 0x9E3779B97F4A7C1 + 1
    batch = Batch(position, key, position, dict(zip(("global", "local"), views, strict=True)))
    state = {"step": 0}

    def step() -> Tensor:
        state["step"] += 1
        with torch.no_grad(), autocast(precision, device):
            (prepared,) = objective.prepare([batch], progress)
        with autocast(precision, device):
            loss = objective(batch, prepared, progress)["loss"]
        loss.backward()
        norm = torch.nn.utils.get_total_norm(p.grad for p in optimizer.parameters.values() if p.grad is not None)
        clip(optimizer.clip_groups(), CLIP, "parameter", norm)
        finite = torch.isfinite(norm)
        optimizer.step(state["step"], finite)
        with torch.no_grad():
            objective.after_step(progress, finite)
        return loss.detach()

    return step


def peer_step(
    loss: Callable[[], Tensor], student: nn.Module, teacher: nn.Module, precision: str,
    clip_gradients: Callable[[nn.Module], object], move: Callable[[nn.Module, nn.Module], None],
) -> Step:  # fmt: skip
    """A peer's step, with its own clipping and moving of the teacher."""
    teacher.requires_grad_(False)
    parameters = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.04, fused=True)
    device = parameters[0].device

    def step() -> Tensor:
        with autocast(precision, device):
            value = loss()
        value.backward()
        clip_gradients(student)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            move(student, teacher)
        return value.detach()

    return step


def clip_each(student: nn.Module) -> None:
    """Limit the norm of each gradient."""
    for parameter in student.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_((CLIP / (parameter.grad.norm() + 1e-6)).clamp(max=1.0))


def move_each(student: nn.Module, teacher: nn.Module) -> None:
    """Move the teacher's weights towards the student's."""
    for new, old in zip(student.parameters(), teacher.parameters(), strict=True):
        old.mul_(MOMENTUM).add_(new.detach(), alpha=1 - MOMENTUM)


def official(views: Views, precision: str, *, folder: Path) -> Step:
    """The authors' networks, loss, clipping and moving of the teacher."""
    sys.path.insert(0, str(folder.resolve()))
    networks, tools, training = (importlib.import_module(n) for n in ("vision_transformer", "utils", "main_dino"))
    sys.path.pop(0)
    if not torch.distributed.is_initialized():  # their loss adds the centre up over ranks
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    device = views[0].device

    def network() -> Any:
        backbone = networks.vit_small(patch_size=16)
        head = networks.DINOHead(backbone.embed_dim, PROTOTYPES, norm_last_layer=False)
        return tools.MultiCropWrapper(backbone, head).to(device).train()

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    criterion = training.DINOLoss(PROTOTYPES, CROPS, TEACHER_TEMP, TEACHER_TEMP, 0, 10).to(device)
    crops = _apart(views)

    def loss() -> Tensor:
        return criterion(student(crops), teacher(crops[: LARGE[0]]), 0)  # type: ignore[no-any-return]

    return peer_step(loss, student, teacher, precision, lambda model: tools.clip_gradients(model, CLIP), move_each)


def _vit(fused: bool) -> nn.Module:
    vit = timm.create_model("vit_small_patch16_224", num_classes=0, dynamic_img_size=True)
    set_attention(vit, fused)
    return vit


def lightly(views: Views, precision: str, *, fused: bool) -> Step:
    """lightly's modules as its example of DINO puts them together: one view at a time."""
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import update_momentum

    device = views[0].device

    def network() -> nn.Module:
        head = DINOProjectionHead(384, 2048, 256, PROTOTYPES, freeze_last_layer=0, norm_last_layer=False)
        return nn.Sequential(_vit(fused), head).to(device).train()

    student, teacher = network(), network()
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(PROTOTYPES, TEACHER_TEMP, TEACHER_TEMP, 0).to(device)
    crops = _apart(views)

    def loss() -> Tensor:
        with torch.no_grad():
            targets = [teacher(crop) for crop in crops[: LARGE[0]]]
        return criterion(targets, [student(crop) for crop in crops], epoch=0)  # type: ignore[no-any-return]

    return peer_step(
        loss, student, teacher, precision, clip_each, lambda new, old: update_momentum(new, old, m=MOMENTUM)
    )


class PlainNetwork(nn.Module):
    """What one would write with timm's ViT in an afternoon."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.vit = _vit(fused)
        self.mlp = nn.Sequential(
            nn.Linear(384, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(PROTOTYPES, 256))

    def forward(self, views: Iterable[Tensor]) -> Tensor:
        features = torch.cat([self.vit(images) for images in views])
        return F.linear(F.normalize(self.mlp(features), dim=-1), F.normalize(self.prototypes, dim=-1))


def plain_timm(views: Views, precision: str, *, fused: bool) -> Step:
    """A plain loop over timm's ViT."""
    student = PlainNetwork(fused).to(views[0].device).train()
    teacher = copy.deepcopy(student)
    state = {"centre": torch.zeros(PROTOTYPES, device=views[0].device)}

    def loss() -> Tensor:
        with torch.no_grad():
            said = teacher(views[:1]).float()
            targets = ((said - state["centre"]) / TEACHER_TEMP).softmax(-1).chunk(LARGE[0])
            state["centre"] = 0.9 * state["centre"] + 0.1 * said.mean(0)
        logs = (student(views).float() / 0.1).log_softmax(-1).chunk(CROPS)
        terms = [-(q * p).sum(-1).mean() for t, q in enumerate(targets) for s, p in enumerate(logs) if s != t]
        return torch.stack(terms).mean()

    return peer_step(loss, student, teacher, precision, clip_each, move_each)


def _apart(views: Views) -> list[Tensor]:
    """One tensor per crop."""
    return [crop for images, (count, _) in zip(views, (LARGE, SMALL), strict=True) for crop in images.chunk(count)]


def candidates(folder: Path | None) -> dict[str, Callable[[Views, str], Step]]:
    """Those that are at hand, by name."""
    found: dict[str, Callable[[Views, str], Step]] = {OURS: ours}
    if folder is not None:
        found["the authors' code"] = partial(official, folder=folder)
    for name, fused in (("fused", True), ("explicit", False)):
        if find_spec("lightly") is not None:
            found[f"lightly, {name} attention"] = partial(lightly, fused=fused)
        found[f"timm's ViT, {name} attention"] = partial(plain_timm, fused=fused)
    return found


def peak_memory(make: Callable[[Views, str], Step], views: Views, precision: str) -> float:
    """By how many MiB some steps raise the most that is resident, or on a GPU allocated."""
    device = views[0].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    step = make(views, precision)
    for _ in range(MEMORY_STEPS):
        step()
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return ((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, help="a checkout of facebookresearch/dino")
    parser.add_argument("--memory-of", help="print the memory of one candidate, and nothing else")
    args, device = begin(parser, batch=4)
    views = [torch.randn(count * args.batch, 3, size, size, device=device) for count, size in (LARGE, SMALL)]
    known = candidates(args.official)
    if args.memory_of is not None:
        print(peak_memory(known[args.memory_of], views, args.precision))
        return
    memory = {}
    for name in known:
        command = [sys.executable, *sys.argv, "--memory-of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    times = race({name: make(views, args.precision) for name, make in known.items()}, args.rounds, device)
    report(f"DINO step, ViT-S/16 {args.precision}", args.batch, times, device, memory)


if __name__ == "__main__":
    main()
