"""`foreseen tokenizer` ends in a folder that says how the codebook is used, in words and numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from foreseen import cli
from foreseen.config import Config, MethodOptions
from foreseen.data.batch import Batch
from foreseen.data.views import Request
from foreseen.engine.objective import Progress
from foreseen.tokenizers.folder import load_tokenizer
from foreseen.tokenizers.methods import METHODS, Method
from foreseen.tokenizers.pixel_clusters import PixelClusters
from foreseen.tokenizers.training import TokenizerObjective


class GreyOptions(MethodOptions):
    name: Literal["grey"] = "grey"
    has_backbone = False
    used: int = 4


class Grey(TokenizerObjective):
    """Four greys, of which the later ones are darker than any picture; the brightness of the pictures is learnt."""

    def __init__(self, used: int) -> None:
        super().__init__()
        self.tokenizer = PixelClusters(4, 8, (32, 32))
        greys = torch.cat([torch.linspace(0.1, 0.32, used), torch.full((4 - used,), -9.0)])
        self.tokenizer.centroids.copy_(greys[:, None].expand(4, 192))
        self.brightness = nn.Parameter(torch.zeros(1))

    @property
    def request(self) -> Request:
        return Request(views=(self.tokenizer.centre_view(),))

    def forward(self, batch: Batch, prepared: Any, progress: Progress) -> dict[str, Tensor]:
        return {"loss": (batch.images["image"].mean() - self.brightness).square().sum()}


@pytest.fixture
def train(
    monkeypatch: pytest.MonkeyPatch, recipe: Callable[..., list[str]], tmp_path: Path
) -> Callable[[int], str]:  # fmt: skip
    def build(config: Config) -> Grey:
        assert isinstance(config.method, GreyOptions)
        return Grey(config.method.used)

    monkeypatch.setitem(METHODS, "grey", Method(GreyOptions, build))
    job = {
        "run": {"dir": "", "steps": 2},
        "method": {"name": "grey"},
        "optim": {"base_lr": 0.1},
        "batch": {"global_size": 8},
    }
    (tmp_path / "grey.yaml").write_text(yaml.safe_dump(job), encoding="utf-8")

    def run(used: int) -> str:
        overrides = [override for override in recipe(method__used=used) if not override.startswith("model.")]
        arguments = ["tokenizer", str(tmp_path / "grey.yaml"), *overrides]
        result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_it_ends_in_a_folder_with_numbers_a_sheet_and_a_verdict(train: Callable[[int], str], tmp_path: Path) -> None:
    output = train(4)
    health = json.loads((tmp_path / "run/tokenizer/health.json").read_text(encoding="utf-8"))
    assert (health["pictures"], health["codes"], health["codebook_size"]) == (37, 37 * 16, 4)
    assert f"{health['used']} of 4 codes used" in output
    assert "healthy" in output
    assert "4×4 codes of 32×32 px" in output
    assert (tmp_path / "run/tokenizer/health.png").is_file()
    assert load_tokenizer(tmp_path / "run/tokenizer").health == health


def test_a_collapsed_codebook_is_told_at_the_end_of_its_training(train: Callable[[int], str]) -> None:
    assert "not fit for pretraining: only 1 of 4 codes are used (25.0%)" in train(1)
