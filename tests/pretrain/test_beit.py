"""BEiT v1 and v2 compute what the authors' code computes, and keep what the recipe promises."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from foreseen.commands import pretrain
from foreseen.commands.verbs import method_options
from foreseen.config import RECIPES, Model, load
from foreseen.data.batch import Batch
from foreseen.data.views import normalise
from foreseen.engine.job import Outcome
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing, create_encoder, load_encoder, save_encoder
from foreseen.models.drop_path import KeyedDropPath
from foreseen.models.recompute import recompute_activations
from foreseen.pretrain.beit import BEiT, Prepared
from foreseen.pretrain.beit_official import from_hugging_face, from_official
from foreseen.tokenizers.folder import load_tokenizer
from tests.engine.driver import drive, loss_distance, norm_distance, weight_distance
from tests.golden_cases import load_case, weights
from tests.tiny_tokenizer import TinyTokenizer, tiny_tokenizer

OPTIONS = method_options("pretrain")
PROGRESS = Progress(0, 10, 5.0, 0)
SHARED = "use_rel_pos_bias: false, use_shared_rel_pos_bias: true"
TINY = f"{{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, init_values: 0.1, {SHARED}}}"
VIT = "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"
Build = Callable[..., BEiT]


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Builds a small BEiT from the shipped recipe; `tokenizer` has arguments of the tiny tokenizer."""

    def make(
        *overrides: str,
        recipe: str = "beit_b16",
        name: str = "beit_base_patch16_224",
        args: str = TINY,
        tokenizer: dict[str, Any] | None = None,
        codes: int | None = None,
    ) -> BEiT:
        torch.manual_seed(0)
        folder = tiny_tokenizer(tmp_path / "tokenizer", **(tokenizer or {}))
        small = yaml.safe_load((RECIPES / "pretrain" / f"{recipe}.yaml").read_text(encoding="utf-8"))
        small["model"] = {"name": name, "args": yaml.safe_load(args)}
        small["method"] |= {"tokenizer": str(folder)}
        small["views"] |= {"size": 32}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
        objective = BEiT.build(load("pretrain", str(tmp_path / "small.yaml"), overrides, OPTIONS))
        if codes is not None:  # the tokenizer of a golden case is not there, its codes are
            for part in (objective, objective.aggregation):
                if getattr(part, "head", None) is not None:
                    part.head = nn.Linear(48, codes)  # type: ignore[union-attr]
        return objective

    return make


def _batch(objective: BEiT, count: int = 6) -> Batch:
    key = torch.arange(count) * 7919 + 1
    generator = torch.Generator().manual_seed(1)
    images = {view.name: torch.randn(count, 3, *view.size, generator=generator) for view in objective.request.views}
    return Batch(key, key, key, images, draws={"mask": _masks(objective, count)})


def _masks(objective: BEiT, count: int) -> Tensor:
    import numpy as np

    (draw,) = objective.request.draws
    return torch.from_numpy(np.stack([draw.function(np.random.default_rng(number), number) for number in range(count)]))


