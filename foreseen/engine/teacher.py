"""The EMA teacher: a slow copy of the student, in float32, that moves once per optimizer step.

In half precision a momentum of 0.9999 would be lost in rounding; weights here are never below float32.

Source: Tarvainen and Valpola 2017, arXiv:1703.01780; facebookresearch/dino at 7c446df, main_dino.py, train_one_epoch.
"""

import torch
from torch import Tensor, nn


def move_teacher(teacher: nn.Module, student: nn.Module, momentum: float, finite: Tensor) -> None:
    """Move the teacher's weights towards the student's; exactly where they are if the step was skipped.

    Batch statistics are not moved: a teacher with BatchNorm counts its own.

    Args:
        teacher: its parameters' names are among the student's, which may have more.
        student: after the step; a skipped step left it finite.
        momentum: what the teacher keeps of itself.
        finite: boolean scalar on the device.
    """
    towards = dict(student.named_parameters())
    old = [parameter.detach() for parameter in teacher.parameters()]
    new = [towards[name].detach() for name, _ in teacher.named_parameters()]
    way = torch._foreach_sub(new, old)
    torch._foreach_mul_(way, (1.0 - momentum) * finite.to(old[0].dtype))
    torch._foreach_add_(old, way)
