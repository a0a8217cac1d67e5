"""What a student learns from a teacher's logits: its decision (hard) or its probabilities (soft).

Touvron et al. 2021, arXiv:2012.12877, equations 2 and 3; Hinton et al. 2015, arXiv:1503.02531. The authors' code is
facebookresearch/deit at 7e160fe, losses.py, whose numbers this file reproduces (tests/finetune/test_distill.py).

Letters: B images, K classes.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Mean = Literal["images", "logits"]


def hard_distillation(logits: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the class that the teacher takes an image for.

    Args:
        logits: of the student, [B, K].
        teacher: its logits, [B, K].
    """
    return F.cross_entropy(logits, teacher.argmax(dim=1))


def soft_distillation(logits: Tensor, teacher: Tensor, *, tau: float, mean: Mean) -> Tensor:
    """tau² · KL(teacher / tau ‖ student / tau).

    Args:
        logits: of the student, [B, K].
        teacher: its logits, [B, K].
        tau: the temperature.
        mean: over the "images", as the paper writes it; or over all B · K "logits", as the authors' code does, which
            makes it K times smaller.
    """
    log_p, log_q = ((x / tau).log_softmax(dim=1) for x in (logits, teacher))
    divergence = F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    return divergence * (tau**2 / (len(logits) if mean == "images" else logits.numel()))
