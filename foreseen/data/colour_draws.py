"""What is to be done to the colours of each crop, drawn from its key.

The draws of a crop are a function of the key of its window alone, so two views that share a window share them: where
BEiT jitters, its tokenizer sees the same colours. They are drawn on the host, for a whole batch at once, whether the
host then changes the pixels (`colour_pillow.py`) or the device does (`colour_batched.py`).

Letters: N crops.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foreseen.config import Colour
from foreseen.device_keys import as_tensor, keyed_permutation
from foreseen.keys import Keys, uniform

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_NONE = -1


@dataclass(frozen=True)
class ColourDraws:
    """The draws of N crops.

    Attributes:
        order: which operation of the jitter stands at each of four places, -1 for none, [N, 4] int64.
        factors: of brightness, contrast and saturation; and by what share of the circle the hue turns, [N, 4] float32.
        grey: who loses all colour, [N] bool.
        radius: standard deviation of the blur in pixels, 0 for none, [N] float32.
        solarised: [N] bool.
    """

    order: NDArray[np.int64]
    factors: NDArray[np.float32]
    grey: NDArray[np.bool_]
    radius: NDArray[np.float32]
    solarised: NDArray[np.bool_]

    def __getitem__(self, rows: NDArray[np.int64]) -> "ColourDraws":
        """Those of some of the crops."""
        return ColourDraws(
            self.order[rows], self.factors[rows], self.grey[rows], self.radius[rows], self.solarised[rows]
        )  # fmt: skip


def draw_colours(colour: Colour, keys: Keys) -> ColourDraws:
    """Draw what is done to crops.

    Args:
        colour: the probabilities and ranges.
        keys: of the crops, [N].
    """
    order = np.full((len(keys), 4), _NONE)
    factors = np.ones((len(keys), 4), dtype=np.float32)
    radius = np.zeros(len(keys), dtype=np.float32)
    if (jitter := colour.jitter) is not None:
        strengths = np.array([jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue], dtype=np.float32)
        low = np.maximum(1 - strengths, 0)
        low[HUE], high = -strengths[HUE], 1 + strengths
        high[HUE] = strengths[HUE]
        factors = low + uniform(keys, "jitter", 4) * (high - low)
        order = keyed_permutation(as_tensor(keys), "jitter order", 4).numpy()
        order = np.where(
            _happens(keys, "jitter or not", jitter.probability)[:, None] & (strengths[order] > 0), order, _NONE
        )
    if (blur := colour.blur) is not None:
        low_radius, high_radius = np.float32(blur.radius[0]), np.float32(blur.radius[1])
        drawn = low_radius + uniform(keys, "blur radius", 1)[:, 0] * (high_radius - low_radius)
        radius = np.where(_happens(keys, "blur", blur.probability), drawn, np.float32(0))
    return ColourDraws(
        order=order,
        factors=factors,
        grey=_happens(keys, "grey", colour.grey),
        radius=radius,
        solarised=_happens(keys, "solarise", 0.0 if colour.solarise is None else colour.solarise.probability),
    )


def _happens(keys: Keys, stream: str, probability: float) -> NDArray[np.bool_]:
    return uniform(keys, stream, 1)[:, 0] < probability
