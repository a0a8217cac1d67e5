"""The start of a process: accelerate's view of the machine, and the arithmetic chosen for its device."""

import contextlib
import logging
import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from foreseen.config import Compute
from foreseen.engine.compiled import check_backend, compile_blocks
from foreseen.engine.objective import Objective
from foreseen.engine.rank_zero import PATIENCE
from foreseen.engine.run_folder import cpu_info
from foreseen.errors import BadInput
from foreseen.models.blocks import repeated_blocks
from foreseen.models.recompute import recompute_activations

_logger = logging.getLogger(__name__)
_OTHER_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}  # fmt: skip
_FP32_ERROR = 2e-6  # relative; what float32 products of this size lose anyway, with room
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_FAST_ON_A_CPU = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "fphp"}}


def start(compute: Compute) -> Accelerator:
    """Join the job that the launcher started, or be a job of one process.

    Args:
        compute: the config's section.

    Raises:
        BadInput: torch has no such backend as `compute.compile` names, or accelerate's config asks for what this loop
            does not do.
    """
    if compute.backend is not None:
        check_backend(compute.backend)
    _refuse_other_engines()
    # Buffers of our objectives are the same on every rank by construction; DDP need not send them each forward.
    buffers = DistributedDataParallelKwargs(broadcast_buffers=False)
    # Precision is ours: accelerate has no fp16 on a CPU, and its scaler waits for the device at every step.
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[buffers, InitProcessGroupKwargs(timeout=PATIENCE)])
    accelerator.gradient_accumulation_steps = 1  # ours; one of accelerate's config would divide every loss once more
    if accelerator.device.type == "cuda":
        keep_float32()
    if accelerator.device.type == "cpu" and compute.precision == "fp32":
        allow_fast_fp32()
    if accelerator.is_main_process:
        _advise_on(compute.precision, accelerator.device)
    return accelerator


def keep_float32() -> None:
    """Let a GPU keep all 23 bits of float32 in products, where TF32 has 10, and tokenizers would see other codes.

    By default convolutions are in TF32, and in some containers matrix products are, too. What autocast rounds stays.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _refuse_other_engines() -> None:
    for variable, name in _OTHER_ENGINES.items():
        if os.environ.get(variable, "").lower() == "true":  # as accelerate reads it
            raise BadInput(
                f"accelerate's config asks for {name} ({variable}), which this loop cannot drive: checkpoints would "
                "hold parts of the weights; launch with --multi_gpu, or with --config_file of configs/accelerate"
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no"):
        raise BadInput(
            f"accelerate's config asks for torch.compile (ACCELERATE_DYNAMO_BACKEND={backend}), which here is "
            "compute.compile=true; launch with --dynamo_backend no, or with --config_file of configs/accelerate"
        )


def autocast(accelerator: Accelerator, compute: Compute) -> contextlib.AbstractContextManager[Any]:
    """The precision that a run's networks compute in: for `prepare`, `forward`, `evaluate` and pictures alike."""
    dtype = _AUTOCAST.get(compute.precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast(accelerator.device.type, dtype)


def image_dtype(compute: Compute) -> torch.dtype:
    """What images are before autocast."""
    return torch.float64 if compute.precision == "fp64" else torch.float32


def place(objective: Objective, accelerator: Accelerator, compute: Compute) -> None:
    """Move an objective to its device and choose there how its networks compute.

    Raises:
        BadInput: something is asked of the networks' repeated blocks, and they have none.
    """
    objective.to(device=accelerator.device, dtype=torch.float64 if compute.precision == "fp64" else None)
    choose_attention(objective, accelerator.device)
    blocks = [block for network in objective.children() for block in repeated_blocks(network)]
    if compute.checkpoint_activations:
        _check_any(blocks, "compute.checkpoint_activations=false")
        for block in blocks:
            recompute_activations(block)
    if compute.backend is not None:
        _check_any(blocks, "compute.compile=false")
        compile_blocks(blocks, compute.backend)


def _check_any(blocks: list[nn.Module], remedy: str) -> None:
    if not blocks:
        raise BadInput(f"no network of this method has repeated blocks; set {remedy} or choose another model.name")


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
    """Wrap an objective for DDP where there are several ranks."""
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


def _advise_on(precision: str, device: torch.device) -> None:
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        _logger.warning(
            "%s has no bf16 arithmetic, so compute.precision bf16 is emulated, and slow; set compute.precision=fp16",
            torch.cuda.get_device_name(device),
        )
    if device.type == "cpu" and precision in _FAST_ON_A_CPU and not _FAST_ON_A_CPU[precision] & set(cpu_info().split()):
        _logger.warning(
            "this CPU has no %s arithmetic, so compute.precision %s is several times slower than fp32 here; "
            "set compute.precision=fp32", precision, precision,
        )  # fmt: skip
