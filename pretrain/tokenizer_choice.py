"""Which tokenizer a run learns from: the one it names, or pixel clusters that are fitted at its first start.

Either is judged at the first start on the pictures of the run: a tokenizer that leaves most of its codebook unused is
refused. Going on changes nothing and measures nothing; that the tokenizer is still the same is the loop's to check.
"""

import json
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from pydantic import Field

from foreseen.config import Config, MethodOptions, Section
from foreseen.data.views import Request
from foreseen.engine.rank_zero import on_rank_zero
from foreseen.files import write_atomically
from foreseen.handoff.encoder import create_encoder
from foreseen.handoff.lineage import describe_lineage
from foreseen.models.backbone import architecture_of, patch_grid
from foreseen.models.mask_tokens import check_maskable
from foreseen.tokenizers.folder import TokenizerFolder, load_tokenizer, save_tokenizer
from foreseen.tokenizers.health import Health, measure_health, refuse_unused
from foreseen.tokenizers.looking import Cut
from foreseen.tokenizers.pixel_clusters import PixelClusters, fit_pixel_clusters

_MAX_SHEET_PIXELS = 4_000_000


class ClusterOptions(Section):
    """The pixel clusters that are fitted where no tokenizer is named."""

    clusters: int = Field(512, ge=2)
    """Size of the codebook; as many as the pictures have different patches, at most."""
    patch: int = Field(4, ge=1, le=32)
    """Side in pixels to which a patch of the model is shrunk before it is compared."""
    samples: int = Field(2048, ge=1)
    """Most pictures that they are fitted to."""


class TokenizedOptions(MethodOptions):
    """Options of every method that predicts the codes of a tokenizer."""

    tokenizer: str | None = None
    """Folder of the tokenizer; null fits pixel clusters to the training pictures, once, in `tokenizer` in the run
    folder."""
    pixel_clusters: ClusterOptions = ClusterOptions()
    min_usage: float = Field(0.5, ge=0, le=1)
    """Smallest share of its codebook that the tokenizer must use on the training pictures; 0 takes any."""


def choose_tokenizer(config: Config, cut: Cut, accelerator: Accelerator) -> Config:
    """The config with the tokenizer named, which is there and in use; work is done at the first start alone.

    Args:
        config: of a method that has `TokenizedOptions`.
        cut: of the training pictures.
        accelerator: of the job; rank 0 fits and measures, the others wait.

    Raises:
        BadInput: the tokenizer cannot be read, or uses less of its codebook than `method.min_usage`.
    """
    for sentence in on_rank_zero(accelerator, partial(_make_ready, config, cut, accelerator.device)):
        accelerator.print(sentence)
    method = _options(config).model_copy(update={"tokenizer": str(_folder_of(config))})
    return config.model_copy(update={"method": method})


def chosen_tokenizer(config: Config) -> TokenizerFolder:
    """The tokenizer that a config names, once `choose_tokenizer` has made it ready.

    On the meta device, where a network is built only to be counted, pixel clusters stand in for one that is not there.

    Raises:
        BadInput: it cannot be read.
    """
    folder, options = _folder_of(config), _options(config).pixel_clusters
    if torch.get_default_device().type == "meta" and not folder.exists():
        patch = options.patch
        return TokenizerFolder(folder, PixelClusters(options.clusters, patch, (patch, patch)), "", {}, {})
    with torch.device("cpu"):
        return load_tokenizer(folder)


def _options(config: Config) -> TokenizedOptions:
    assert isinstance(config.method, TokenizedOptions)
    return config.method


def _folder_of(config: Config) -> Path:
    named = _options(config).tokenizer
    return config.run.dir.resolve() / "tokenizer" if named is None else Path(named)


def _make_ready(config: Config, cut: Cut, device: torch.device) -> list[str]:
    """Fit if there is nothing, measure, refuse; what a person should know of it."""
    if any((config.run.dir / "checkpoints").glob("step-*")):
        return []
    options, folder = _options(config), _folder_of(config)
    said = _fit(config, cut, folder) if options.tokenizer is None else []
    found = load_tokenizer(folder)
    health, sheet = _judged(found, cut, config.data.workers, device)
    write_atomically(config.run.dir / "tokenizer_health.json", json.dumps(health.as_dict(), indent=2) + "\n")
    sheet.save(config.run.dir / "tokenizer_health.png")
    refuse_unused(health, options.min_usage, name=str(folder))
    return [*said, f"tokenizer {folder}: {health.sentence()}", f"  {health.verdict(options.min_usage)}"]


def _fit(config: Config, cut: Cut, folder: Path) -> list[str]:
    """Fit pixel clusters, unless the same were fitted by a start that was killed before its first checkpoint."""
    options = _options(config).pixel_clusters
    # A model only to ask for its patches: it must not move the draws of the one that is trained.
    with torch.random.fork_rng(devices=[]):
        model = create_encoder(config.model, img_size=config.views.size).model
    rows, columns = patch_grid(check_maskable(model, architecture_of(model)[0]))
    size = (rows * options.patch, columns * options.patch)
    pictures = cut(Request(views=())).shards
    fitted = {**options.model_dump(), "size": list(size), "seed": config.seed, "pictures": pictures.fingerprint}
    if (folder / "config.json").is_file() and load_tokenizer(folder).lineage.get("fitted", fitted) == fitted:
        return []
    tokenizer = fit_pixel_clusters(
        cut, clusters=options.clusters, patch=options.patch, size=size, samples=options.samples, seed=config.seed,
        workers=config.data.workers,
    )  # fmt: skip
    health, sheet = measure_health(tokenizer, cut, workers=config.data.workers)
    lineage = describe_lineage(config, pictures, 0, ()) | {"method": tokenizer.kind, "fitted": fitted}
    save_tokenizer(tokenizer, folder, lineage=lineage, health=health.as_dict(), pictures=sheet)
    if tokenizer.codebook_size == options.clusters:
        return []
    return [
        f"{tokenizer.codebook_size:,} different patches of {options.patch}×{options.patch} px were found in "
        f"{pictures.place}, so there are as many pixel clusters, and not method.pixel_clusters.clusters "
        f"{options.clusters:,}"
    ]


def _judged(found: TokenizerFolder, cut: Cut, workers: int, device: torch.device) -> tuple[Health, Image.Image]:
    """How a tokenizer does on these pictures: as its folder says, if it was measured on the very same."""
    health = Health.from_dict(found.health)
    if health is not None:
        pictures = cut(Request(views=())).shards
        if (health.fingerprint, health.codebook_size) == (pictures.fingerprint, found.tokenizer.codebook_size):
            sheet = _sheet_of(found.source / "health.png")
            if sheet is not None:
                return health, sheet
    return measure_health(found.tokenizer.to(device), cut, workers=workers, device=device)


def _sheet_of(file: Path) -> Image.Image | None:
    """The contact sheet beside a tokenizer, which may be a stranger's; None if it is not one that was drawn here."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            return image.convert("RGB") if image.width * image.height <= _MAX_SHEET_PIXELS else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None
