"""A linear classifier on frozen features, with its learning rate and weight decay chosen on validation.

Features are computed once, without augmentation, and all pairs of rates are trained side by side, as DINOv2 does
(Oquab et al. 2023, arXiv:2304.07193; facebookresearch/dinov2, eval/linear.py). Before the classifier stands MAE's batch
norm without affine (He et al. 2022, arXiv:2111.06377, appendix A.1), here with the statistics of the whole training
part: features of very different scale become comparable. SGD, momentum 0.9, cosine to 0.

Letters: N pictures, B of them in a batch, D features, K classes, G pairs of learning rate and weight decay.
"""

import numpy as np
import torch
from torch import Tensor

from foreseen.data.order import Order
from foreseen.engine.labelled import Labelled, TrainedProbe, accuracy, hits
from foreseen.errors import BadInput
from foreseen.keys import stream_constant

# Three a decade and four decades, as DINOv2's thirteen values; larger ones, since the features are normed.
LEARNING_RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
WEIGHT_DECAYS = (0.0, 1e-3, 1e-2)  # none, as the papers, wins mostly: a small lr over few steps does the same
_BATCH = 256
_EPOCHS = 50
_FEWEST_STEPS, _MOST_STEPS = 500, 50_000  # at the most ten passes over ImageNet, DINOv2's length
_MOMENTUM = 0.9
_INITIAL_STD = 0.01
_EPSILON = 1e-6


def linear_probe(
    train: Labelled, validation: Labelled, judged: Labelled, *, num_classes: int, seed: int
) -> TrainedProbe:  # fmt: skip
    """Train linear classifiers, choose learning rate and weight decay, and read the judged pictures once.

    Args:
        train: features [N, D] and labels.
        validation: chosen by; no picture of `train`.
        judged: scored with the chosen pair only.
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

    pairs = [(lr, decay) for decay in WEIGHT_DECAYS for lr in LEARNING_RATES]
    weights, bias = _train(normed(train.features), train.labels, pairs, num_classes, seed)
    chosen_by = [
        int(hits(normed(validation.features) @ w.T + b, validation.labels)[0])
        for w, b in zip(weights, bias, strict=True)
    ]
    best = int(np.argmax(chosen_by))
    scores = normed(judged.features) @ weights[best].T + bias[best]
    return TrainedProbe(
        accuracy=accuracy(hits(scores, judged.labels), len(judged.labels)),
        lr=pairs[best][0],
        weight_decay=pairs[best][1],
        validation_top1=chosen_by[best] / len(validation.labels),
        lr_is_extreme=pairs[best][0] in (LEARNING_RATES[0], LEARNING_RATES[-1]),
    )


def _train(
    features: Tensor, labels: Tensor, pairs: list[tuple[float, float]], num_classes: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Classifiers for all pairs of rates from the same start: weights [G, K, D] and bias [G, K].

    The gradient of the mean cross-entropy is written out: it is one line, and nothing else needs autograd here.
    """
    size, device = features.shape[1], features.device
    rates, decays = (torch.tensor(column, device=device)[:, None, None] for column in zip(*pairs, strict=True))
    generator = np.random.Generator(np.random.Philox(key=stream_constant(f"linear probe/{seed}")))
    drawn = generator.standard_normal((num_classes, size), dtype=np.float32) * _INITIAL_STD
    start = torch.cat([torch.from_numpy(drawn).to(device), torch.zeros(num_classes, 1, device=device)], dim=1)
    heads = start.repeat(len(pairs), 1, 1)  # [G, K, D + 1]: the bias is the weight of a feature that is always 1
    decays = decays * torch.tensor([1.0] * size + [0.0], device=device)  # the bias stays as it is
    velocity = torch.zeros_like(heads)
    order = Order(seed, len(labels))
    batch = min(_BATCH, len(labels))
    steps = min(max(_EPOCHS * len(labels) // batch, _FEWEST_STEPS), _MOST_STEPS)
    for step in range(steps):
        rows = torch.from_numpy(order.samples(np.arange(step * batch, (step + 1) * batch))).to(device)
        x = torch.cat([features[rows], torch.ones(batch, 1, device=device)], dim=1)
        error = (x @ heads.transpose(1, 2)).softmax(dim=2)  # [G, B, K]
        error[:, torch.arange(batch, device=device), labels[rows]] -= 1
        velocity.mul_(_MOMENTUM).add_(error.transpose(1, 2) @ x, alpha=1 / batch).addcmul_(decays, heads)
        heads -= rates * velocity * (0.5 * (1 + np.cos(np.pi * step / steps)))
    return heads[..., :-1], heads[..., -1]
