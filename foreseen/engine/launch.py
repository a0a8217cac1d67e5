"""The start of a process: accelerate's view of the machine, and the arithmetic chosen for its device."""

import logging
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from foreseen.config import Compute
from foreseen.engine.objective import Objective
from foreseen.engine.run_folder import cpu_info

_logger = logging.getLogger(__name__)
_FP32_ERROR = 2e-6  # relative; what float32 products of this size lose anyway, with room


def start(compute: Compute) -> Accelerator:
    """Join the job that the launcher started, or be a job of one process.

    Args:
        compute: the config's section.
    """
    # Buffers of our objectives are the same on every rank by construction; DDP need not send them each forward.
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision="bf16" if compute.precision == "bf16" else "no", kwargs_handlers=[buffers]
    )
    if accelerator.device.type == "cpu" and compute.precision == "fp32":
        allow_fast_fp32()
    if accelerator.device.type == "cpu" and compute.precision == "bf16" and accelerator.is_main_process:
        _advise_on_bf16()
    return accelerator


def place(objective: Objective, accelerator: Accelerator, compute: Compute) -> None:
    """Move an objective to its device and choose the attention kernel that is fastest there."""
    objective.to(device=accelerator.device)
    if compute.precision == "fp64":
        objective.double()
    choose_attention(objective, accelerator.device)


def choose_attention(model: nn.Module, device: torch.device) -> None:
    """Let every attention of a timm model use the kernel that is fastest on a device at the sizes of a ViT.

    That is the fused one, but for AMD's CPUs, where explicit products beat it by a fifth (benchmarks/mae_step.py). The
    choice must not depend on a race, or a resumed run could differ in bits.
    """
    explicit = device.type == "cpu" and _is_amd()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", not explicit)  # noqa: B010  (no attribute that torch declares)


def wrap(objective: Objective, accelerator: Accelerator) -> nn.Module:
    """Wrap an objective for autocast and, with several ranks, for DDP."""
    with warnings.catch_warnings():
        # torch 2.15 renames the argument; older ones, which we support, know only this name.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
        wrapped: nn.Module = accelerator.prepare(objective)
    return wrapped


def describe_devices(accelerator: Accelerator) -> dict[str, Any]:
    """The accelerator's part of environment.json."""
    cuda = accelerator.device.type == "cuda"
    return {
        "ranks": accelerator.num_processes,
        "device": torch.cuda.get_device_name(accelerator.device) if cuda else accelerator.device.type,
        "threads": torch.get_num_threads(),
        "allocator": os.environ.get("LD_PRELOAD", "") or "default",
    }


def allow_fast_fp32() -> None:
    """Let float32 products take the faster library, on the CPUs where they stay float32 there.

    On AMD's CPUs the default library leaves half the speed unused, and the setting "medium" routes around it, still in
    float32. Elsewhere it gains nothing or would really round to bfloat16, so the error is measured as well. Both tests
    come out alike at every start on a machine; a race of speeds would not, and a resumed run could differ in bits.
    """
    if not _is_amd():
        return
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    error = ((a @ b).double() - exact).norm() / exact.norm()
    if error > _FP32_ERROR:
        torch.set_float32_matmul_precision(before)


def _is_amd() -> bool:
    return "AuthenticAMD" in cpu_info()


def _advise_on_bf16() -> None:
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(cpu_info().split()):
        _logger.warning(
            "this CPU has no bfloat16 arithmetic, so compute.precision bf16 is several times slower than fp32 here; "
            "set compute.precision=fp32"
        )
