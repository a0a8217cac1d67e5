"""Going on late in a run against starting: the time until the first batches are there.

    python benchmarks/resume.py [--rounds 7] [--workers 1]

The set is simulated: 100 million samples that all read the same picture, so that finding the place in the stream is
what is measured. A loader is started at sample 0 and at sample 10^8 in turns; medians and their ratio are printed.
"""

import argparse
import io
import statistics
import time
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from foreseen.data.batch import BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset, load
from foreseen.data.views import Request, View

SAMPLES, GLOBAL_SIZE, BATCHES = 100_000_000, 256, 4


class Simulated:
    """As many samples as asked for, all of them one picture."""

    place, split, labels = "simulated", "train", None

    def __init__(self) -> None:
        out = io.BytesIO()
        Image.fromarray(np.full((64, 64, 3), 128, dtype=np.uint8)).save(out, "JPEG")
        self._picture = out.getvalue()

    def __len__(self) -> int:
        return SAMPLES

    def read_many(self, samples: Sequence[int], *, max_bytes: int) -> Iterator[bytes]:
        assert all(0 <= sample < SAMPLES for sample in samples)
        return (self._picture for _ in samples)


def seconds_until_batches(first_sample: int, workers: int) -> float:
    began = time.perf_counter()
    builder = BatchBuilder(Simulated(), Request(views=(View("image", (32, 32)),)), seed=0)  # type: ignore[arg-type]
    stream = StreamDataset(builder, BatchLayout(GLOBAL_SIZE, GLOBAL_SIZE), rank=0)
    step = first_sample // GLOBAL_SIZE
    batches = load(stream, range(step, step + BATCHES), workers=workers, pin_memory=False)
    first = next(batches)
    assert int(first.position[0]) == step * GLOBAL_SIZE
    for _ in batches:
        pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    seconds_until_batches(0, options.workers)  # starts the fork server
    early, late = [], []
    for _ in range(options.rounds):
        early.append(seconds_until_batches(0, options.workers))
        late.append(seconds_until_batches(SAMPLES, options.workers))
    ratio = statistics.median(b / a for a, b in zip(early, late, strict=True))
    print(f"{BATCHES} batches of {GLOBAL_SIZE} from sample 10^8 take {ratio:.2f} times as long as from sample 0")


if __name__ == "__main__":
    main()
