"""A classifier that looks for itself where in a frozen picture its evidence is: attention pooling, then a linear layer.

One learned query attends to the patch features of a picture, in several heads; what it gathers is classified linearly.
Masked image models, whose patches know more than their mean, are judged so (Chen et al. 2022, arXiv:2202.03026,
"attentive probing"; Bardes et al. 2024, arXiv:2404.08471; Darcet et al. 2025, arXiv:2502.08769). Here the pooling is
the query, keys and values alone, without the MLP that V-JEPA puts behind it.

All pairs of learning rate and weight decay are trained side by side from the same start, on features that are computed
once and lie in a file; validation chooses one. AdamW, warm-up over a tenth, cosine to 0.

A query q meets the keys K x of a picture as (K' q) x, and the values are taken of what was gathered: both are the same
numbers as the usual order of products, at a cost that does not grow with the square of the width for each patch.

Letters: N pictures, B of them in a batch, L patches, D features, H heads of d = D / H, K classes, G pairs of rates.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foreseen.data.order import Order
from foreseen.engine.labelled import TrainedProbe, accuracy, hits
from foreseen.errors import BadInput
from foreseen.keys import stream_constant

LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WEIGHT_DECAYS = (0.01, 0.1)
_BATCH = 128
_EPOCHS = 20
_FEWEST_STEPS, _MOST_STEPS = 300, 20_000
_WARMUP = 0.1
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
_HEAD_SIZE = 64
_INITIAL_STD = 0.02
_NORM_EPSILON = 1e-6


class PatchRows(Protocol):
    """Patch features [N, L, D], of which a few rows are read at a time; a numpy array is such."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> NDArray[Any]: ...


class Patches(NamedTuple):
    """Patch features, and the class of each picture, [N] int64."""

    features: PatchRows
    labels: Tensor


class _Heads(NamedTuple):
    """The weights of all classifiers: query [G, H, d], key and value [G, H, d, D], weight [G, K, D], bias [G, K]."""

    query: Tensor
    key: Tensor
    value: Tensor
    weight: Tensor
    bias: Tensor

    def logits(self, patches: Tensor) -> Tensor:
        """[B, L, D] normed -> [G, B, K]."""
        pairs, heads, size = self.query.shape
        looks = torch.einsum("ghsd,ghs->ghd", self.key, self.query).flatten(0, 1) * size**-0.5
        attention = (patches @ looks.T).softmax(dim=1)  # [B, L, G * H]
        gathered = (attention.transpose(1, 2) @ patches).unflatten(1, (pairs, heads))
        pooled = torch.einsum("bghd,ghsd->gbhs", gathered, self.value).flatten(2)
        return pooled @ self.weight.transpose(1, 2) + self.bias[:, None]


def attentive_probe(
    train: Patches, validation: Patches, judged: Patches, *, num_classes: int, seed: int, device: torch.device
) -> TrainedProbe:  # fmt: skip
    """Train attentive classifiers, choose learning rate and weight decay, and read the judged pictures once.

    Args:
        train: features and labels.
        validation: chosen by; no picture of `train`.
        judged: scored with the chosen pair only.
        num_classes: K.
        seed: of the initial weights and the order of the pictures.
        device: where to train.

    Raises:
        BadInput: there is nothing to choose by, or no picture to judge.
    """
    if not len(validation.labels):
        raise BadInput(
            "no class has two labels, so none can be set aside to choose the attentive probe's learning rate by; leave "
            "out --attentive or label more"
        )
    if not len(judged.labels):
        raise BadInput("none of the pictures to be judged by a probe has a label")
    norm = _norm_of(train.features, device)
    pairs = [(lr, decay) for decay in WEIGHT_DECAYS for lr in LEARNING_RATES]
    heads = _train(train, norm, pairs, num_classes, seed, device)
    chosen_by = _hits(heads, validation, norm, device)[:, 0]
    best = int(chosen_by.argmax())
    alone = _Heads(*(part[best : best + 1] for part in heads))
    lr, decay = pairs[best]
    return TrainedProbe(
        accuracy=accuracy(_hits(alone, judged, norm, device)[0], len(judged.labels)),
        lr=lr,
        weight_decay=decay,
        validation_top1=int(chosen_by[best]) / len(validation.labels),
        lr_is_extreme=lr in (LEARNING_RATES[0], LEARNING_RATES[-1]),
    )


