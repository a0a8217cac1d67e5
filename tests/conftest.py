"""What many tests stand on: a small packed set, and the real Pets archives where they are at hand."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

ROOT = Path(__file__).parent.parent
# The same examples in every run; `make proof`, which sets this, looks for new ones.
settings.register_profile("foreseen", derandomize="FORESEEN_FUZZ" not in os.environ)
settings.load_profile("foreseen")
torch.set_num_threads(1)  # tiny products run slower on several threads, and much slower on busy ones


def _draw(number: int, size: int) -> Image.Image:
    """A smooth coloured picture, another one for each number; the channel that rises tells its class, number % 3."""
    rng = np.random.default_rng(number)
    ramp = np.linspace(0, 200, size)[None, :, None] * np.ones((size, 1, 1))
    pixels = rng.integers(0, 40, (size, size, 3)) + ramp * np.eye(3)[number % 3]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    # A run may choose a faster library for its process (engine/launch.py): the next test's bits must not depend on it.
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 JPEGs of 40 to 60 pixels in three class folders."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(37):
        path = folder / "abc"[number % 3] / f"picture {number}.jpg"
        path.parent.mkdir(exist_ok=True)
        _draw(number, 40 + number % 20).save(path, quality=92)
    return folder


@pytest.fixture(scope="session")
def small_shards(picture_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures packed with labels: 37 in `train` over several shards, the same again as `test`."""
    from foreseen.data.pack import pack
    from foreseen.data.source import FolderListing

    out = tmp_path_factory.mktemp("shards") / "small"
    samples = FolderListing(picture_folder, labels="folder")
    for split in ("train", "test"):
        pack(samples, out, split, classes=samples.classes, shard_samples=10, workers=1)
    return out


@pytest.fixture(scope="session")
def pets_archives() -> Path:
    """Folder of the two official Oxford-IIIT Pet archives."""
    data = Path(os.environ.get("FORESEEN_TEST_DATA", ROOT.parent / "shared" / "data"))
    folder = data / "oxford-iiit-pet"
    if not (folder / "images.tar.gz").is_file():
        pytest.skip(f"the Oxford-IIIT Pet archives are not in {folder}; set FORESEEN_TEST_DATA to where they are")
    return folder


@pytest.fixture
def recipe(tmp_path: Path, small_shards: Path) -> Callable[..., list[str]]:
    """Overrides that make any shipped recipe small enough to run here in seconds."""

    return partial(small_recipe, tmp_path / "run", small_shards)


def small_recipe(run_dir: Path, data: Path, **more: object) -> list[str]:
    """Overrides as those of the fixture `recipe`; `section__key` changes or adds one."""
    overrides = {
        "run.dir": run_dir,
        "data.path": data,
        "data.workers": 0,
        "views.size": 32,
        "model.args": "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}",
        "compute.precision": "fp32",
    }
    overrides |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in overrides.items()]
