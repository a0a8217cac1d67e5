"""Continued pretraining: heads warm up on a backbone that has learnt; then its layers follow, the first ones least."""

import json
from pathlib import Path

import pytest
import timm
import torch

from foreseen.commands import pretrain
from foreseen.commands.verbs import load_recipe
from foreseen.data.views import IMAGENET_MEAN, IMAGENET_STD
from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone
from tests.small_methods import small_method

ARGS = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture
def learnt(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    model = create_backbone("vit_tiny_patch16_224", img_size=(48, 48), args=ARGS)
    seen = Preprocessing(IMAGENET_MEAN, IMAGENET_STD, "bicubic", 0.875, (48, 48))
    save_encoder(model, tmp_path / "learnt", preprocessing=seen, lineage={"made": "for a test"})
    return tmp_path / "learnt"


def _run(tmp_path: Path, small_shards: Path, learnt: Path, method: str, *overrides: str) -> Path:
    folder = tmp_path / "run"
    small = [f"{key}={value}" for key, value in small_method(load_recipe("pretrain", f"{method}_cpu_minutes")).items()]
    config = load_recipe("pretrain", f"{method}_cpu_minutes", [
        f"run.dir={folder}", f"data.path={small_shards}", "data.workers=0", "run.steps=4", "run.log_every=1",
        "model.name=null", "model.args=null", f"model.init_from={learnt}", "views.size=48", "batch.global_size=8",
        "optim.warmup_steps=0", "optim.layer_decay=0.5", "method.teacher_momentum=0.0", "method.centering=centre",
        *small, *overrides,
    ])  # fmt: skip
    pretrain.run(config)
    return folder


@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2"])
def test_a_backbone_stands_still_while_its_heads_warm_up(
    method: str, tmp_path: Path, small_shards: Path, learnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _run(tmp_path, small_shards, learnt, method, "method.head_warmup_steps=4", "probe.every=4")
    before, after = (timm.create_model(f"local-dir:{path}", pretrained=True) for path in (learnt, folder / "encoder"))
    for name, parameter in before.state_dict().items():
        torch.testing.assert_close(parameter, after.state_dict()[name], rtol=0, atol=0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    probed = [line["probe/rankme"] for line in lines if "probe/rankme" in line]
    assert probed[0] == pytest.approx(probed[1]), "the first probe is of the weights that the run begins from"
    assert "The weights that the run began from had" in capsys.readouterr().out
    assert {"teacher_entropy", "kl", "health/prototypes_used", "health/center_norm", "health/feature_rank",
            "health/patch_diversity", "peak_memory_gb"} <= lines[-2].keys() | lines[-1].keys()  # fmt: skip


def test_a_last_stage_at_a_higher_resolution_takes_over_all_but_the_positions(
    tmp_path: Path, small_shards: Path, learnt: Path
) -> None:
    large = ["views.size=96", "method.crops.local_size=48", "method.head_warmup_steps=4"]
    folder = _run(tmp_path, small_shards, learnt, "dinov2", *large)
    before, after = (timm.create_model(f"local-dir:{path}", pretrained=True) for path in (learnt, folder / "encoder"))
    assert after(torch.zeros(1, 3, 96, 96)).shape == before(torch.zeros(1, 3, 48, 48)).shape
    positions = after.pos_embed
    assert positions.shape[1] - before.pos_embed.shape[1] == 12 * 12 - 6 * 6
    resized = timm.layers.resample_abs_pos_embed(before.pos_embed, [12, 12], num_prefix_tokens=1)
    similar = torch.nn.functional.cosine_similarity(positions[0, 1:], resized[0, 1:], dim=-1)
    assert similar.mean() > 0.95, "interpolated, not drawn anew"
    kept = after.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in before.state_dict().items() if name != "pos_embed")


@pytest.mark.parametrize("method", ["dino", "ibot", "dinov2"])
def test_activations_computed_again_give_the_same_run(
    method: str, tmp_path: Path, small_shards: Path, learnt: Path
) -> None:
    losses = []
    for checkpointed in ("false", "true"):
        overrides = [f"compute.checkpoint_activations={checkpointed}", "compute.precision=fp64", "optim.clip_grad=0.1"]
        shuffled = ["model.drop_path_rate=0.3", "method.head_warmup_steps=0"]
        folder = _run(tmp_path / checkpointed, small_shards, learnt, method, *overrides, *shuffled)
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_a_run_that_nothing_compares_with_its_start_says_so(
    tmp_path: Path, small_shards: Path, learnt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path, small_shards, learnt, "dino")
    assert "nothing compares with that: set probe.every" in capsys.readouterr().out


def test_then_its_first_layers_move_least(tmp_path: Path, small_shards: Path, learnt: Path) -> None:
    folder = _run(tmp_path, small_shards, learnt, "dino", "method.head_warmup_steps=2")
    before, after = (timm.create_model(f"local-dir:{path}", pretrained=True) for path in (learnt, folder / "encoder"))
    moved = [
        float((before.get_parameter(name) - after.get_parameter(name)).abs().mean().detach())
        for name in ("patch_embed.proj.weight", "blocks.0.attn.proj.weight", "blocks.1.attn.proj.weight")
    ]
    assert 0 < moved[0] < moved[1] < moved[2]
