"""What keeps a teacher's targets from all being one prototype: a centre, or Sinkhorn-Knopp over the whole batch.

Either is one vector [K], added to the teacher's logits over their temperature before the softmax. So the logits of a
batch, which may be gigabytes, are never kept or sent.

Letters: R rows, d of the bottleneck, K prototypes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from foreseen.engine.objective import all_reduce_max, all_reduce_sum


class Centre(nn.Module):
    """A running mean of the teacher's logits, taken away from them.

    A mean of logits is the logits of the mean bottleneck, so no logits are made for it.

    Args:
        prototypes: K.
        momentum: what the mean keeps of itself at each step.

    Source: Caron et al. 2021, arXiv:2104.14294, equation 4; facebookresearch/dino at 7c446df, main_dino.py,
    update_center.
    """

    center: Tensor
    _mean: Tensor

    def __init__(self, prototypes: int, momentum: float) -> None:
        super().__init__()
        self._momentum = momentum
        self.register_buffer("center", torch.zeros(prototypes))
        self.register_buffer("_mean", torch.zeros(prototypes), persistent=False)

    def observe(self, sums: Sequence[Tensor], prototypes: Tensor) -> None:
        """Take in the teacher's bottlenecks of a step, of all ranks.

        The centre does not move yet: targets of this step know only the steps before.

        Args:
            sums: `row_sum` of each micro-batch.
            prototypes: [K, d].
        """
        total = all_reduce_sum(torch.stack(list(sums)).sum(0))
        with torch.autocast(total.device.type, enabled=False):
            self._mean = prototypes @ (total[:-1] / total[-1].clamp(min=1.0))

    def shift(self, temperature: float) -> Tensor:
        """What to add to logits over their temperature, [K]."""
        return -self.center / temperature

    def move(self, finite: Tensor) -> None:
        """Move the centre towards what was observed, unless the step was skipped."""
        moved = self.center * self._momentum + self._mean * (1.0 - self._momentum)
        self.center.copy_(torch.where(finite, moved, self.center))


def row_sum(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """What a centre needs of bottlenecks [R, d]: their sum, and how many there are behind it, [d + 1].

    Args:
        rows: of a micro-batch.
        weights: 1 for rows that count, 0 for others, [R]; None counts all.
    """
    weights = torch.ones_like(rows[:, 0]) if weights is None else weights
    return torch.cat([(weights[:, None] * rows).sum(0), weights.sum()[None]])


def sinkhorn_shift(
    rows: Sequence[Tensor],
    prototypes: Tensor,
    temperature: float,
    *,
    weights: Sequence[Tensor] | None = None,
    iterations: int = 3,
    at_once: int | None = None,
) -> Tensor:
    """Sinkhorn-Knopp over the rows of all micro-batches and ranks.

    softmax(logits / temperature + shift) are rows that add up to the same for every prototype, as far as so many
    iterations bring them.

    Args:
        rows: bottlenecks of the teacher, [R, d] per micro-batch.
        prototypes: [K, d].
        temperature: of the teacher.
        weights: 1 for rows that count, 0 for places that are empty, [R] per micro-batch; None counts all.
        iterations: of both normalisations.
        at_once: rows whose logits are held at a time.

    Returns:
        [K].

    Source: Caron et al. 2020, arXiv:2006.09882; facebookresearch/dinov2, loss/dino_clstoken_loss.py,
    sinkhorn_knopp_teacher.
    """
    if weights is None:
        weights = [torch.ones_like(each[:, 0]) for each in rows]

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for each, weight in zip(rows, weights, strict=True):
            size = at_once or max(1, len(each))
            for start in range(0, len(each), size):
                yield (
                    scaled_logits(each[start : start + size], prototypes, temperature),
                    weight[start : start + size],
                )

    # The first sums are over logits of any size, so each is taken out as a power of its own.
    sums = torch.full_like(prototypes[:, 0], -torch.inf)
    for logits, weight in chunks():
        sums = torch.logaddexp(sums, (logits + weight.log()[:, None]).logsumexp(0))
    tiny = torch.finfo(sums.dtype).tiny
    peak = all_reduce_max(sums.clone()).clamp(min=torch.finfo(sums.dtype).min)
    log_u = -(peak + all_reduce_sum((sums - peak).exp()).clamp(min=tiny).log())
    for _ in range(iterations - 1):
        shares = torch.zeros_like(log_u)
        for logits, weight in chunks():
            shares += (weight[:, None] * (logits + log_u).softmax(dim=-1)).sum(0)  # no product: that would round
        log_u = log_u - all_reduce_sum(shares).clamp(min=tiny).log()
    return log_u


def scaled_logits(rows: Tensor, prototypes: Tensor, temperature: float) -> Tensor:
    """Logits over a temperature: [..., d] and [K, d] -> [..., K], in float32 at least."""
    # As one matrix: torch would multiply a cut of several axes one by one, each with prototypes of its own to sum up.
    logits = rows.reshape(-1, rows.shape[-1]) @ prototypes.mT
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).view(*rows.shape[:-1], -1) / temperature
