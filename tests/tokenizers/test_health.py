"""What is measured of a tokenizer is what it does, and few pictures are no fault of its own."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from foreseen.errors import BadInput
from foreseen.tokenizers.folder import load_tokenizer, save_tokenizer
from foreseen.tokenizers.health import Health, measure_health, refuse_unused
from foreseen.tokenizers.pixel_clusters import PixelClusters
from tests.tokenizers.drawn import GreyLevels, cut_of_images, grey_pictures


def health_of(codes: torch.Tensor, tokenizer: GreyLevels | None = None) -> Health:
    return measure_health(tokenizer or GreyLevels(), cut_of_images(grey_pictures(codes)))[0]


def test_the_numbers_are_those_of_the_codes() -> None:
    codes = torch.tensor([[[7, 7], [7, 9]], [[7, 7], [9, 200]]])
    health = health_of(codes)
    assert (health.pictures, health.codes, health.used, health.codebook_size) == (2, 8, 3, 256)
    assert health.used_share == 3 / 256
    share = torch.tensor([5 / 8, 2 / 8, 1 / 8], dtype=torch.float64)
    assert health.perplexity == pytest.approx(float((-(share * share.log()).sum()).exp()))
    assert health.most_frequent_share == 5 / 8
    assert health.codes_in_a_pass == 8
    assert health.reconstruction_error == pytest.approx(0, abs=1e-6)


def test_the_reconstruction_error_is_in_pixels() -> None:
    codes = torch.full((3, 2, 2), 15)  # of levels in steps of 10, so that 15 becomes 10
    assert health_of(codes, GreyLevels(step=10)).reconstruction_error == pytest.approx(5 / 255)


def test_every_picture_is_counted_once_over_several_batches() -> None:
    codes = torch.randint(0, 256, (150, 2, 2), generator=torch.Generator().manual_seed(0))
    health = health_of(codes)
    assert (health.pictures, health.codes) == (150, 600)
    assert health.used == len(codes.unique())
    some, _ = measure_health(GreyLevels(), cut_of_images(grey_pictures(codes)), pictures=70)
    assert (some.pictures, some.codes, some.codes_in_a_pass) == (70, 280, 600)


def test_few_pictures_are_no_fault_of_the_codebook() -> None:
    codes = torch.randint(0, 256, (10, 2, 2), generator=torch.Generator().manual_seed(0))
    health = health_of(codes)
    assert health.used_share < 0.15
    assert health.fillable_share == pytest.approx(1 - (1 - 1 / 256) ** 40)
    assert health.usage > 0.9
    refuse_unused(health, 0.5, name="this")
    assert health.is_too_large
    assert "one pass holds 40 codes for 256 entries; take at most 4" in health.verdict()


def test_a_dead_codebook_is_refused_with_its_number_and_a_remedy() -> None:
    codes = torch.randint(0, 5, (700, 2, 2), generator=torch.Generator().manual_seed(0))
    health = health_of(codes)
    with pytest.raises(BadInput) as refused:
        refuse_unused(health, 0.5, name="runs/vqkd/tokenizer")
    said = str(refused.value)
    assert "runs/vqkd/tokenizer" in said
    assert "only 5 of 256 codes are used (2.0%)" in said
    assert "method.min_usage 0.5" in said
    assert "method.min_usage=0" in said
    assert "not fit for pretraining" in health.verdict()
    refuse_unused(health, 0, name="it is known")


def test_one_code_for_nearly_everything_is_told() -> None:
    codes = torch.arange(256).repeat(20)
    codes = torch.cat([codes, torch.full((8 * 256 * 20,), 3)]).view(-1, 2, 2)
    verdict = measure_health(GreyLevels(), cut_of_images(grey_pictures(codes)), pictures=100_000)[0].verdict()
    assert "one code stands for 89% of everything" in verdict


def test_a_codebook_in_use_is_healthy() -> None:
    codes = torch.randint(0, 256, (700, 2, 2), generator=torch.Generator().manual_seed(0))
    assert health_of(codes).verdict() == "healthy: the codebook is in use"


def test_a_code_outside_the_codebook_is_refused() -> None:
    with pytest.raises(BadInput, match="made the code 200, and its codebook has 100"):
        health_of(torch.full((1, 2, 2), 200), GreyLevels(codebook_size=100))


def test_the_sheet_has_a_row_for_each_way_to_see_a_picture() -> None:
    tokenizer, pictures = GreyLevels(), cut_of_images(grey_pictures(torch.full((1, 2, 2), 100)))
    _, sheet = measure_health(tokenizer, pictures)
    tokenizer.has_decoder = False
    _, shorter = measure_health(tokenizer, pictures)
    assert sheet.height > 1.2 * shorter.height
    assert (100, 100, 100) in {colour for _, colour in sheet.getcolors(maxcolors=1 << 16) or ()}


def test_the_folder_keeps_the_numbers_and_the_sheet(tmp_path: Path) -> None:
    tokenizer = PixelClusters(4, 4, (8, 8))
    tokenizer.centroids.copy_(torch.linspace(0, 1, 4)[:, None].expand(4, 48))
    health, sheet = measure_health(tokenizer, cut_of_images(grey_pictures(torch.tensor([[[0, 85], [170, 255]]]))))
    save_tokenizer(tokenizer, tmp_path / "t", lineage={}, health=health.as_dict(), pictures=sheet)
    assert Health.from_dict(load_tokenizer(tmp_path / "t").health) == health
    assert json.loads((tmp_path / "t/health.json").read_text(encoding="utf-8"))["used"] == 4
    with Image.open(tmp_path / "t/health.png") as shown:
        assert shown.size == sheet.size
    for other in (
        {"of": "another version"},
        health.as_dict() | {"used": "all"},
        health.as_dict() | {"codebook_size": 0},
    ):
        assert Health.from_dict(other) is None
