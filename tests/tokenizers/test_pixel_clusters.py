"""Pixel clusters: k-means that finds what is there, the same whoever runs it, and a tokenizer as any other."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from foreseen.data.shards import ShardSet
from foreseen.data.views import Request
from foreseen.errors import BadInput
from foreseen.tokenizers.folder import load_tokenizer, save_tokenizer
from foreseen.tokenizers.looking import Cut, cut_of, look_at
from foreseen.tokenizers.pixel_clusters import PixelClusters, fit_pixel_clusters
from foreseen.tokenizers.tokenizer import usage
from tests.tokenizers.drawn import cut_of_images


@pytest.fixture
def cut(small_shards: Path) -> Cut:
    return cut_of(ShardSet.open(small_shards, "train"), seed=0)


def fit(cut: Cut, clusters: int = 20, *, size: int = 24, seed: int = 0) -> PixelClusters:
    return fit_pixel_clusters(cut, clusters=clusters, patch=4, size=(size, size), samples=37, seed=seed)


def pixels_of(cut: Cut, tokenizer: PixelClusters) -> Tensor:
    feeder = cut(Request(views=(tokenizer.centre_view(),)))
    return torch.cat([tokenizer.normalised(view / 255) for view in look_at(feeder, 37)])


def patchwork(kinds: int, pictures: int) -> Tensor:
    """Pictures of few different patches, some of which are a thousand times as frequent as others."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randint(0, 256, (kinds, 3, 4, 4), generator=generator, dtype=torch.uint8)
    patches[1:] = (patches[0] // 4 * 3 + patches[1:] // 4).to(torch.uint8)  # alike, so that a bad start is likely
    frequency = torch.logspace(0, -3, kinds)
    chosen = torch.multinomial(frequency, pictures * 36, replacement=True, generator=generator)
    chosen[:kinds] = torch.arange(kinds)
    grid = patches[chosen].view(pictures, 6, 6, 3, 4, 4)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(pictures, 3, 24, 24)


@pytest.mark.parametrize("seed", range(5))
def test_every_patch_that_there_is_becomes_a_cluster_however_rare(seed: int) -> None:
    images = patchwork(kinds=40, pictures=200)
    tokenizer = fit(cut_of_images(images), clusters=40, seed=seed)
    pixels = images / 255
    codes = tokenizer.encode(pixels)
    assert len(codes.unique()) == 40
    assert (tokenizer.decode(codes) - pixels).abs().max() < 1e-6


def test_fewer_different_patches_than_clusters_give_as_many_clusters() -> None:
    tokenizer = fit(cut_of_images(patchwork(kinds=5, pictures=10)), clusters=64)
    assert tokenizer.codebook_size == 5
    assert tokenizer.arguments()["codebook_size"] == 5


def test_clusters_are_better_than_patches_drawn_at_random(cut: Cut) -> None:
    tokenizer = fit(cut)
    pixels = pixels_of(cut, tokenizer)
    drawn = PixelClusters(20, 4, (24, 24))
    rows = torch.randperm(37 * 36, generator=torch.Generator().manual_seed(0))[:20]
    patches = pixels.reshape(37, 3, 6, 4, 6, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    drawn.centroids.copy_(patches[rows])
    fitted_error, drawn_error = ((t.decode(t.encode(pixels)) - pixels).square().mean() for t in (tokenizer, drawn))
    assert fitted_error < 0.8 * drawn_error


def test_all_clusters_are_in_use_where_they_were_fitted(cut: Cut) -> None:
    tokenizer = fit(cut)
    share, perplexity = usage(torch.bincount(tokenizer.encode(pixels_of(cut, tokenizer)).flatten(), minlength=20))
    assert share == 1
    assert perplexity > 10


def test_the_seed_decides_and_threads_do_not(cut: Cut) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, other_seed = fit(cut), fit(cut, seed=1)
        torch.set_num_threads(3)
        two = fit(cut)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.centroids, two.centroids)
    assert not torch.equal(one.centroids, other_seed.centroids)


def test_fitting_draws_from_no_global_generator(cut: Cut) -> None:
    before = torch.get_rng_state()
    fit(cut)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_code_is_the_nearest_cluster(cut: Cut) -> None:
    tokenizer = fit(cut)
    pixels = pixels_of(cut, tokenizer)
    codes = tokenizer.encode(pixels)
    for row, column in ((0, 0), (2, 5), (5, 1)):
        patches = pixels[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1)
        assert torch.equal(codes[:, row, column], torch.cdist(patches, tokenizer.centroids).argmin(1))


def test_decoded_codes_have_these_codes(cut: Cut) -> None:
    tokenizer = fit(cut)
    codes = torch.arange(20).view(1, 4, 5)
    pixels = tokenizer.decode(codes)
    assert pixels.shape == (1, 3, 16, 20)
    assert torch.equal(tokenizer.encode(pixels), codes)


def test_codes_do_not_depend_on_autocast_precision_or_the_cut_of_a_batch(cut: Cut) -> None:
    tokenizer = fit(cut)
    pixels = pixels_of(cut, tokenizer)
    codes = tokenizer.encode(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(pixels), codes)
    assert torch.equal(tokenizer.encode(pixels.double()), codes)
    assert torch.equal(torch.cat([tokenizer.encode(part) for part in pixels.split(3)]), codes)


def test_a_folder_gives_the_same_tokenizer_back(cut: Cut, tmp_path: Path) -> None:
    tokenizer = fit(cut)
    save_tokenizer(tokenizer, tmp_path / "tokenizer", lineage={})
    found = load_tokenizer(tmp_path / "tokenizer").tokenizer
    assert isinstance(found, PixelClusters)
    assert found.input_size == (24, 24)
    pixels = pixels_of(cut, tokenizer)
    assert torch.equal(found.encode(pixels), tokenizer.encode(pixels))


def test_what_cannot_be_clustered_is_refused_with_numbers(cut: Cut) -> None:
    with pytest.raises(BadInput, match="takes no 30×30 px"):
        fit(cut, size=30)
    with pytest.raises(BadInput, match="at least 2, got 1"):
        fit(cut, clusters=1)
    with pytest.raises(BadInput, match="the 144 patches of 4×4 px that were looked at are all the same"):
        fit(cut_of_images(torch.full((4, 3, 24, 24), 7, dtype=torch.uint8)))


def test_looking_sees_each_picture_once(cut: Cut) -> None:
    feeder = cut(Request(views=(PixelClusters(2, 4, (24, 24)).centre_view(),)))
    seen = torch.cat(list(look_at(feeder, 1000)))
    assert len(seen) == 37
    assert len(torch.unique(seen, dim=0)) == 37
    assert len(torch.cat(list(look_at(feeder, 10)))) == 10
