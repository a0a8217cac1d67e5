"""Feeding pictures against the stock pipeline, on one core: decode, RandomResizedCrop(224), flip, normalise, batch.

    python benchmarks/loader.py [--pictures DIR] [--rounds 7] [--images 96] [--batch 32]

The pictures are packed twice, with `--max-side 500` (for which there is a bar) and untouched (for which there is none),
each as often as fills `--images`. A round is one epoch of that set; the candidates take turns inside a round, and
ratios are taken within it. Times are CPU seconds of this process on one thread: no workers, nothing read ahead. Compare
the ratios. The stock pipeline is webdataset's `decode("pil")`, torchvision's v1 transforms on PIL, torch's collate.

The pictures' own quality decides how much can be won: all pipelines share libjpeg's time, which grows with the bytes.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from io import BytesIO
from pathlib import Path

import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from foreseen.data.batch import BatchLayout
from foreseen.data.decode import decode
from foreseen.data.loader import BatchBuilder, StreamDataset, load
from foreseen.data.order import Order
from foreseen.data.pack import Summary, pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import FolderListing
from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD, Request, View, ViewCutter, finish, normalise
from foreseen.keys import sample_keys

Epoch = Callable[[], None]
SIZE, SCALE = 224, (0.2, 1.0)
REQUEST = Request((View("image", (SIZE, SIZE), scale=SCALE),))
CPU = torch.device("cpu")
BARS = {"foreseen, Pillow": 1.6, "foreseen, torchcodec": 1.9}
STOCK = "webdataset, torchvision v1 on PIL"


def ours(path: Path, batch: int, *, fast: bool) -> Epoch:
    """What the loop does: batches of uint8 crops from its loader, normalised by `finish`."""
    builder = BatchBuilder(ShardSet.open(path, "train"), REQUEST, seed=0, fast_decode=fast)
    stream = StreamDataset(builder, BatchLayout(batch, batch), rank=0)
    batches = load(stream, range(1 << 40), workers=0, pin_memory=False)
    per_epoch = len(builder.shards) // batch

    def epoch() -> None:
        for _ in range(per_epoch):
            finish(next(batches), REQUEST, CPU, torch.float32)

    return epoch


def stock(path: Path, batch: int, images: int) -> Epoch:
    """What webdataset's documentation and MAE's authors would write."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    tars = [str(file) for file in sorted(path.glob("train-*.tar"))]
    pictures = webdataset.WebDataset(tars, shardshuffle=False).decode("pil").to_tuple("jpg")
    samples = pictures.map_tuple(transform).repeat()
    batches: Iterator[object] = iter(DataLoader(samples, batch_size=batch))

    def epoch() -> None:
        for _ in range(images // batch):
            next(batches)

    return epoch


def raw_decode(path: Path) -> Epoch:
    """Pillow alone, on bytes in memory: for reference."""
    shards = ShardSet.open(path, "train")
    encoded = [shards.read(sample) for sample in range(len(shards))]

    def epoch() -> None:
        for data in encoded:
            Image.open(BytesIO(data)).load()

    return epoch


def has_torchcodec() -> bool:
    try:
        import_module("torchcodec.decoders").decode_jpeg  # noqa: B018
    except (ImportError, AttributeError, RuntimeError, OSError):  # not installed, too old, or built for another torch
        return False
    return True


def profile(path: Path, batch: int, *, fast: bool) -> dict[str, float]:
    """CPU seconds of one epoch by what they are spent on."""
    shards = ShardSet.open(path, "train")
    order, layout = Order(0, len(shards)), BatchLayout(batch, batch)
    spent = dict.fromkeys(("read", "decode", "cut", "finish"), 0.0)
    for step in range(len(shards) // batch):
        positions = layout.positions(step, rank=0, micro=0)
        cutter = ViewCutter(REQUEST.views, sample_keys(0, positions))
        for row, sample in enumerate(order.samples(positions).tolist()):
            began = time.process_time()
            data = shards.read(sample)
            was_read = time.process_time()
            image = decode(data, fast=fast)
            was_decoded = time.process_time()
            cutter.cut(row, image)
            spent["cut"] += time.process_time() - was_decoded
            spent["decode"] += was_decoded - was_read
            spent["read"] += was_read - began
        began = time.process_time()
        normalise(cutter.tensors["image"], IMAGENET_MEAN, IMAGENET_STD, torch.float32)  # all that `finish` does here
        spent["finish"] += time.process_time() - began
    return spent


def measure(candidates: dict[str, Epoch], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of an epoch in each round."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_number in range(rounds + 1):
        for name, epoch in candidates.items():
            began = time.process_time()
            epoch()
            if round_number:  # the first round warms up
                times[name].append(time.process_time() - began)
    return times


def report(title: str, summary: Summary, times: dict[str, list[float]], bars: dict[str, float]) -> None:
    images = summary.samples
    print(f"{title}: {summary.shrunk} of {images} pictures shrunk, {summary.bytes / images / 1024:.0f} KiB each")
    for name, seconds in times.items():
        ratio = statistics.median(s / own for s, own in zip(times[STOCK], seconds, strict=True))
        verdict = ""
        if name in bars:
            verdict = f"   bar {bars[name]} x: {'pass' if ratio >= bars[name] else 'MISSED'}"
        print(f"  {name:34} {images / statistics.median(seconds):8.1f} img/s   {ratio:.2f} x stock{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = Path(__file__).parent.parent.parent / "shared" / "data" / "full-size-samples"
    parser.add_argument("--pictures", type=Path, default=found if found.is_dir() else None, required=not found.is_dir())
    parser.add_argument("--max-side", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=96, help="a round, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    if args.images % args.batch:
        parser.error(f"--images {args.images} is not a multiple of --batch {args.batch}")
    warnings.simplefilter("ignore")  # webdataset leaves its files to the garbage collector
    torch.set_num_threads(1)
    listing = FolderListing(args.pictures)
    pictures = [listing[number % len(listing)] for number in range(args.images)]
    decoders = {"Pillow": False, "torchcodec": True}
    if not has_torchcodec():
        decoders.pop("torchcodec")
        print("torchcodec (extra `fast`) is not installed: its candidate is left out")
    print(f"decode + RandomResizedCrop({SIZE}) + flip + normalise, one core, batch {args.batch}, "
          f"medians of {args.rounds} rounds of {args.images} images from {len(listing)} pictures")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for max_side in (args.max_side, None):
            path = Path(folder) / str(max_side)
            summary = pack(pictures, path, "train", max_side=max_side, quality=90, workers=1)
            candidates = {f"foreseen, {name}": ours(path, args.batch, fast=fast) for name, fast in decoders.items()}
            candidates |= {STOCK: stock(path, args.batch, args.images), "raw Pillow decode": raw_decode(path)}
            title = "untouched" if max_side is None else f"packed with --max-side {max_side} --quality 90"
            report(title, summary, measure(candidates, args.rounds), {} if max_side is None else BARS)
            for name, fast in decoders.items():
                spent = profile(path, args.batch, fast=fast)
                shares = ", ".join(f"{part} {100 * s / sum(spent.values()):.0f} %" for part, s in spent.items())
                print(f"  time of foreseen, {name}: {shares}")


if __name__ == "__main__":
    main()
