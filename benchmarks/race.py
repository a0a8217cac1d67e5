"""What the benchmarks of training steps share: candidates that take turns in one process, and the table of ratios."""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from foreseen.engine.launch import allow_fast_fp32

Step = Callable[[], Tensor]
OURS = "foreseen"


def begin(parser: argparse.ArgumentParser, *, batch: int) -> tuple[argparse.Namespace, torch.device]:
    """Add the options that steps share, read them, and set the process up; the options, and where candidates run."""
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        allow_fast_fp32()  # for all candidates alike
    return options, device


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast, or none for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def set_attention(model: nn.Module, fused: bool) -> None:
    """The switch that timm documents for its attention kernel."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused


def training_step(model: nn.Module, loss: Callable[[], Tensor], precision: str, device: torch.device) -> Step:
    """A peer's step: forward, backward, fused AdamW, zero_grad."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=True)

    def step() -> Tensor:
        with autocast(precision, device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step


def race(candidates: Mapping[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each candidate's turns, in order; a first round warms up and is not kept."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, step in candidates.items():
            began = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def report(
    title: str,
    batch: int,
    times: Mapping[str, Sequence[float]],
    device: torch.device,
    memory: Mapping[str, float] | None = None,
) -> None:
    """Print the ratios to ours, of the same round each, and the fastest peer's; and peak memory in MiB, where given."""
    rounds = len(times[OURS])
    print(f"{title} batch {batch}, {torch.get_num_threads()} threads, {device}, "
          f"allocator {os.environ.get('LD_PRELOAD', 'default')}, median of {rounds} rounds")  # fmt: skip
    ratios = {name: statistics.median(s / o for s, o in zip(times[name], times[OURS], strict=True)) for name in times}
    for name, seconds in times.items():
        rate = batch / statistics.median(seconds)
        taken = "" if memory is None else f"   {memory[name]:7.0f} MiB, {memory[name] / memory[OURS]:.2f} x ours"
        print(f"  {name:34} {rate:8.2f} img/s   foreseen is {ratios[name]:.2f} x as fast{taken}")
    best = min((name for name in times if name != OURS), key=lambda name: statistics.median(times[name]))
    print(f"  against the fastest peer ({best}): {ratios[best]:.2f} x")
