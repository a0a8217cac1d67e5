"""Looking at the pictures of a set before or after training, as a tokenizer wants to see them."""

from collections.abc import Callable, Iterator
from functools import partial

from torch import Tensor

from foreseen.data.batch import BatchLayout
from foreseen.data.feed import Feeder
from foreseen.data.loader import BatchBuilder
from foreseen.data.shards import ShardSet
from foreseen.data.views import Request

Cut = Callable[[Request], Feeder]
"""Pictures that are cut as a request says: a set, or a stream of tars."""

_BATCH = 64


def cut_of(shards: ShardSet, seed: int) -> Cut:
    """The pictures of a set; the seed chooses which of them come first."""
    return partial(BatchBuilder, shards, seed=seed)


def look_at(feeder: Feeder, samples: int, *, workers: int = 0) -> Iterator[Tensor]:
    """The first pictures of a run's own order, each once; unreadable ones are replaced by rule, as in training.

    Args:
        feeder: cuts a view named "image".
        samples: at most so many pictures.
        workers: loader processes.

    Yields:
        [b, 3, H, W] uint8.
    """
    left = min(samples, len(feeder.shards))
    feed = feeder.feed(BatchLayout(_BATCH, _BATCH), 0, None)
    for batch in feed.batches(0, -(-left // _BATCH), workers=workers, pin_memory=False):
        yield batch.images["image"][:left]
        left -= min(left, _BATCH)
