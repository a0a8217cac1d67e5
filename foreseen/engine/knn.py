"""Weighted k-nearest neighbours on frozen features, as DINO judges an encoder without training anything.

Caron et al. 2021, arXiv:2104.14294, section 4.1, after Wu et al. 2018, arXiv:1805.01978; facebookresearch/dino at
7c446df, eval_knn.py, whose numbers this file reproduces (tests/engine/test_knn.py).

Letters: N pictures of the bank, M judged ones, D features, K classes.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from foreseen.engine.labelled import Accuracy, Labelled, accuracy, hits

NEIGHBOURS = (10, 20, 100, 200)
HEADLINE = 20  # the k of the paper's tables: named beforehand, so that nothing is chosen by the score
TEMPERATURE = 0.07
_MAX_SIMILARITIES = 2**26  # held at once, a quarter of a gigabyte


def knn(
    bank: Labelled,
    judged: Labelled,
    *,
    num_classes: int,
    neighbours: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, Accuracy]:
    """Let the k nearest pictures of the bank vote for the class of each judged picture.

    A neighbour's vote counts exp(cosine similarity / temperature). In float32: sums of such weights overflow half
    precision.

    Args:
        bank: features [N, D] and labels.
        judged: features [M, D] and labels.
        num_classes: K.
        neighbours: each k to try; those larger than the bank are left out, and if all are, k is the bank's size.
        temperature: the paper's 0.07.

    Returns:
        The accuracy for each k, rising. A class that got no vote is never among the first five.
    """
    size = len(bank.labels)
    ks = [k for k in sorted(neighbours) if k <= size] or [size]
    keys = F.normalize(bank.features.float(), dim=1)
    queries = F.normalize(judged.features.float(), dim=1)
    found = {k: torch.zeros(2, dtype=torch.int64, device=keys.device) for k in ks}
    rows = max(1, _MAX_SIMILARITIES // size)
    for start in range(0, len(queries), rows):
        some, labels = queries[start : start + rows], judged.labels[start : start + rows]
        similarity, nearest = (some @ keys.T).topk(ks[-1], dim=1)
        weights, classes = (similarity / temperature).exp(), bank.labels[nearest]
        for k in ks:
            votes = torch.zeros(len(some), num_classes, device=keys.device)
            votes.scatter_add_(1, classes[:, :k], weights[:, :k])
            found[k] += hits(votes.where(votes > 0, -torch.inf), labels)
    return {k: accuracy(hit, len(judged.labels)) for k, hit in found.items()}
