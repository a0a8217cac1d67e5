"""BEiT's fine-tuning through the supervised stage: the authors' logits, parameter groups, tables and schedules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foreseen.commands.verbs import method_options
from foreseen.config import resolve
from foreseen.engine.schedule import warmup_cosine
from foreseen.errors import BadInput
from foreseen.finetune.supervised import Supervised
from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.handoff.official_beit import beit_finetuned_from_official
from foreseen.models.backbone import create_backbone
from foreseen.models.initialise import initialise
from tests.golden_cases import load_case, weights

SHAPE = ("patch_size", "embed_dim", "depth", "num_heads", "init_values", "use_abs_pos_emb", "use_rel_pos_bias")


def _build(num_classes: int, size: int = 32, *, pool: str = "mean", **more: Any) -> Supervised:
    torch.manual_seed(0)
    raw = {
        "run": {"dir": "runs/x", "steps": 10},
        "model": {"name": "beit_base_patch16_224", **more.get("model", {})},
        "method": {"name": "supervised", "pool": pool, **more.get("method", {})},
        "views": {"size": [size, size]},
        "optim": {"base_lr": 1e-3, "lr_scaling": "none", "warmup_steps": 0},
        "batch": {"global_size": 8},
    }
    return Supervised.build(resolve(raw, method_options("finetune")), num_classes)


def _args(shape: dict[str, Any]) -> dict[str, Any]:
    return {key: shape[key] for key in SHAPE} | {"use_shared_rel_pos_bias": shape.get("use_shared_rel_pos_bias", False)}


@pytest.mark.parametrize(("case", "pool"), [("true", "mean"), ("false", "token")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_equal_those_of_beits_code_from_official_keys(case: str, pool: str, dtype: torch.dtype) -> None:
    described, tensors = load_case("beit", f"finetune_mean_pooling_{case}")
    c = described["config"]
    objective = _build(c["num_classes"], c["img_size"], pool=pool, model={"args": _args(c)})
    state = beit_finetuned_from_official(weights(tensors))
    done = initialise(objective.model, state, img_size=(c["img_size"],) * 2, source="official")
    assert done.fresh == done.unused == ()
    model: Any = objective.to(dtype).eval().model
    images = tensors["in/images"].to(dtype)
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if exact else described["tolerance"]
    found = {"logits": model(images), "features": model.forward_head(model.forward_features(images), pre_logits=True)}
    for name, value in found.items():
        torch.testing.assert_close(value, tensors[f"out64/{name}" if exact else f"out/{name}"], **tolerance)


def test_an_official_key_that_has_no_place_is_named() -> None:
    with pytest.raises(BadInput, match=r"the fine-tuned checkpoint has keys that are not BEiT's: lm_head.bias"):
        beit_finetuned_from_official({"cls_token": torch.zeros(1), "lm_head.bias": torch.zeros(1)})


@pytest.mark.parametrize("case", ["layer_decay", "layer_decay_no_wd_rel_pos"])
def test_parameter_groups_are_those_of_beits_code(case: str) -> None:
    described, _ = load_case("beit", case)
    c = described["config"]
    objective = _build(
        c["num_classes"],
        c["img_size"],
        model={"args": _args(c)},
        method={"decay_relative_positions": not c["disable_weight_decay_on_rel_pos_bias"]},
    )
    theirs = described["values"]["per_parameter"]
    rules = objective.parameter_rules(c["layer_decay"])
    assert set(rules) == {f"model.{name}" for name in theirs}
    for name, (scale, decay) in theirs.items():
        rule = rules[f"model.{name}"]
        assert rule.lr_scale == pytest.approx(scale, rel=1e-12), name
        assert rule.decay == (decay > 0), name


@pytest.mark.parametrize("case", ["rel_pos_interpolation_0", "rel_pos_interpolation_1"])
def test_an_encoder_is_begun_from_at_another_size_as_beit_does(tmp_path: Path, case: str) -> None:
    described, tensors = load_case("beit", case)
    old, new, heads = *(described["config"][f"{which}_grid"] for which in ("old", "new")), tensors["in/table"].shape[1]
    shared = {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}
    args = {"patch_size": 8, "embed_dim": 8 * heads, "depth": 2, "num_heads": heads, "init_values": 0.1}
    size = (8 * old, 8 * old)
    encoder: Any = create_backbone("beit_base_patch16_224", img_size=size, args={**args, **shared})
    with torch.no_grad():
        encoder.rel_pos_bias.relative_position_bias_table.copy_(tensors["in/table"])
        encoder.blocks[1].gamma_2.fill_(0.25)
    preprocessing = Preprocessing((0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, size)
    save_encoder(encoder, tmp_path / "encoder", preprocessing=preprocessing, lineage={})
    objective = _build(5, 8 * new, model={"args": args, "init_from": str(tmp_path / "encoder")})
    model: Any = objective.model
    tables = [block.attn.relative_position_bias_table for block in model.blocks]
    for table in tables:
        torch.testing.assert_close(table.detach(), tensors["out/table_new"], **described["tolerance"])
    assert tables[0] is not tables[1]  # each learns on by itself
    assert torch.equal(model.blocks[1].gamma_2, encoder.blocks[1].gamma_2)
    assert 1e-5 < model.head.weight.std().item() < 3e-5
    own = _build(5, 8 * new, model={"name": None, "init_from": str(tmp_path / "encoder")})
    shared_table: Tensor = own.model.get_parameter("rel_pos_bias.relative_position_bias_table")
    torch.testing.assert_close(shared_table.detach(), tensors["out/table_new"], **described["tolerance"])


@pytest.mark.parametrize("case", ["warmup_epochs", "warmup_steps", "weight_decay"])
def test_the_schedule_is_beits_but_for_less_than_a_step_of_its_ramp(case: str) -> None:
    described, _ = load_case("beit", f"cosine_scheduler_{case}")
    args, theirs = described["config"]["args"], described["values"]["schedule"]
    warmup = args.get("warmup_steps") or args["niter_per_ep"] * args.get("warmup_epochs", 0)
    peak, total = args["base_value"], len(theirs)
    ours = [
        warmup_cosine(step, peak=peak, end=args["final_value"], warmup_steps=warmup, total_steps=total)
        for step in range(total)
    ]
    assert ours[warmup:] == pytest.approx(theirs[warmup:], rel=1e-12)
    # Their ramp begins at `start_warmup_value` and is at its peak a step before the cosine begins; ours begins at 0.
    for mine, its in zip(ours[:warmup], theirs[:warmup], strict=True):
        assert mine <= its <= mine + peak / warmup + 1e-12
