"""Feeding DINO's crops against its authors' pipeline, on one core: 2 x 224 and 8 x 96 of each picture.

    python benchmarks/multicrop_loader.py [--pictures DIR] [--rounds 7] [--images 48] [--batch 24]

The pictures are packed with `--max-side 500`, each as often as fills `--images`. A round is one epoch of them; the
candidates take turns inside a round, and ratios are taken within it. Times are CPU seconds of this process on one
thread: no workers, nothing read ahead. Compare the ratios.

Twice ours: what a loader does when the device changes the colours (read, decode, cut), and all that is done when the
device is a CPU (that, the batched colours, normalising). The peer is DINO's own composition of torchvision's v1
transforms on PIL, stacked into batches; it reads the same files from memory. For reference: our crops with
`exact: true`, which are the papers' own operations with our draws.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import torch
from loader import has_torchcodec, measure
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from foreseen.config import Views
from foreseen.data.batch import BatchLayout
from foreseen.data.loader import BatchBuilder, StreamDataset, load
from foreseen.data.multicrop import MultiCrop, multicrop_views
from foreseen.data.pack import pack
from foreseen.data.shards import ShardSet
from foreseen.data.source import FolderListing
from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD, Request, finish

Epoch = Callable[[], None]
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)
CPU = torch.device("cpu")
PEER = "DINO's torchvision v1 on PIL"
BARS = {"device": 5.0, "CPU": 2.0}


def ours(path: Path, batch: int, *, fast: bool, colours_too: bool, exact: bool = False) -> Epoch:
    """Batches of the loader; and their colours and normalising, where a CPU trains."""
    options = MultiCrop(local_scale=LOCAL_SCALE, colours="dino", exact=exact)
    request = Request(multicrop_views(options, Views(scale=GLOBAL_SCALE), IMAGENET_MEAN, IMAGENET_STD))
    builder = BatchBuilder(ShardSet.open(path, "train"), request, seed=0, fast_decode=fast)
    stream = StreamDataset(builder, BatchLayout(batch, batch), rank=0)
    batches = load(stream, range(1 << 40), workers=0, pin_memory=False)
    per_epoch = len(builder.shards) // batch

    def epoch() -> None:
        for _ in range(per_epoch):
            found = next(batches)
            if colours_too:
                finish(found, request, CPU, torch.float32)

    return epoch


def peer(path: Path, batch: int) -> Epoch:
    """The authors' augmentation, and a batch for each of its ten crops."""
    shards = ShardSet.open(path, "train")
    encoded = [shards.read(sample) for sample in range(len(shards))]
    crop = authors_crops()

    def epoch() -> None:
        for start in range(0, len(encoded), batch):
            crops = [crop(Image.open(BytesIO(data)).convert("RGB")) for data in encoded[start : start + batch]]
            for views in zip(*crops, strict=True):
                torch.stack(views)

    return epoch


def authors_crops() -> Callable[[Image.Image], list[Tensor]]:
    """The transforms that facebookresearch/dino composes, with their numbers (main_dino.py at 7c446df)."""

    def blur(image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))

    def solarise(image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image)

    def crops(size: int, scale: tuple[float, float], blurred: float, solarised: float) -> transforms.Compose:
        jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size, scale=scale, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.RandomHorizontalFlip(p=0.5),
                transforms.RandomApply([jitter], p=0.8),
                transforms.RandomGrayscale(p=0.2),
                transforms.RandomApply([transforms.Lambda(blur)], p=blurred),
                transforms.RandomApply([transforms.Lambda(solarise)], p=solarised),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    first, second = crops(224, GLOBAL_SCALE, 1.0, 0.0), crops(224, GLOBAL_SCALE, 0.1, 0.2)
    local = crops(96, LOCAL_SCALE, 0.5, 0.0)
    return lambda image: [first(image), second(image), *(local(image) for _ in range(8))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found = Path(__file__).parent.parent.parent / "shared" / "data" / "full-size-samples"
    parser.add_argument("--pictures", type=Path, default=found if found.is_dir() else None, required=not found.is_dir())
    parser.add_argument("--max-side", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--images", type=int, default=48, help="a round, a multiple of --batch")
    parser.add_argument("--batch", type=int, default=24)
    args = parser.parse_args()
    if args.images % args.batch:
        parser.error(f"--images {args.images} is not a multiple of --batch {args.batch}")
    torch.set_num_threads(1)
    listing = FolderListing(args.pictures)
    pictures = [listing[number % len(listing)] for number in range(args.images)]
    decoders = {"Pillow": False} | ({"torchcodec": True} if has_torchcodec() else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed"
        pack(pictures, path, "train", max_side=args.max_side, quality=90, workers=1)
        candidates: dict[str, Epoch] = {PEER: peer(path, args.batch)}
        bars = {}
        for decoder, fast in decoders.items():
            for where, bar in BARS.items():
                name = f"foreseen, {decoder}, colours by the {where}"
                bars[name] = bar
                candidates[name] = ours(path, args.batch, fast=fast, colours_too=where == "CPU")
        candidates["foreseen, Pillow, exact colours"] = ours(path, args.batch, fast=False, colours_too=True, exact=True)
        times = measure(candidates, args.rounds)
        print(f"2 x 224 and 8 x 96 of pictures packed with --max-side {args.max_side}, one core, batch {args.batch}, "
              f"medians of {args.rounds} rounds of {args.images} images from {len(listing)} pictures")  # fmt: skip
        for name, seconds in times.items():
            ratio = statistics.median(s / own for s, own in zip(times[PEER], seconds, strict=True))
            verdict = f"   bar {bars[name]} x: {'pass' if ratio >= bars[name] else 'MISSED'}" if name in bars else ""
            print(f"  {name:42} {args.images / statistics.median(seconds):7.1f} img/s   {ratio:.2f} x{verdict}")


if __name__ == "__main__":
    main()
