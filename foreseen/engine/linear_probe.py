"""A linear classifier on frozen features, with its learning rate chosen on validation.

Features are computed once, without augmentation, and all learning rates are trained side by side, as DINOv2 does
(Oquab et al. 2023, arXiv:2304.07193; facebookresearch/dinov2, eval/linear.py). Before the classifier stands MAE's batch
norm without affine (He et al. 2022, arXiv:2111.06377, appendix A.1), here with the statistics of the whole training
part: features of very different scale become comparable. SGD, momentum 0.9, no decay, cosine to 0.

Letters: N pictures, B of them in a batch, D features, K classes, G learning rates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from foreseen.data.order import Order
from foreseen.engine.labelled import Accuracy, Labelled, accuracy, hits
from foreseen.errors import BadInput
from foreseen.keys import stream_constant

# Three a decade and four decades, as DINOv2's thirteen values; larger ones, since the features are normed.
LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCH = 256
_EPOCHS = 50
_FEWEST_STEPS, _MOST_STEPS = 500, 50_000  # at the most ten passes over ImageNet, DINOv2's length
_MOMENTUM = 0.9
_INITIAL_STD = 0.01
_EPSILON = 1e-6


@dataclass(frozen=True)
class LinearProbe:
    """What a linear probe came out at.

    Attributes:
        accuracy: on the judged pictures, read once with the chosen learning rate.
        lr: chosen on validation; the smallest of equals.
        validation_top1: what it was chosen by.
        lr_is_extreme: it is the smallest or largest of the grid, so a better one may lie outside.
    """

    accuracy: Accuracy
    lr: float
    validation_top1: float
    lr_is_extreme: bool


def linear_probe(
    train: Labelled, validation: Labelled, judged: Labelled, *, num_classes: int, seed: int
) -> LinearProbe:  # fmt: skip
    """Train linear classifiers, choose the learning rate, and read the judged pictures once.

    Args:
        train: features [N, D] and labels.
        validation: chosen by; no picture of `train`.
        judged: scored with the chosen learning rate only.
        num_classes: K.
        seed: of the initial weights and the order of the pictures.

    Raises:
        BadInput: there is nothing to choose by.
    """
    if not len(validation.labels):
        raise BadInput(
            "no class has two labels, so none can be set aside to choose the linear probe's learning rate by; leave "
            "the linear probe out (probe.linear=false, --no-linear) or label more"
        )
    mean = train.features.float().mean(0)
    scale = (train.features.float().var(0, correction=0) + _EPSILON).rsqrt()

    def normed(features: Tensor) -> Tensor:
        return (features.float() - mean) * scale

    weights, bias = _train(normed(train.features), train.labels, num_classes, seed)
    chosen_by = [
        int(hits(normed(validation.features) @ w.T + b, validation.labels)[0])
        for w, b in zip(weights, bias, strict=True)
    ]
    best = int(np.argmax(chosen_by))
    scores = normed(judged.features) @ weights[best].T + bias[best]
    return LinearProbe(
        accuracy=accuracy(hits(scores, judged.labels), len(judged.labels)),
        lr=LEARNING_RATES[best],
        validation_top1=chosen_by[best] / len(validation.labels),
        lr_is_extreme=best in (0, len(LEARNING_RATES) - 1),
    )


def _train(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classifiers for all learning rates from the same start: weights [G, K, D] and bias [G, K].

    The gradient of the mean cross-entropy is written out: it is one line, and nothing else needs autograd here.
    """
    size, device = features.shape[1], features.device
    rates = torch.tensor(LEARNING_RATES, device=device)[:, None, None]
    generator = np.random.Generator(np.random.Philox(key=stream_constant(f"linear probe/{seed}")))
    drawn = generator.standard_normal((num_classes, size), dtype=np.float32) * _INITIAL_STD
    start = torch.cat([torch.from_numpy(drawn).to(device), torch.zeros(num_classes, 1, device=device)], dim=1)
    heads = start.repeat(len(rates), 1, 1)  # [G, K, D + 1]: the bias is the weight of a feature that is always 1
    velocity = torch.zeros_like(heads)
    order = Order(seed, len(labels))
    batch = min(_BATCH, len(labels))
    steps = min(max(_EPOCHS * len(labels) // batch, _FEWEST_STEPS), _MOST_STEPS)
    for step in range(steps):
        rows = torch.from_numpy(order.samples(np.arange(step * batch, (step + 1) * batch))).to(device)
        x = torch.cat([features[rows], torch.ones(batch, 1, device=device)], dim=1)
        error = (x @ heads.transpose(1, 2)).softmax(dim=2)  # [G, B, K]
        error[:, torch.arange(batch, device=device), labels[rows]] -= 1
        velocity.mul_(_MOMENTUM).add_(error.transpose(1, 2) @ x, alpha=1 / batch)
        heads -= rates * velocity * (0.5 * (1 + np.cos(np.pi * step / steps)))
    return heads[..., :-1], heads[..., -1]
