"""A tokenizer folder is there whole or not at all, and a stranger's takes no more memory than its file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from foreseen.errors import BadInput
from foreseen.tokenizers.dvae import DVAE
from foreseen.tokenizers.folder import load_tokenizer, save_tokenizer
from foreseen.tokenizers.fsq import FSQ
from foreseen.tokenizers.pixel_clusters import PixelClusters
from foreseen.tokenizers.tokenizer import Tokenizer
from foreseen.tokenizers.vqkd import VQKD

NETWORK = {"groups": 2, "blocks": 1, "width": 8, "decoder_input": 8}
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
MADE: dict[str, Callable[[], Tokenizer]] = {
    "pixel_clusters": lambda: PixelClusters(5, 4, (16, 16)),
    "dvae": lambda: DVAE(16, (16, 16), NETWORK),
    "fsq": lambda: FSQ([4, 3], (16, 16), NETWORK),
    "vqkd": lambda: VQKD(
        architecture="vit_tiny_patch16_224", model_args=VIT, input_size=(16, 16), codebook_size=8, code_dim=4
    ),
}


def _change(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    change(described["arguments"])
    (folder / "config.json").write_text(json.dumps(described), encoding="utf-8")


@pytest.mark.parametrize("kind", MADE)
def test_a_folder_gives_back_the_very_tokenizer_and_draws_nothing(kind: str, tmp_path: Path) -> None:
    tokenizer = MADE[kind]().eval()
    save_tokenizer(tokenizer, tmp_path / "t", lineage={"from": "here"})
    drawn = torch.random.get_rng_state()
    found = load_tokenizer(tmp_path / "t")
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert (found.tokenizer.arguments(), found.lineage) == (tokenizer.arguments(), {"from": "here"})
    images = tokenizer.normalised(torch.rand(3, 3, 16, 16))
    assert torch.equal(found.tokenizer.encode(images), tokenizer.encode(images))


HUGE: list[tuple[str, Callable[[dict[str, Any]], object], str]] = [
    ("pixel_clusters", lambda a: a.update(codebook_size=10**9), r"should be \[1000000000, 48\] and is \[5, 48\]"),
    ("pixel_clusters", lambda a: a.update(size=[1 << 20, 16]), "input size is 1048576×16 px.*from 1 to 8,192"),
    ("pixel_clusters", lambda a: a.update(size=[-16, 16]), "input size is -16×16 px"),
    ("dvae", lambda a: a.update(codebook_size=10**9), "ask for other weights than it has"),
    ("dvae", lambda a: a["network"].update(blocks=50_000), "less than or equal to 64"),
    ("dvae", lambda a: a["network"].update(blocks=60), "more than the [0-9]+ weights that it has"),
    ("dvae", lambda a: a["network"].update(width=8192), "ask for other weights than it has"),
    ("fsq", lambda a: a.update(levels=[4, 3, 2]), "ask for other weights than it has"),
    ("fsq", lambda a: a.update(levels=[4.5, 3]), "its codebook has 13.5 codes"),
    ("vqkd", lambda a: a.update(codebook_size=10**9), "ask for other weights than it has"),
    ("vqkd", lambda a: a["model_args"].update(embed_dim=24_000), "ask for other weights than it has"),
    ("vqkd", lambda a: a["model_args"].update(depth=10**9), "its arguments have depth 1000000000: at most 65,536"),
    ("vqkd", lambda a: a["model_args"].update(depth=20_000), "more than the [0-9]+ weights that it has"),
    ("vqkd", lambda a: a.update(architecture="vit_giant_patch14_224"), "cannot be read: "),
    ("vqkd", lambda a: a.update(std=[1, 0, 1]), "its std is .*above 0"),
    ("vqkd", lambda a: a.update(mean=[0.5]), "its mean is .*three finite numbers"),
    ("vqkd", lambda a: a.update(interpolation="magic"), "its interpolation is 'magic'"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "change", "sentence"), HUGE)
def test_arguments_that_the_weights_do_not_bear_out_are_refused_before_memory_is_taken(
    kind: str, change: Callable[[dict[str, Any]], object], sentence: str, tmp_path: Path
) -> None:
    save_tokenizer(MADE[kind](), tmp_path / "t", lineage={})
    _change(tmp_path / "t", change)
    with pytest.raises(BadInput, match=sentence):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize("name", ["health.json", "lineage.json"])
def test_records_that_are_no_objects_are_a_sentence(name: str, tmp_path: Path) -> None:
    save_tokenizer(MADE["fsq"](), tmp_path / "t", lineage={})
    (tmp_path / "t" / name).write_text("[1]", encoding="utf-8")
    with pytest.raises(BadInput, match="holds no object"):
        load_tokenizer(tmp_path / "t")


class _Unsound(PixelClusters):
    """Says of itself what it is not."""

    def arguments(self) -> dict[str, Any]:
        return super().arguments() | {"codebook_size": 6}


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "killed between the renames"])
def test_a_save_that_fails_leaves_the_older_folder(killed: bool, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    save_tokenizer(MADE["pixel_clusters"](), folder, lineage={"number": 1})
    if killed:
        folder.rename(tmp_path / ".t.old")
    with pytest.raises(BadInput, match="ask for other weights"):
        save_tokenizer(_Unsound(5, 4, (16, 16)), folder, lineage={"number": 2})
    assert load_tokenizer(folder).lineage == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
    save_tokenizer(MADE["pixel_clusters"](), folder, lineage={"number": 3})
    assert load_tokenizer(folder).lineage == {"number": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["t"]
