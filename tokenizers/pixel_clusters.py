"""Pixel clusters: the vocabulary that needs no training, k-means over patches of small pictures.

A picture is shrunk until a code stands for a few pixels, 4×4 by default, so the clusters see the mean colour of a
patch and its coarse shape; a code is the number of the nearest cluster. It is iGPT's palette (Chen et al. 2020,
Generative Pretraining from Pixels, section 3: k-means over single pixels) carried from pixels to patches. Fitted in
seconds, it is what BEiT predicts where no tokenizer is named.

Letters: N patches, P values in a patch, K clusters.
"""

from typing import Any

import torch
from torch import Tensor

from foreseen.data.views import Request
from foreseen.device_keys import as_tensor, keyed_permutation, keyed_uniform
from foreseen.errors import BadInput
from foreseen.keys import name_keys
from foreseen.tokenizers.looking import Cut, look_at
from foreseen.tokenizers.tokenizer import Tokenizer

_ITERATIONS = 20
_SETTLED = 0.002  # share of the patches that still change their cluster
_PATCHES = 32_768  # that clusters are fitted to; more for large vocabularies
_PATCHES_A_CLUSTER = 16
_DISTANCES = 1 << 22  # held at a time


class PixelClusters(Tokenizer):
    """The nearest of K patches.

    Args:
        codebook_size: K.
        patch: height and width in pixels of what a code stands for.
        size: (H, W) in pixels of the pictures it was fitted to; other multiples of `patch` do as well.
    """

    kind = "pixel_clusters"
    interpolation = "bilinear"  # antialiased, so that a shrunken pixel is about the mean of its area
    has_decoder = True

    def __init__(self, codebook_size: int, patch: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.input_size = (size[0], size[1])
        self.stride = (patch, patch)
        self.mean, self.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        self.grid(self.input_size)
        self.centroids: Tensor
        self.register_buffer("centroids", torch.zeros(codebook_size, patch * patch * 3))  # pixels in [0, 1]

    def arguments(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        return {"codebook_size": self.codebook_size, "patch": self.stride[0], "size": list(self.input_size)}

    def encode(self, images: Tensor) -> Tensor:
        """See `Tokenizer`."""
        rows, columns = self.grid((images.shape[-2], images.shape[-1]))
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            pixels = images.to(torch.promote_types(images.dtype, torch.float32))
            patches = _patches(pixels, self.stride[0])
            # About the middle grey: the smaller the numbers, the less of a distance is lost to rounding.
            codes, _ = _nearest(patches - 0.5, self.centroids.to(patches.dtype) - 0.5)
        return codes.view(len(images), rows, columns)

    def decode(self, codes: Tensor) -> Tensor:
        """See `Tokenizer`."""
        batch, rows, columns = codes.shape
        patch = self.stride[0]
        pixels = self.centroids[codes].view(batch, rows, columns, 3, patch, patch)
        return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, rows * patch, columns * patch)


def fit_pixel_clusters(
    cut: Cut, *, clusters: int, patch: int, size: tuple[int, int], samples: int, seed: int, workers: int = 0
) -> PixelClusters:
    """Fit clusters to the pictures of a set; a function of them and the seed, on one thread as on many.

    Where the pictures hold fewer different patches than clusters are asked for, there will be as many clusters as
    different patches; `codebook_size` of the result tells.

    Args:
        cut: of which pictures; see `foreseen.tokenizers.looking`.
        clusters: K.
        patch: height and width in pixels of what a code stands for.
        size: (H, W) in pixels that pictures are brought to.
        samples: most pictures looked at.
        seed: of the choice of patches and of where the clusters begin.
        workers: loader processes.

    Raises:
        BadInput: fewer than two clusters or different patches, or `patch` does not divide `size`.
    """
    if clusters < 2:
        raise BadInput(f"pixel clusters number at least 2, got {clusters}")
    feeder = cut(Request(views=(PixelClusters(clusters, patch, size).centre_view(),)))
    found = [_patches(pictures, patch) for pictures in look_at(feeder, samples, workers=workers)]
    patches, key = torch.cat(found), as_tensor(name_keys([f"pixel clusters/{seed}"]))
    most = max(_PATCHES, _PATCHES_A_CLUSTER * clusters)
    if len(patches) > most:
        patches = patches[keyed_permutation(key, "patches", len(patches))[0, :most].sort().values]
    clusters = min(clusters, len(torch.unique(patches, dim=0)))
    if clusters < 2:
        raise BadInput(
            f"the {len(patches):,} patches of {patch}×{patch} px that were looked at are all the same, so there is "
            "nothing to cluster: look at the pictures of data.path, or name a tokenizer in method.tokenizer"
        )
    tokenizer = PixelClusters(clusters, patch, size)
    # Sums of whole numbers in float64 are exact, so the means do not depend on the order of summation.
    tokenizer.centroids.copy_(_k_means(patches.double(), clusters, key) / 255)
    return tokenizer.eval().requires_grad_(False)


def _patches(images: Tensor, patch: int) -> Tensor:
    """[B, 3, H, W] -> [B * h * w, P], channels first within a patch."""
    batch, channels, height, width = images.shape
    cells = images.reshape(batch, channels, height // patch, patch, width // patch, patch)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, channels * patch * patch)


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each point and the squared distance to it, [N, P], [K, P] -> [N], [N]."""
    half = centroids.square().sum(1) / 2
    codes, distances = [], []
    for part in torch.split(points, max(1, _DISTANCES // len(centroids))):
        distance, code = torch.addmm(half, part, centroids.T, alpha=-1).min(1)
        codes.append(code)
        distances.append((2 * distance + part.square().sum(1)).clamp(min=0))
    return torch.cat(codes), torch.cat(distances)


def _k_means(points: Tensor, clusters: int, key: Tensor) -> Tensor:
    """Lloyd's iterations, [N, P] -> [K, P]; a cluster that nothing is nearest to moves to a patch that lies far off."""
    centroids = _scattered(points, clusters, key)
    codes = torch.full((len(points),), -1)
    for _ in range(_ITERATIONS):
        before = codes
        codes, distances = _nearest(points, centroids)
        counts = torch.bincount(codes, minlength=clusters)
        empty = (counts == 0).nonzero()[:, 0]
        if not len(empty) and (codes != before).double().mean() <= _SETTLED:
            break
        sums = torch.zeros_like(centroids).index_add_(0, codes, points)
        centroids = sums / counts.clamp(min=1)[:, None]
        if len(empty):
            far = _far_apart(points, distances)[: len(empty)]
            centroids[empty[: len(far)]] = points[far]
    return centroids


def _scattered(points: Tensor, clusters: int, key: Tensor) -> Tensor:
    """Where clusters begin: drawn as k-means++ draws them, but in rounds, each as many as there are already.

    The chance of a point is its squared distance to the nearest one drawn before (Arthur and Vassilvitskii 2007);
    several in a round, as in k-means|| (Bahmani et al. 2012), spare K passes over all points.
    """
    first = (keyed_uniform(key, "first", 1)[0, 0] * len(points)).long()
    chosen = points[first][None]
    distances = torch.full((len(points),), torch.inf, dtype=points.dtype)
    latest = chosen
    while len(chosen) < clusters:
        distances = torch.minimum(distances, _nearest(points, latest)[1])
        draws = keyed_uniform(key, f"round/{len(chosen)}", len(points))[0].double()
        # An exponential race: the first of it to arrive are drawn by their weights, without replacement.
        arrival = -torch.log1p(-draws) / distances
        arrival = torch.where(distances > 0, arrival, torch.inf)
        latest = points[arrival.argsort(stable=True)[: min(len(chosen), clusters - len(chosen))]]
        chosen = torch.cat([chosen, latest])
    return chosen


def _far_apart(points: Tensor, distances: Tensor) -> Tensor:
    """Numbers of the points that lie farthest from their centroid, farthest first, none like the one before it."""
    order = distances.argsort(descending=True, stable=True)
    ordered = points[order]
    differs = torch.ones(len(order), dtype=torch.bool)
    differs[1:] = (ordered[1:] != ordered[:-1]).any(1)
    return order[differs]
