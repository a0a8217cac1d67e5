"""How far shortcuts get on procedural pets, and how far the quickstart's ViT gets with all labels.

    python benchmarks/procedural_shortcuts.py                  # k-NN on pixels, raw and whitened, and colour histograms
    python benchmarks/procedural_shortcuts.py --vit-epochs 30  # and the ViT from scratch: some minutes

Draws 6,000 train and 1,200 test pictures and prints the accuracy in percent on the latter: with 120 labels (10 a breed,
mean of 5 draws of labels) and with all. The limit for few labels is three times chance, 25 %.
docs/results.md has what came out.
"""

import argparse
import json
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from foreseen.commands import finetune
from foreseen.commands.verbs import load_recipe
from foreseen.data.procedural import BREEDS, draw_pet, write_procedural_pets
from foreseen.keys import sample_keys, uniform

BINS = 6
COMPONENTS = 192


def draw(number: int, seed: int, size: int) -> tuple[NDArray[np.uint8], int]:
    """The picture and the label alone."""
    pet = draw_pet(seed, number, size=size)
    return pet.image, pet.label


def histograms(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The square root of each picture's share of pixels per colour, [B, BINS**3] (distances are then Hellinger's)."""
    level = images.reshape(len(images), -1, 3).astype(np.int64) * BINS // 256
    colour = (level[..., 0] * BINS + level[..., 1]) * BINS + level[..., 2]
    counts = np.stack([np.bincount(row, minlength=BINS**3) for row in colour])
    shares: NDArray[np.float32] = np.sqrt(counts / colour.shape[1]).astype(np.float32)
    return shares


def knn_accuracy(
    known: NDArray[np.float32], labels: NDArray[np.int64], asked: NDArray[np.float32], truth: NDArray[np.int64], k: int
) -> float:
    """Percent of rows of `asked` whose k nearest rows of `known` vote for their label; a tie goes to the nearest."""
    distance = (known * known).sum(1) - 2 * asked @ known.T
    nearest = np.argpartition(distance, k - 1, axis=1)[:, :k]
    order = np.take_along_axis(distance, nearest, 1).argsort(axis=1, kind="stable")
    voters = labels[np.take_along_axis(nearest, order, 1)]
    weight = 1 + np.arange(k, 0, -1) / (10 * k * k)
    votes = sum((voters[:, i, None] == np.arange(len(BREEDS))) * weight[i] for i in range(k))
    return 100 * float((np.argmax(votes, axis=1) == truth).mean())


def whitened(pixels: NDArray[np.float32], cut: int) -> NDArray[np.float32]:
    """The leading principal components of the first `cut` pictures' pixels, all made equally large, of each picture,
    at unit length."""
    torch.manual_seed(0)
    centred = torch.from_numpy(pixels - pixels[:cut].mean(0))
    _, sizes, axes = torch.pca_lowrank(centred[:cut], q=COMPONENTS, center=False, niter=4)
    found: NDArray[np.float32] = F.normalize(centred @ (axes / sizes)).numpy()
    return found


def few(labels: NDArray[np.int64], per_breed: int, seed: int) -> NDArray[np.int64]:
    """Rows of a labelled subset with the same number of each breed, drawn by the seed."""
    shuffled = np.argsort(uniform(sample_keys(seed, np.arange(1)), "few", len(labels))[0], kind="stable")
    return np.concatenate([shuffled[labels[shuffled] == breed][:per_breed] for breed in range(labels.max() + 1)])


def vit_accuracy(options: argparse.Namespace) -> tuple[float, float]:
    """Percent on validation and test of the quickstart's ViT, trained from scratch on all labels."""
    with tempfile.TemporaryDirectory() as folder:
        shards, run = Path(folder, "shards"), Path(folder, "run")
        write_procedural_pets(shards, train=options.train, test=options.test, size=options.size, seed=options.seed)
        overrides = {
            "data.path": shards, "data.shots": "null", "run.dir": run, "run.steps": "null", "data.workers": 0,
            "run.epochs": options.vit_epochs, "batch.global_size": 64, "optim.base_lr": 1e-3,
            "optim.warmup_steps": 200, "run.save_every": 500, "run.log_every": 500,
        }  # fmt: skip
        recipe = [f"{key}={value}" for key, value in overrides.items()]
        if finetune.run(load_recipe("finetune", "cpu_minutes_scratch", recipe)).preempted:
            sys.exit("told to stop")
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return 100 * result["validation"]["top1"], 100 * result["test"]["top1"]


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=6000)
    parser.add_argument("--test", type=int, default=1200)
    parser.add_argument("--size", type=int, default=48)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-breed", type=int, default=10)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--vit-epochs", type=float, help="train the ViT for so many passes over all labels")
    options = parser.parse_args()

    with ProcessPoolExecutor() as pool:
        worker = partial(draw, seed=options.seed, size=options.size)
        pictures, breeds = zip(*pool.map(worker, range(options.train + options.test), chunksize=256), strict=True)
    images, labels = np.stack(pictures), np.array(breeds)
    cut = options.train
    subsets = [few(labels[:cut], options.per_breed, seed) for seed in range(options.draws)]
    print(
        f"{options.per_breed * len(BREEDS)} labels, {options.draws} draws; chance {100 / len(BREEDS):.1f} %", end="; "
    )
    print(f"limit {300 / len(BREEDS):.1f} %")
    raw = images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
    kinds = (("pixels", raw), ("colour histogram", histograms(images)), ("whitened pixels", whitened(raw, cut)))
    for name, features in kinds:
        for k in (1, 5):
            accuracy = [knn_accuracy(features[rows], labels[rows], features[cut:], labels[cut:], k) for rows in subsets]
            every = knn_accuracy(features[:cut], labels[:cut], features[cut:], labels[cut:], k)
            print(f"{name}, k={k}: {np.mean(accuracy):.1f} (sd {np.std(accuracy, ddof=1):.1f}); all labels {every:.1f}")
    if options.vit_epochs:
        validation, test = vit_accuracy(options)
        print(f"ViT from scratch, all labels but validation, {options.vit_epochs:g} epochs: {test:.1f}", end=" ")
        print(f"(validation {validation:.1f})")


if __name__ == "__main__":
    main()
