"""What makes a method's own networks as small as the two blocks that tests give its backbone."""

import atexit
import re
import shutil
import tempfile
from functools import cache
from pathlib import Path

from foreseen.config import Config
from tests.tiny_teacher import tiny_teacher
from tests.tokenizers.teachers import save_teacher

# Sizes fit patches of 8 px.
_SELF_DISTILLED = {
    "method.out_dim": "64", "method.head_layers": "3", "method.hidden_dim": "32", "method.bottleneck_dim": "16",
    "method.head_warmup_steps": "0",
    "method.crops": "{local_count: 2, local_size: 16}",
}  # fmt: skip


def small_method(config: Config) -> dict[str, str]:
    """Overrides for a recipe's method, by their keys."""
    options = config.method.model_dump()
    if options["name"] in ("distill", "feature_distill"):
        return {"method.teacher": str(tiny_teacher())}
    if "teacher" in options:  # a tokenizer that learns from an encoder, in the place of one that a test does not have
        return {"method.teacher": str(_teacher()), "method.codebook_size": "24", "method.code_dim": "8"}
    if "decoder" in options:
        return {"method.decoder": "{embed_dim: 32, depth: 1, num_heads: 2}"}
    if "network" in options:  # of a tokenizer that reconstructs pixels
        network = "{groups: 3, blocks: 1, width: 8, decoder_input: 8, residual_gain: 0.5}"
        return {"method.network": network} | ({"method.kl_weight": "1.0"} if "kl_weight" in options else {})
    small = {}
    if "crops" in options:
        small |= _SELF_DISTILLED
        small["method.koleo_group"] = "2"
    if options["name"] in ("dino", "ibot"):  # as their papers have it
        small["method.koleo_weight"] = "0"
    if "patch_bottleneck_dim" in options:
        small["method.patch_bottleneck_dim"] = "12"
    if "pixel_clusters" in options:  # fitted in no time, in the place of a folder that a test does not have
        small |= {"method.tokenizer": "null", "method.pixel_clusters": "{clusters: 16}"}
    if options.get("aggregate"):
        small["method.aggregate"] = "{from_block: 1, depth: 1}"
    return small


def patch_of(config: Config) -> int | None:
    """Pixels a side of the patches of a recipe's ViT; None for other networks, and where the recipe names none."""
    name, args = config.model.name or "", config.model.args
    if "_r_s16_p" in name:  # behind a stem of stride 4
        return 4 * int(args["patch_size"])
    named = re.search(r"patch(\d+)", name)
    return int(args.get("patch_size", named[1])) if named else None


def plain_vit(config: Config) -> dict[str, str]:
    """Overrides for a recipe of another network, whose arguments are then those of a ViT."""
    return {} if "patch" in (config.model.name or "patch") else {"model.name": "vit_tiny_patch16_224"}


@cache
def _teacher() -> Path:
    """The same for every process, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="teacher-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save_teacher(folder / "encoder")