def _norm_of(features: PatchRows, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of each feature over all patches of all pictures, [D]."""
    total, squares = (torch.zeros(features.shape[-1], dtype=torch.float64, device=device) for _ in range(2))
    for rows in _chunks(len(features)):
        part = torch.from_numpy(np.ascontiguousarray(features[rows])).to(device).double().flatten(0, 1)
        total += part.sum(0)
        squares += part.square().sum(0)
    mean = total / (len(features) * features.shape[1])
    variance = (squares / (len(features) * features.shape[1]) - mean.square()).clamp(min=0)
    return mean.float(), (variance + _NORM_EPSILON).rsqrt().float()


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _BATCH):
        yield slice(start, min(start + _BATCH, count))


def _normed(features: NDArray[Any], norm: tuple[Tensor, Tensor]) -> Tensor:
    mean, scale = norm
    return (torch.from_numpy(np.ascontiguousarray(features)).to(mean.device).float() - mean) * scale


@torch.no_grad()
def _hits(heads: _Heads, patches: Patches, norm: tuple[Tensor, Tensor], device: torch.device) -> Tensor:
    """Of each classifier how many pictures are right at first and among five, [G, 2]."""
    found = torch.zeros(len(heads.bias), 2, dtype=torch.int64, device=device)
    labels = patches.labels.to(device)
    for rows in _chunks(len(labels)):
        logits = heads.logits(_normed(patches.features[rows], norm))
        found += torch.stack([hits(of_one, labels[rows]) for of_one in logits])
    return found.cpu()


def _train(
    train: Patches, norm: tuple[Tensor, Tensor], pairs: list[tuple[float, float]], num_classes: int, seed: int,
    device: torch.device,
) -> _Heads:  # fmt: skip
    """Classifiers for all pairs, from the same start."""
    labels = train.labels.to(device)
    start = _start(train.features.shape[-1], num_classes, seed, len(pairs), device)
    heads = _Heads(*(part.requires_grad_() for part in start))
    rates, decays = (torch.tensor(column, device=device) for column in zip(*pairs, strict=True))
    moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in heads]
    order, batch = Order(seed, len(labels)), min(_BATCH, len(labels))
    steps = min(max(_EPOCHS * len(labels) // batch, _FEWEST_STEPS), _MOST_STEPS)
    warmup = round(_WARMUP * steps)
    for step in range(steps):
        rows = order.samples(np.arange(step * batch, (step + 1) * batch))
        target = labels[torch.from_numpy(rows).to(device)]
        logits = heads.logits(_normed(train.features[rows], norm))
        loss = -logits.log_softmax(dim=2).gather(2, target[None, :, None].expand(len(pairs), -1, 1)).mean((1, 2)).sum()
        gradients = torch.autograd.grad(loss, list(heads))
        shape = min((step + 1) / max(warmup, 1), 0.5 * (1 + np.cos(np.pi * step / steps)))
        with torch.no_grad():
            for part, gradient, (mean, square) in zip(heads, gradients, moments, strict=True):
                mean.lerp_(gradient, 1 - _BETAS[0])
                square.lerp_(gradient.square(), 1 - _BETAS[1])
                move = mean / (1 - _BETAS[0] ** (step + 1))
                move = move / ((square / (1 - _BETAS[1] ** (step + 1))).sqrt() + _EPSILON)
                axes = [1] * (part.ndim - 1)
                if part is not heads.bias and part is not heads.query:
                    move = move + decays.view(-1, *axes) * part
                part -= rates.view(-1, *axes) * shape * move
    return _Heads(*(part.detach() for part in heads))


def _start(size: int, num_classes: int, seed: int, pairs: int, device: torch.device) -> _Heads:
    """The same weights for all pairs."""
    heads = min((h for h in range(1, size + 1) if size % h == 0), key=lambda h: abs(size / h - _HEAD_SIZE))
    generator = np.random.Generator(np.random.Philox(key=stream_constant(f"attentive probe/{seed}")))

    def draw(std: float, *shape: int) -> Tensor:
        drawn = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32) * np.float32(std))
        return drawn.to(device).repeat(pairs, *[1] * len(shape))

    projection = (heads, size // heads, size)
    return _Heads(
        query=draw(_INITIAL_STD, *projection[:2]),
        key=draw(size**-0.5, *projection),
        value=draw(size**-0.5, *projection),
        weight=draw(_INITIAL_STD, num_classes, size),
        bias=torch.zeros(pairs, num_classes, device=device),
    )
