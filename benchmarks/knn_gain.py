"""What the frozen features of a pretraining recipe are worth, against random weights and raw pixels, over seeds.

    python benchmarks/knn_gain.py dino_cpu_minutes --runs runs/knn_gain --seeds 0 1 2 3 4
    python benchmarks/knn_gain.py dino_cpu_minutes --runs runs/knn_gain_pets --seeds 0 --data shards/pets

Draws procedural pets (6,000 train, 1,200 test), pretrains on them once a seed, and lets nearest neighbours name the
test pictures: with 10 labels a breed (5 neighbours; mean of 5 draws of labels, which the seed decides) and with all (20
neighbours). `--data` takes a packed, labelled set instead, whose test split is judged, at `--size` px. Random weights
are those of the same backbone, drawn by the seed; the mean picture is taken off the pixels.
Runs that are there are not made again. `--set key=value ...` changes the recipe. docs/results.md has what came out.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from procedural_shortcuts import draw, few
from torch import Tensor

from foreseen.data.loader import BatchBuilder, SweepDataset, load
from foreseen.data.procedural import FIRST_TEST_NUMBER, write_procedural_pets
from foreseen.data.shards import ShardSet
from foreseen.data.views import Request, finish
from foreseen.engine.knn import knn
from foreseen.engine.labelled import Labelled
from foreseen.handoff.encoder import Preprocessing
from foreseen.handoff.frozen import frozen_encoder
from foreseen.models.features import default_features, pooled_features
from foreseen.paired import paired_difference

PER_BREED, DRAWS = 10, 5
FEW_NEIGHBOURS, MANY_NEIGHBOURS = 5, 20


def drawn_pictures(train: int, test: int, size: int) -> tuple[Labelled, int]:
    """Procedural pets, [N, 3, size, size] in [0, 1], and how many of them are to train on; the rest is the test."""
    numbers = [*range(train), *range(FIRST_TEST_NUMBER, FIRST_TEST_NUMBER + test)]
    pictures, breeds = zip(*(draw(number, 0, size) for number in numbers), strict=True)
    return Labelled(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, torch.tensor(breeds)), train


def packed_pictures(path: Path, size: int) -> tuple[Labelled, int]:
    """The middles of a packed set's pictures, and how many of them are to train on."""
    view = Preprocessing((0.0,) * 3, (1.0,) * 3, "bicubic", 0.875, (size, size)).view()
    request, found = Request(views=(view,)), []
    for split in ("train", "test"):
        shards = ShardSet.open(path, split)
        sweep = SweepDataset(BatchBuilder(shards, request, 0), 64)
        if shards.labels is None:
            sys.exit(f"split {split} of {path} has no labels to name")
        batches = load(sweep, range(len(sweep)), workers=0, pin_memory=False)
        images = [finish(batch, request, torch.device("cpu"), torch.float32).images[view.name] for batch in batches]
        found.append(Labelled(torch.cat(images), torch.from_numpy(shards.labels.astype(np.int64))))
    train, test = found
    return Labelled(*(torch.cat(both) for both in zip(train, test, strict=True))), len(train.labels)


def pretrain(recipe: str, seed: int, folder: Path, shards: Path, overrides: list[str]) -> Path:
    """The encoder folder of a run, made where it is not there yet."""
    if not (folder / "encoder").is_dir():
        command = [
            sys.executable, "-m", "foreseen", "pretrain", recipe, f"data.path={shards}", f"seed={seed}",
            f"run.dir={folder}", *overrides,
        ]  # fmt: skip
        subprocess.run(command, check=True)
    return folder / "encoder"


@torch.no_grad()
def features(model: torch.nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Those that the library takes where nobody says, [N, D]."""
    model = model.eval()
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    pooling = default_features(model)
    return torch.cat([pooled_features(model, (some - shift) / scale, pooling) for some in images.split(250)])


@torch.no_grad()
def see(model: torch.nn.Module, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Let random weights see the training pictures once, for the statistics of batch norms."""
    shift, scale = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    for some in images.split(250):
        model.train()((some - shift) / scale)


def scores(found: Tensor, labels: Tensor, cut: int, seed: int) -> tuple[float, float]:
    """Percent named right with few labels, and with all."""
    judged = Labelled(found[cut:], labels[cut:])

    def percent(rows: Tensor, k: int) -> float:
        bank = Labelled(found[rows], labels[rows])
        return 100 * knn(bank, judged, num_classes=int(labels.max()) + 1, neighbours=[k])[k].top1

    drawn = [few(labels[:cut].numpy(), PER_BREED, 1000 * seed + number) for number in range(DRAWS)]
    with_few = [percent(torch.from_numpy(rows), FEW_NEIGHBOURS) for rows in drawn]
    return float(np.mean(with_few)), percent(torch.arange(cut), MANY_NEIGHBOURS)


def main() -> None:
    """Pretrain, look, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/knn_gain"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=1200)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--data", type=Path, help="shards, instead of drawing some")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    shards = options.data or options.runs / "shards"
    if options.data is None and not (shards / "manifest.json").is_file():
        write_procedural_pets(shards, train=options.train, test=options.test, size=options.size)
    (images, labels), cut = (
        packed_pictures(shards, options.size)
        if options.data
        else drawn_pictures(options.train, options.test, options.size)
    )
    pixels = images.flatten(1)
    pixels = pixels - pixels[:cut].mean(0)

    rows: dict[str, list[tuple[float, float]]] = {"pretrained": [], "random weights": [], "pixels": []}
    for seed in options.seeds:
        folder = options.runs / f"{Path(options.recipe).stem}-{seed}"
        frozen = frozen_encoder(str(pretrain(options.recipe, seed, folder, shards, options.set)))
        wants = frozen.preprocessing
        if wants.size != (options.size, options.size):
            sys.exit(f"{folder / 'encoder'} sees {wants.size[0]} x {wants.size[1]} px: give it as --size")
        torch.manual_seed(seed)
        drawn = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=False, num_classes=0)
        see(drawn, images[:cut], wants.mean, wants.std)
        for name, model in (("pretrained", frozen.model), ("random weights", drawn)):
            rows[name].append(scores(features(model, images, wants.mean, wants.std), labels, cut, seed))
        rows["pixels"].append(scores(pixels, labels, cut, seed))
        told = ", ".join(f"{name} {found[-1][0]:.1f} / {found[-1][1]:.1f}" for name, found in rows.items())
        print(f"seed {seed}, {PER_BREED} labels a breed / all: {told}", flush=True)
    for which, title in enumerate(
        (f"{PER_BREED} labels a breed, k = {FEW_NEIGHBOURS}", f"all labels, k = {MANY_NEIGHBOURS}")
    ):
        ours, *others = ([found[which] for found in rows[name]] for name in rows)
        better = max(others, key=np.mean)
        print(
            f"{title}: {np.mean(ours):.1f}, random weights {np.mean(others[0]):.1f}, pixels {np.mean(others[1]):.1f}; ",
            end="",
        )
        gain = paired_difference(ours, better)
        interval = "" if gain.low is None else f" [{gain.low:+.1f}, {gain.high:+.1f}]"
        print(f"over the better {gain.mean:+.1f}{interval}")


if __name__ == "__main__":
    main()
