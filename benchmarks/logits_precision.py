"""What low-precision logits change in the loss and gradients of self-distillation, at DINO's size.

    python benchmarks/logits_precision.py

Unit vectors [256] of 16 images with 2 + 4 crops are compared with 65,536 prototypes, in float32 and with the matrix
product under bf16 or fp16 autocast, everything after it in float32, as training does. "start": vectors and prototypes
are random, as at the first step. "trained": each image lies at a cosine to a prototype of its own, with its crops
around it; targets have an entropy of some nats. Differences are to float64. docs/self_distillation.md has what came
out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from foreseen.pretrain.self_distillation import _class_sums

IMAGES, LARGE, CROPS, DIM, PROTOTYPES = 16, 2, 6, 256, 65_536
STUDENT_TEMP, TEACHER_TEMP = 0.1, 0.04


def vectors(cosine: float | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Student crops [S, B, d], teacher crops [T, B, d] and prototypes [K, d], of unit length, in float64."""

    def random(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    prototypes = random(PROTOTYPES, DIM)
    if cosine is None:
        return random(CROPS, IMAGES, DIM), random(LARGE, IMAGES, DIM), prototypes
    around = (1 - cosine**2) ** 0.5
    crops = [
        F.normalize(cosine * prototypes[:IMAGES] + around * random(n, IMAGES, DIM), dim=-1) for n in (CROPS, LARGE)
    ]
    return crops[0], crops[1], prototypes


def step(crops: Tensor, teacher: Tensor, prototypes: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss, entropy of targets, and gradients, with logits in a precision."""
    compute = dtype if dtype == torch.float64 else torch.float32
    student, weights = (each.to(compute, copy=True).requires_grad_() for each in (crops, prototypes))
    lowered = dtype in (torch.bfloat16, torch.float16)
    with torch.autocast("cpu", dtype=dtype if lowered else torch.bfloat16, enabled=lowered):
        sums = _class_sums(
            student, teacher.to(compute), weights, prototypes.to(compute), torch.zeros(PROTOTYPES, dtype=compute),
            student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP,
        )  # fmt: skip
    (sums[0] / IMAGES).backward()
    assert student.grad is not None
    assert weights.grad is not None
    numbers = (sums / IMAGES).detach().double()
    return {"loss": numbers[0], "entropy": numbers[1], "features": student.grad, "prototypes": weights.grad}


def main() -> None:
    torch.set_num_threads(1)
    print("case         logits      loss   off by  entropy   off by   gradient of features, of prototypes: off by")
    for name, cosine in (("start", None), ("trained 0.4", 0.4), ("trained 0.6", 0.6), ("trained 0.8", 0.8)):
        inputs = vectors(cosine, torch.Generator().manual_seed(0))
        exact = step(*inputs, torch.float64)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = step(*inputs, dtype)
            off = {key: float((found[key] - exact[key]).norm() / exact[key].norm()) for key in exact}
            print(
                f"{name:11}  {str(dtype).removeprefix('torch.'):8}  {float(found['loss']):6.3f}  {off['loss']:.1e}   "
                f"{float(found['entropy']):6.3f}  {off['entropy']:.1e}   {off['features']:.1e}  {off['prototypes']:.1e}"
            )


if __name__ == "__main__":
    main()