def _expected(tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    exact = dtype == torch.float64 and f"out64/{name}" in tensors
    return tensors[f"out64/{name}" if exact else f"out/{name}"].to(dtype)


def _tolerance(case: dict[str, Any], dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-8, "atol": 1e-10} if dtype == torch.float64 else case["tolerance"]


def _loaded(objective: BEiT, state: dict[str, Tensor]) -> BEiT:
    found = objective.load_state_dict(state, strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) == {"position_counts.counts", "position_counts.frequent"}
    return objective


def _golden_args(c: dict[str, Any]) -> str:
    shape = ", ".join(f"{key}: {c[key]}" for key in ("patch_size", "embed_dim", "depth", "num_heads", "init_values"))
    positions = ("use_abs_pos_emb", "use_rel_pos_bias", "use_shared_rel_pos_bias")
    return f"{{{shape}, {', '.join(f'{key}: {str(c[key]).lower()}' for key in positions)}}}"


def _of_official(names: Sequence[str]) -> list[str]:
    return list(from_official({name: torch.zeros(()) for name in names}))


def _check_golden(
    objective: BEiT, case: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype, logits: Sequence[str]
) -> dict[str, Tensor]:
    """Compare the logits of hidden patches and the gradients with a case; returns what forward gave."""
    mask, codes = tensors["in/bool_masked_pos"], tensors["in/input_ids"]
    objective = objective.to(dtype).train()
    images = tensors["in/images"].to(dtype)
    places = objective.hidden_places(mask)
    hidden = mask.gather(1, places)
    assert hidden.sum() == mask.sum()
    for name, found in zip(logits, objective.predict(images, mask, places), strict=True):
        torch.testing.assert_close(found[hidden], _expected(tensors, name, dtype), **case["tolerance"])
    key = torch.arange(len(images))
    batch = Batch(key, key, key, {"image": images}, draws={"mask": mask})
    out = objective(batch, Prepared(codes, mask.sum()), PROGRESS)
    out["loss"].backward()
    tolerance = _tolerance(case, dtype)
    torch.testing.assert_close(out["loss"], _expected(tensors, "loss", dtype), **tolerance)
    parameters = dict(objective.named_parameters())
    norms = torch.stack([parameters[name].grad.norm() for name in _of_official(case["values"]["grad_norm_names"])])  # type: ignore[union-attr]
    torch.testing.assert_close(norms, _expected(tensors, "grad_norm", dtype), **tolerance)
    return out  # type: ignore[no-any-return]


@pytest.mark.parametrize("case_name", ["pretrain_shared_rel_pos", "pretrain_layer_rel_pos_abs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_beits_logits_loss_accuracy_and_gradients_equal_the_authors(
    build: Build, case_name: str, dtype: torch.dtype
) -> None:
    case, tensors = load_case("beit", case_name)
    c = case["config"]
    objective = build("method.mask.num_masked=8", args=_golden_args(c), codes=c["vocab_size"])
    _loaded(objective, from_official(weights(tensors)))
    out = _check_golden(objective, case, tensors, dtype, ["logits_masked"])
    torch.testing.assert_close(out["accuracy"], _expected(tensors, "mim_acc", dtype), **case["tolerance"])
    undecayed = {name for name, rule in objective.parameter_rules(None).items() if not rule.decay}
    spared = {f"vit.{name}" for name in case["values"]["no_weight_decay"]}
    vectors = {name for name, parameter in objective.named_parameters() if parameter.ndim == 1}
    assert undecayed == vectors | (spared & set(dict(objective.named_parameters())))


@pytest.mark.parametrize("which", ["shared", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_patch_aggregation_equals_the_authors(build: Build, which: str, dtype: torch.dtype) -> None:
    case, tensors = load_case("beit2", f"cls_pretraining_{which}_head")
    c = case["config"]
    objective = build(
        "method.mask={num_masked: 8}",
        f"method.aggregate={{from_block: {c['early_layers']}, depth: {c['head_layers']}, "
        f"shared_head: {str(c['shared_lm_head']).lower()}}}",
        recipe="beit2_b16",
        args=_golden_args(c),
        codes=c["vocab_size"],
    )
    _loaded(objective, from_official(weights(tensors)))
    out = _check_golden(objective, case, tensors, dtype, ["logits", "logits_cls_pt"])
    tolerance = _tolerance(case, dtype)
    torch.testing.assert_close(out["loss_main"], _expected(tensors, "loss_1", dtype), **tolerance)
    torch.testing.assert_close(out["loss_aggregated"], _expected(tensors, "loss_2", dtype), **tolerance)


def test_logits_and_loss_equal_those_of_hugging_face(build: Build) -> None:
    case, tensors = load_case("huggingface", "beit_mim")
    c = case["config"]
    args = (
        f"{{patch_size: {c['patch_size']}, embed_dim: {c['hidden_size']}, depth: {c['num_hidden_layers']}, num_heads: "
        f"{c['num_attention_heads']}, mlp_ratio: 2.0, init_values: {c['layer_scale_init_value']}, {SHARED}}}"
    )
    objective = build("method.mask.num_masked=8", args=args).double()
    objective.head = nn.Linear(c["hidden_size"], c["vocab_size"]).double()
    _loaded(objective, from_hugging_face(weights(tensors)))
    for module in objective.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-12  # as theirs
    mask, images = tensors["in/bool_masked_pos"], tensors["in/pixel_values"].double()
    every = torch.arange(16).expand(len(mask), -1)
    (logits,) = objective.predict(images, mask, every)
    torch.testing.assert_close(logits, _expected(tensors, "logits", torch.float64), **case["tolerance"])
    codes = torch.zeros_like(mask, dtype=torch.int64).masked_scatter(mask, tensors["in/labels"])
    key = torch.arange(len(mask))
    batch = Batch(key, key, key, {"image": images}, draws={"mask": mask})
    loss = objective(batch, Prepared(codes, mask.sum()), PROGRESS)["loss"]
    torch.testing.assert_close(loss, _expected(tensors, "loss", torch.float64), **case["tolerance"])


def test_an_official_key_that_has_no_place_is_named() -> None:
    _, tensors = load_case("beit", "pretrain_shared_rel_pos")
    with pytest.raises(BadInput, match=r"keys that are not BEiT's: blocks.0.attn.k_norm.weight, decoder.bias"):
        from_official(
            {**weights(tensors), "decoder.bias": torch.zeros(1), "blocks.0.attn.k_norm.weight": torch.zeros(1)}
        )
    with pytest.raises(BadInput, match=r"not BEiT's: beit.pooler.layernorm.bias"):
        from_hugging_face({"beit.pooler.layernorm.bias": torch.zeros(1)})


BACKBONES = [
    ("beit_base_patch16_224", TINY),
    ("beitv2_base_patch16_224", "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3}"),
    ("vit_tiny_patch16_224", VIT),
    ("deit3_small_patch16_224", VIT),
    ("deit_tiny_distilled_patch16_224", VIT),
    ("vit_small_patch14_reg4_dinov2", VIT),
    ("vit_tiny_patch16_224", "{patch_size: 8, embed_dim: 48, depth: 2, num_heads: 3, dynamic_img_size: true}"),
]


@pytest.mark.parametrize(("name", "args"), BACKBONES)
def test_without_a_hidden_patch_every_backbone_encodes_what_timm_encodes(build: Build, name: str, args: str) -> None:
    objective = build("method.mask.num_masked=4", name=name, args=args).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        tokens = objective.vit.forward_features(images)
        prefix = objective.vit.num_prefix_tokens
        every = torch.arange(16).expand(2, -1)
        (logits,) = objective.predict(images, torch.zeros(2, 16, dtype=torch.bool), every)
        torch.testing.assert_close(logits, objective.head(tokens[:, prefix:]), rtol=1e-4, atol=1e-5)
        (masked,) = objective.predict(images, torch.ones(2, 16, dtype=torch.bool), every)
        torch.testing.assert_close(masked[0], masked[1])  # nothing of a picture is left


@pytest.mark.parametrize(("name", "args"), BACKBONES)
@pytest.mark.parametrize("aggregate", ["null", "{from_block: 1, depth: 2}", "{from_block: 1, shared_head: false}"])
def test_every_trained_weight_takes_part(build: Build, name: str, args: str, aggregate: str) -> None:
    objective = build(f"method.aggregate={aggregate}", name=name, args=args).train()
    batch = _batch(objective)
    (prepared,) = objective.prepare([batch], PROGRESS)
    objective(batch, prepared, PROGRESS)["loss"].backward()
    for name_, parameter in objective.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name_
    assert set(objective.parameter_rules(None)) == {n for n, p in objective.named_parameters() if p.requires_grad}
    assert all(name_.startswith("tokenizer.") for name_, p in objective.named_parameters() if not p.requires_grad)


def test_behind_the_last_attention_only_what_is_asked_for_is_computed(build: Build) -> None:
    objective = build("method.mask={num_masked: 5}", "method.aggregate={from_block: 1, depth: 2}")
    assert objective.aggregation is not None
    blocks, seen = [*objective.vit.blocks, *objective.aggregation.blocks], list[int]()
    for block in blocks:
        block.mlp.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[1]))
    batch = _batch(objective)
    objective(batch, objective.prepare([batch], PROGRESS)[0], PROGRESS)
    assert seen == [17, 1 + 5, 17, 5]  # of the encoder's last block aggregation takes the class token, too


def test_the_whole_recipe_gives_the_same_however_the_batch_is_cut(build: Build) -> None:
    def make() -> BEiT:
        return build(
            "model.drop_path_rate=0.5",
            "method.mask={num_masked: 7, min_block: 4}",
            "method.aggregate={from_block: 1}",
            args=TINY.replace("depth: 2", "depth: 3"),
        )

    assert len(_masks(make(), 16).sum(1).unique()) > 1  # images count unevenly
    whole, split = drive(make, 16), drive(make, 2)
    assert loss_distance(whole, split) < 1e-13
    assert norm_distance(whole, split) < 1e-13
    assert weight_distance(whole, split) < 1e-11
    assert not any(name.startswith("tokenizer") for name in whole.state)
    assert torch.equal(whole.state["position_counts.counts"], split.state["position_counts.counts"])
    assert whole.state["position_counts.counts"].sum() == 16 * 16  # one step of sixteen pictures of sixteen patches


def test_activations_may_be_computed_again(build: Build) -> None:
    gradients = []
    for again in (False, True):
        objective = build("model.drop_path_rate=0.5", "method.aggregate={from_block: 1, depth: 1}").double().train()
        if again:
            assert objective.aggregation is not None
            for block in (*objective.vit.blocks, *objective.aggregation.blocks):
                recompute_activations(block)
        batch = _batch(objective)
        batch = batch.with_images({name: images.double() for name, images in batch.images.items()})
        (prepared,) = objective.prepare([batch], PROGRESS)
        objective(batch, prepared, PROGRESS)["loss"].backward()
        gradients.append({name: p.grad for name, p in objective.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_a_step_that_is_not_finite_moves_nothing(build: Build) -> None:
    before, after = (drive(build, 8, steps=n, spoil_step=s) for n, s in ((0, None), (1, 0)))
    for name, value in before.state.items():
        assert torch.equal(value, after.state[name]), name


def test_a_micro_batch_of_empty_masks_adds_nothing(build: Build) -> None:
    objective = build()
    batch = _batch(objective)
    batch.draws["mask"][:] = False
    (prepared,) = objective.prepare([batch], PROGRESS)
    loss = objective(batch, prepared, PROGRESS)["loss"]
    assert loss == 0


def test_the_loss_is_over_hidden_patches_and_accuracy_stands_beside_two_guesses(build: Build) -> None:
    objective = build("method.mask.num_masked=5")
    batch = _batch(objective)
    mask = batch.draws["mask"]
    (prepared,) = objective.prepare([batch], PROGRESS)
    codes = prepared.codes
    objective.after_step(PROGRESS, torch.tensor(True))
    assert prepared.num_hidden == mask.sum()
    out = objective(batch, objective.prepare([batch], PROGRESS)[0], PROGRESS)
    with torch.no_grad():
        every = torch.arange(16).expand(len(mask), -1)
        (logits,) = objective.predict(batch.images["image"], mask, every)
    expected = nn.functional.cross_entropy(logits[mask], codes[mask])
    torch.testing.assert_close(out["loss"].detach(), expected)
    assert out["accuracy"] == pytest.approx(float((logits.argmax(-1) == codes)[mask].float().mean()))
    frequent = torch.stack([torch.bincount(codes[:, place], minlength=16).argmax() for place in range(16)])
    assert out["baseline_position"] == pytest.approx(float((frequent == codes)[mask].float().mean()))
    right = []
    for image, place in mask.nonzero().tolist():
        visible = (~mask[image]).nonzero()[:, 0].tolist()
        distance = {v: (v // 4 - place // 4) ** 2 + (v % 4 - place % 4) ** 2 for v in visible}
        nearest = min(visible, key=lambda v: (distance[v], v))
        right.append(float(codes[image, nearest] == codes[image, place]))
    assert out["baseline_neighbour"] == pytest.approx(sum(right) / len(right))
    assert objective.health()["codes_used"] == len(codes.unique()) / 16


def test_the_loss_falls_and_beats_both_guesses_on_one_batch(build: Build) -> None:
    objective = build("method.mask={num_masked: 6, exact: true}").train()
    optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
    batch = _batch(objective)
    (prepared,) = objective.prepare([batch], PROGRESS)
    for _ in range(120):
        out = objective(batch, prepared, PROGRESS)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert out["accuracy"] > 0.9
    assert out["accuracy"] > max(out["baseline_position"], out["baseline_neighbour"]) + 0.3


def test_codes_are_made_in_float32_whatever_the_precision(build: Build) -> None:
    objective = build()
    batch = _batch(objective)
    plain = objective.codes(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.prepare([batch], PROGRESS)[0].codes, plain)


def test_a_tokenizer_of_another_size_sees_the_same_windows_and_one_of_the_same_size_the_same_pixels(
    build: Build,
) -> None:
    objective = build(tokenizer={"stride": 4, "interpolation": "bilinear", "mean": 0.25})
    image, tokens = objective.request.views
    assert (tokens.size, tokens.window_of, tokens.interpolation) == ((16, 16), "image", "bilinear")
    assert (tokens.mean, tokens.std) == ((0.25,) * 3, (0.5,) * 3)
    assert (tokens.scale, tokens.flip) == (image.scale, image.flip)

    objective = build(tokenizer={"stride": 8, "mean": 0.25})
    assert [view.name for view in objective.request.views] == ["image"]
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    key = torch.arange(3)
    images = normalise(pixels, image.mean, image.std, torch.float64)
    batch = Batch(key, key, key, {"image": images}, draws={"mask": _masks(objective, 3)})
    its = normalise(pixels, (0.25,) * 3, (0.5,) * 3, torch.float64)
    expected = objective.tokenizer.network.encode(its).flatten(1)
    assert torch.equal(objective.double().codes(batch), expected)


def test_masks_scale_with_the_grid_and_the_published_one_is_the_papers(build: Build) -> None:
    draw = build("views.size=224", args="{patch_size: 16, embed_dim: 48, depth: 2, num_heads: 3}").mask_draw
    assert (draw.grid, draw.target, draw.min_block, draw.min_aspect, draw.exact) == ((14, 14), 75, 16, 0.3, False)
    draw = build("views.size=[48,64]").mask_draw
    assert (draw.grid, draw.target, draw.min_block) == ((6, 8), 18, 4)
    assert build(recipe="beit2_b16", args=TINY.replace("depth: 2", "depth: 12")).mask_draw.exact


def test_weights_begin_as_the_authors_draw_them(build: Build) -> None:
    args = f"{{patch_size: 8, embed_dim: 192, depth: 3, num_heads: 3, init_values: 0.1, {SHARED}}}"
    objective = build("method.aggregate={from_block: 2}", args=args)
    std = 0.02 * 0.5396  # of a normal distribution cut at one standard deviation
    for weight in (
        objective.vit.blocks[0].attn.qkv.weight, objective.vit.blocks[2].mlp.fc1.weight, objective.head.weight,
        objective.vit.patch_embed.proj.weight,
    ):  # fmt: skip
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(std, rel=0.03)
    for number, block in enumerate(objective.vit.blocks, 1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(std / (2 * number) ** 0.5, rel=0.03)
        assert torch.equal(block.gamma_1, torch.full((192,), 0.1))
        assert block.mlp.fc1.bias.count_nonzero() == block.attn.q_bias.count_nonzero() == 0
    assert objective.vit.rel_pos_bias.relative_position_bias_table.count_nonzero() == 0
    for token in (objective.mask_token, objective.vit.cls_token):
        assert 0 < token.abs().max() <= 0.02
    assert objective.aggregation is not None
    for number, block in enumerate(objective.aggregation.blocks, 3):
        # Torch's own uniform draw, divided like the blocks that they continue.
        assert block.mlp.fc2.weight.abs().max().item() == pytest.approx(768**-0.5 / (2 * number) ** 0.5, rel=0.01)
        assert not torch.equal(block.attn.qkv.weight, objective.vit.blocks[2].attn.qkv.weight)


def test_extra_blocks_go_on_with_the_drop_path_rates(build: Build) -> None:
    args = TINY.replace("depth: 2", "depth: 5")
    objective = build("method.aggregate={from_block: 3, depth: 3}", "model.drop_path_rate=0.4", args=args)
    assert objective.aggregation is not None
    rates = [
        [m.rate for m in block.modules() if isinstance(m, KeyedDropPath)] for block in objective.aggregation.blocks
    ]
    assert rates == [[pytest.approx(0.3)] * 2, [pytest.approx(0.4)] * 2, [pytest.approx(0.4)] * 2]


@pytest.mark.parametrize("aggregate", ["null", "{from_block: 1, depth: 2}"])
def test_the_encoder_is_a_timm_model_without_what_pretraining_alone_needs(
    build: Build, tmp_path: Path, aggregate: str
) -> None:
    objective = build(f"method.aggregate={aggregate}")
    with torch.no_grad():
        objective.vit.rel_pos_bias.relative_position_bias_table.normal_()
    assert not any("mask_token" in name for name in objective.encoder().state_dict())
    seen = Preprocessing.of_view(objective.request.views[0])
    save_encoder(objective.encoder(), tmp_path / "encoder", preprocessing=seen, lineage={})
    loaded: Any = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = objective.vit.eval().forward_features(images)
        torch.testing.assert_close(loaded(images), tokens[:, 1:].mean(1), rtol=1e-4, atol=1e-5)
    again = create_encoder(Model(init_from=str(tmp_path / "encoder")), img_size=(48, 48))
    assert again.initialised is not None
    assert again.initialised.fresh == again.initialised.unused == ()
    assert load_encoder(tmp_path / "encoder").architecture == "beit_base_patch16_224"


def test_going_on_from_an_encoder_keeps_its_weights_and_draws_the_rest(build: Build, tmp_path: Path) -> None:
    first = build()
    with torch.no_grad():
        first.vit.blocks[1].gamma_1.fill_(0.3)
    seen = Preprocessing.of_view(first.request.views[0])
    save_encoder(first.encoder(), tmp_path / "encoder", preprocessing=seen, lineage={})
    second = build(
        f"model.init_from={tmp_path / 'encoder'}", "views.size=48", "method.aggregate={from_block: 1, depth: 1}"
    )
    assert torch.equal(second.vit.blocks[1].mlp.fc1.weight, first.vit.blocks[1].mlp.fc1.weight)
    assert second.vit.blocks[1].gamma_1[0].item() == pytest.approx(0.3)
    assert second.aggregation is not None
    assert torch.equal(second.aggregation.blocks[0].gamma_1, torch.full((48,), 0.1))


def test_pictures_show_original_masked_and_codes(build: Build) -> None:
    objective = build().eval()
    batch = _batch(objective)
    ((name, picture),) = objective.pictures(batch, PROGRESS).items()
    assert name == "original, masked, codes, predicted codes, decoded codes, decoded prediction"
    assert picture.shape == (6, 3, 32, 6 * 32)
    assert picture.dtype == torch.uint8
    original, masked, codes, predicted, *_ = picture.chunk(6, dim=3)
    hidden = batch.draws["mask"].view(-1, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    assert torch.equal(masked[~hidden], original[~hidden])
    assert (masked[hidden] == 128).all()
    assert torch.equal(codes[~hidden], predicted[~hidden])
    assert not torch.equal(codes, predicted)


def test_the_tokenizer_is_named_and_is_in_no_state(build: Build) -> None:
    objective = build()
    (sha256,) = objective.frozen_inputs().values()
    assert len(sha256) == 64
    assert objective.frozen_inputs().keys() == {"tokenizer"}
    assert not any(name.startswith("tokenizer") for name in objective.state_dict())
    assert build(tokenizer={"seed": 1}).frozen_inputs() != objective.frozen_inputs()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"tokenizer": {"fixed": True, "stride": 2}}, r"a grid of 4×4 patches .* 8×8 codes, .* views.size=\[64, 64\]"),
        ({"overrides": ["method.mask.num_masked=16"]}, r"method.mask.num_masked 16 hides 16 of 4×4 patches"),
        ({"overrides": ["method.mask.ratio=0.01"]}, r"method.mask.ratio 0.01 hides 0 of 4×4 patches"),
        ({"overrides": ["views.size=[8,64]"]}, r"1×8 patches has no block .* method.mask.exact=true"),
        ({"overrides": ["views.size=[16,800]"]}, r"2×100 patches has no block of method.mask.min_block 16 or more"),
        ({"overrides": ["method.aggregate={from_block: 2}"]}, r"from_block 2 is not before the last .* \[1, 1\]"),
        ({"name": "eva02_tiny_patch14_224", "args": "{}", "overrides": ["views.size=28"]}, "is an EVA"),
        ({"name": "resnet18", "args": "{}"}, "resnet18 is neither a BEiT nor a plain ViT"),
        ({"overrides": ["views.size=36"]}, r"views.size \[36, 36\] is not a multiple of the 8×8 patches"),
        ({"overrides": ["method.tokenizer=nowhere"]}, "nowhere is no tokenizer folder"),
        ({"overrides": ["method.tokenizer=null", "run.dir=nothing"]}, "nothing/tokenizer is no tokenizer folder"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_a_sentence(build: Build, arguments: dict[str, Any], sentence: str) -> None:
    overrides = arguments.pop("overrides", [])
    with pytest.raises(BadInput, match=sentence):
        build(*overrides, **arguments)


def test_a_tokenizer_given_as_a_module_needs_no_folder(build: Build) -> None:
    small = build()
    objective = BEiT(small.vit, TinyTokenizer(), small.options, small.view)
    assert objective.frozen_inputs() == {}
    batch = _batch(objective)
    assert objective.prepare([batch], PROGRESS)[0].codes.shape == (6, 16)


def test_a_run_goes_on_with_its_tokenizer_wherever_it_lies_and_with_no_other(
    small_shards: Path, tmp_path: Path, recipe: Callable[..., list[str]]
) -> None:
    def run(tokenizer: Path) -> Outcome:
        small = recipe(
            method__tokenizer=tokenizer, run__steps=4, run__save_every=2, run__log_every=1, optim__warmup_steps=1,
            optim__warmup_epochs="null", run__epochs="null", batch__global_size=16, method__mask__min_block=4,
            method__min_usage=0.3,
        )  # fmt: skip
        return pretrain.run(load("pretrain", "beit_b16", small, OPTIONS))

    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    assert run(tokenizer).step == 4
    folder = tmp_path / "run"
    (sha256,) = {load_tokenizer(tokenizer).sha256}
    lineage = json.loads((folder / "encoder/lineage.json").read_text(encoding="utf-8"))
    assert lineage["frozen_inputs"] == {"tokenizer": sha256}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"loss", "accuracy", "baseline_position", "baseline_neighbour"} <= lines[-1].keys()
    assert lines[-1]["health/codes_used"] > 0.5
    names = load_file(folder / "checkpoints/step-4/model.safetensors").keys()
    assert "mask_token" in names
    assert not any(name.startswith("tokenizer") for name in names)

    shutil.rmtree(folder / "checkpoints/step-4")
    assert run(Path(shutil.move(tokenizer, tmp_path / "moved"))).step == 4
    with pytest.raises(BadInput, match="the tokenizer changed since the run in run.dir"):
        run(tiny_tokenizer(tmp_path / "other", seed=1))
