"""The order of a set in which rare classes stand more often than they occur.

The places of a period are dealt to the classes by their targets: all alike ("full"), or by the square root of their
sizes ("sqrt", Mahajan et al. 2018, arXiv:1805.00932, section 2.2). The period's places are permuted as in `Order`; the
places of a class are a stream of their own, in which each of its samples stands once before any stands again, from
period to period. So at any moment all samples of a class have been seen equally often, give or take one, and nothing
is stored.

Letters: N samples, K classes, B positions.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foreseen.data.order import Order, Positions
from foreseen.keys import stream_constant

Balance = Literal["sqrt", "full"]


class BalancedOrder:
    """The stream of a set with classes.

    An epoch is N positions, as without balance, so that runs with and without it pass over as many pictures.

    Args:
        seed: another seed is another stream.
        labels: class of each sample, [N].
        balance: the rule for a class's share.

    Attributes:
        targets: places of each class in a period, [K]; the largest class has its own size.
    """

    def __init__(self, seed: int, labels: NDArray[np.integer], balance: Balance) -> None:
        self.seed, self.num_samples = seed, len(labels)
        self.name = f"balanced by class, {balance}"
        classes, of_class, counts = np.unique(labels, return_inverse=True, return_counts=True)
        largest = int(counts.max())
        shares = np.full(len(counts), largest) if balance == "full" else np.rint(np.sqrt(counts * largest))
        self.targets = shares.astype(np.int64)
        self._ends = np.cumsum(self.targets)
        self._members = np.split(np.argsort(of_class, kind="stable"), np.cumsum(counts)[:-1])
        self._order = Order(seed, int(self._ends[-1]))
        self._class_orders = [
            Order(stream_constant(f"balance/{seed}/{number}"), int(count))
            for number, count in zip(classes.tolist(), counts.tolist(), strict=True)
        ]

    def samples(self, positions: Positions) -> Positions:
        """The sample that each position of the stream reads: [B] int64 -> [B] int64 in [0, N)."""
        places = self._order.samples(positions)
        chosen = np.searchsorted(self._ends, places, side="right")
        turn = places - (self._ends - self.targets)[chosen] + positions // self._ends[-1] * self.targets[chosen]
        found = np.empty_like(positions)
        for number in np.unique(chosen).tolist():
            rows = np.flatnonzero(chosen == number)
            found[rows] = self._members[number][self._class_orders[number].samples(turn[rows])]
        return found
