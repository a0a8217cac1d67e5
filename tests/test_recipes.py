"""The published recipes at full size: as many weights, the learning rates and the layer decay that the papers state."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from foreseen.commands.verbs import Verb, load_recipe
from foreseen.engine.optimizer import SteppedOptimizer
from foreseen.engine.schedule import scaled_lr
from foreseen.errors import BadInput
from foreseen.finetune.distill import Distill
from foreseen.finetune.supervised import Supervised
from foreseen.models.drop_path import drop_path_modules
from foreseen.pretrain.beit import BEiT
from foreseen.pretrain.mae import MAE
from foreseen.pretrain.methods import METHODS
from tests.tiny_teacher import tiny_teacher
from tests.tiny_tokenizer import TinyTokenizer, tiny_tokenizer

CLASSES = 1000
DECODER_DIM, DECODER_DEPTH = 512, 8


@dataclass(frozen=True)
class ViT:
    """A ViT as Dosovitskiy et al. 2021, arXiv:2010.11929, table 1 has it, and its weights without a head."""

    width: int
    depth: int
    patch: int
    weights: int  # of timm's model without a head, whose 1000-class ones have 86.57, 304.33 and 632.05 million


VITS = {
    "b16": ViT(768, 12, 16, 85_798_656),
    "l16": ViT(1024, 24, 16, 303_301_632),
    "h14": ViT(1280, 32, 14, 630_764_800),
}
# Weights of the authors' masked autoencoders, with both position tables, as their script prints a model's size.
AUTHORS_MAE = {"b16": 111_907_840, "l16": 329_541_888, "h14": 657_074_508}
# facebookresearch/mae, FINETUNE.md: lr at a batch of 1024, layer decay, drop path, epochs.
FINETUNING = {"b16": (2e-3, 0.65, 0.1, 100), "l16": (4e-3, 0.75, 0.2, 50), "h14": (4e-3, 0.75, 0.3, 50)}


def _block(width: int) -> int:
    """Weights of a block: qkv, projection and an MLP four times as wide, their biases, and two norms."""
    return 12 * width**2 + 13 * width


def _tokens(patch: int) -> int:
    return (224 // patch) ** 2 + 1


@pytest.mark.parametrize("name", VITS)
def test_a_vit_has_the_weights_that_arithmetic_gives(name: str) -> None:
    vit = VITS[name]
    embedding = 3 * vit.patch**2 * vit.width + vit.width
    tokens = vit.width + _tokens(vit.patch) * vit.width
    assert embedding + tokens + vit.depth * _block(vit.width) + 2 * vit.width == vit.weights


@pytest.mark.parametrize("name", VITS)
def test_the_published_pretraining_is_built_at_full_size(name: str) -> None:
    config = load_recipe("pretrain", f"mae_vit_{name}")
    with torch.device("meta"):
        objective = MAE.build(config)
    vit = VITS[name]
    assert sum(parameter.numel() for parameter in objective.vit.parameters()) == vit.weights
    # Their decoder's table has a row for the CLS token, which is zero; ours is a buffer without it.
    table = _tokens(vit.patch) * DECODER_DIM
    weights = sum(parameter.numel() for parameter in objective.parameters())
    assert weights + table == AUTHORS_MAE[name]
    assert len(objective.decoder.blocks) == DECODER_DEPTH
    assert objective.num_visible == (_tokens(vit.patch) - 1) // 4
    optim = config.optim
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)
    assert (config.batch.global_size, config.run.epochs, optim.warmup_epochs) == (4096, 800, 40)
    assert peak == pytest.approx(2.4e-3)


@pytest.mark.parametrize("name", VITS)
def test_the_published_finetuning_is_built_at_full_size(name: str) -> None:
    lr, decay, drop_path, epochs = FINETUNING[name]
    config = load_recipe("finetune", f"vit_{name}_mae", ["model.init_from=null"])
    with torch.device("meta"):
        objective = Supervised.build(config, CLASSES)
    vit = VITS[name]
    # `fc_norm` takes the place of `norm`; the head is new.
    weights = {name: parameter.numel() for name, parameter in objective.named_parameters()}
    assert sum(weights.values()) == vit.weights + CLASSES * (vit.width + 1)
    optim = config.optim
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)
    assert (config.batch.global_size, config.run.epochs, optim.warmup_epochs) == (1024, epochs, 5)
    assert peak == pytest.approx(lr)
    assert (optim.layer_decay, config.model.drop_path_rate) == (decay, drop_path)

    rules = objective.parameter_rules(optim.layer_decay)
    assert rules.keys() == weights.keys()
    layers = {"model.patch_embed.proj.weight": 0, "model.cls_token": 0, "model.pos_embed": 0}
    layers |= {f"model.blocks.{block}.attn.qkv.weight": block + 1 for block in range(vit.depth)}
    layers |= {
        "model.fc_norm.weight": vit.depth + 1,
        "model.head.weight": vit.depth + 1,
        "model.head.bias": vit.depth + 1,
    }
    for weight, layer in layers.items():
        assert rules[weight].lr_scale == pytest.approx(decay ** (vit.depth + 1 - layer)), weight
    undecayed = {weight for weight, rule in rules.items() if not rule.decay}
    assert {"model.cls_token", "model.pos_embed"} <= undecayed
    assert undecayed == {n for n, p in objective.named_parameters() if p.ndim == 1} | {
        "model.cls_token",
        "model.pos_embed",
    }


@pytest.mark.parametrize("name", VITS)
def test_the_published_finetuning_begins_from_the_published_pretraining(name: str) -> None:
    pretraining, finetuning = load_recipe("pretrain", f"mae_vit_{name}"), load_recipe("finetune", f"vit_{name}_mae")
    assert finetuning.model.init_from == f"{pretraining.run.dir}/encoder"
    assert (finetuning.model.name, finetuning.views.size) == (pretraining.model.name, pretraining.views.size)


def _small(name: str, overrides: list[str]) -> tuple[Supervised, float]:
    """A DeiT recipe of 1000 classes at full size, and the lr that it reaches."""
    config = load_recipe("finetune", name, overrides)
    build = Distill.build if config.method.name == "distill" else Supervised.build
    with torch.device("meta"):
        objective = build(config, CLASSES)
    optim = config.optim
    return objective, scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)


def test_deit_small_is_distilled_as_published() -> None:
    objective, lr = _small("deit_s16_distilled", [f"method.teacher={tiny_teacher(CLASSES)}"])
    width, head = 384, CLASSES * 385
    weights = sum(parameter.numel() for parameter in objective.model.parameters())
    embedding, tokens = 3 * 16**2 * width + width, 2 * width + (_tokens(16) + 1) * width
    assert weights == embedding + tokens + 12 * _block(width) + 2 * width + 2 * head
    assert lr == pytest.approx(1e-3)
    config = load_recipe("finetune", "deit_s16_distilled")
    assert (config.batch.global_size, config.run.epochs, config.optim.warmup_epochs) == (1024, 300, 5)
    assert (config.data.repeats, config.method.weight, config.method.distillation) == (3, 0.5, "hard")  # type: ignore[attr-defined]


def test_deit3_small_is_trained_as_published() -> None:
    objective, lr = _small("deit3_s16", [])
    width = 384
    weights = sum(parameter.numel() for parameter in objective.model.parameters())
    # Its table has no row for the class token, and each block has two LayerScales.
    embedding, tokens = 3 * 16**2 * width + width, width + (_tokens(16) - 1) * width
    blocks = 12 * (_block(width) + 2 * width)
    assert weights == embedding + tokens + blocks + 2 * width + CLASSES * (width + 1)
    assert lr == pytest.approx(4e-3)
    config = load_recipe("finetune", "deit3_s16")
    assert (config.batch.global_size, config.run.epochs, config.optim.name) == (2048, 800, "lamb")
    # The same in all blocks, for both paths of each (models_v2.py).
    assert [module.rate for module in drop_path_modules(objective.model)] == [0.05] * 24
    assert objective.evaluation_request().views[0].centre_fraction == 1.0


HEADS = {"b16": 12, "l16": 16}
TABLE_ROWS = 27**2 + 3
# microsoft/unilm, beit/ and beit2/: lr at a batch of 1024, layer decay, drop path, epochs, warm-up.
BEIT_FINETUNING = {
    "vit_b16_beit": (4e-3, 0.65, 0.1, 100, 20),
    "vit_l16_beit": (1e-3, 0.75, 0.2, 50, 5),
    "vit_b16_beit2": (5e-4, 0.6, 0.2, 100, 20),
    "vit_l16_beit2": (2e-4, 0.8, 0.2, 50, 5),
}


def _beit_block(width: int) -> int:
    """A block without key bias and with two layer scales."""
    return _block(width) - width + 2 * width


def _beit_weights(vit: ViT) -> int:
    """Of a BEiT without its tables of relative positions: patch embedding, class token, blocks, and a norm."""
    return 3 * vit.patch**2 * vit.width + 2 * vit.width + vit.depth * _beit_block(vit.width) + 2 * vit.width


@pytest.mark.parametrize("version", ["beit", "beit2"])
@pytest.mark.parametrize("name", HEADS)
def test_beits_published_pretraining_is_built_at_full_size(version: str, name: str, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "tokenizer", size=(56, 56))
    config = load_recipe("pretrain", f"{version}_{name}", [f"method.tokenizer={folder}"])
    with torch.device("meta"):
        objective = BEiT.build(config)
    vit, heads = VITS[name], HEADS[name]
    encoder = {name: parameter.numel() for name, parameter in objective.encoder().named_parameters()}
    assert encoder["rel_pos_bias.relative_position_bias_table"] == TABLE_ROWS * heads
    assert sum(encoder.values()) == _beit_weights(vit) + TABLE_ROWS * heads
    weights = sum(parameter.numel() for parameter in objective.parameters())
    head = TinyTokenizer.codebook_size * (vit.width + 1)
    extra = 2 * _beit_block(vit.width) if version == "beit2" else 0
    assert weights == sum(encoder.values()) + vit.width + head + extra
    early = {"b16": 9, "l16": 21}[name]
    assert (objective.aggregation is not None) == (version == "beit2")
    assert objective.aggregation is None or objective.aggregation.from_block == early
    mask = objective.mask_draw
    assert (mask.target, mask.min_block, mask.min_aspect, mask.exact) == (75, 16, 0.3, version == "beit2")
    assert config.model.args["init_values"] == (0.1 if name == "b16" else 1e-5)
    optim, epochs = config.optim, {"beit": 800, "beit2": 1600}[version]
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)
    assert (config.batch.global_size, config.run.epochs, optim.warmup_epochs) == (2048, epochs, 10)
    assert (peak, optim.clip_grad, optim.weight_decay, optim.min_lr) == (1.5e-3, 3.0, 0.05, 1e-5)
    assert config.views.scale[0] == {"beit": 0.08, "beit2": 0.2}[version]


@pytest.mark.parametrize("name", BEIT_FINETUNING)
def test_beits_published_finetuning_is_built_at_full_size(name: str) -> None:
    lr, decay, drop_path, epochs, warmup = BEIT_FINETUNING[name]
    config = load_recipe("finetune", name, ["model.init_from=null"])
    with torch.device("meta"):
        objective = Supervised.build(config, CLASSES)
    size = name.split("_")[1]
    vit, heads = VITS[size], HEADS[size]
    # Each block has a table of its own now; `fc_norm` takes the place of `norm`.
    weights = {name: parameter.numel() for name, parameter in objective.named_parameters()}
    assert sum(weights.values()) == _beit_weights(vit) + vit.depth * TABLE_ROWS * heads + CLASSES * (vit.width + 1)
    optim = config.optim
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)
    assert (config.batch.global_size, config.run.epochs, optim.warmup_epochs) == (1024, epochs, warmup)
    assert (peak, optim.layer_decay, config.model.drop_path_rate) == (lr, decay, drop_path)
    rules = objective.parameter_rules(optim.layer_decay)
    layers = {"model.patch_embed.proj.weight": 0, "model.cls_token": 0}
    layers |= {f"model.blocks.{n}.attn.relative_position_bias_table": n + 1 for n in range(vit.depth)}
    layers |= {f"model.blocks.{n}.gamma_1": n + 1 for n in range(vit.depth)} | {"model.head.bias": vit.depth + 1}
    for weight, layer in layers.items():
        assert rules[weight].lr_scale == pytest.approx(decay ** (vit.depth + 1 - layer)), weight
    assert rules["model.blocks.0.attn.relative_position_bias_table"].decay


@pytest.mark.parametrize("name", [*BEIT_FINETUNING, "pets_beit"])
def test_beits_finetuning_begins_from_its_pretraining(name: str) -> None:
    *_, size, version = name.split("_")
    pretraining, finetuning = load_recipe("pretrain", f"{version}_{size}"), load_recipe("finetune", name)
    assert finetuning.model.init_from == f"{pretraining.run.dir}/encoder"
    assert (finetuning.model.name, finetuning.views.size) == (pretraining.model.name, pretraining.views.size)
    own = {key: value for key, value in pretraining.model.args.items() if "rel_pos_bias" not in key}
    assert finetuning.model.args == own


@pytest.mark.parametrize("name", ["beit_pets", "beit_cpu_minutes"])
def test_the_small_beits_are_built(name: str, tmp_path: Path) -> None:
    folder = tiny_tokenizer(tmp_path / "tokenizer", stride=8)
    with torch.device("meta"):
        objective = BEiT.build(load_recipe("pretrain", name, [f"method.tokenizer={folder}"]))
    assert objective.grid == {"beit_pets": (16, 16), "beit_cpu_minutes": (6, 6)}[name]
    assert len(objective.request.views) == 1


IMAGENET = 1_281_167


@dataclass(frozen=True)
class SelfDistilled:
    """What a paper's recipe says: peak lr, steps, crops, prototypes, and weights of the student, head and all."""

    recipe: str
    weights: int
    lr: float
    steps: int
    crops: int
    prototypes: int
    frozen_steps: int


def _head(width: int, prototypes: int, *, gains: bool) -> int:
    """Weights of D → 2048 → 2048 → 256, their biases, K directions of 256 and K gains, frozen or not."""
    mlp = width * 2048 + 2048 * 2048 + 2048 * 256 + 2 * 2048 + 256
    return mlp + prototypes * 256 + prototypes * gains


SMALL_VIT = 21_665_664  # of timm's ViT-S/16 without a head
SELF_DISTILLED = [
    SelfDistilled("dino_vit_s16", SMALL_VIT + _head(384, 65_536, gains=True), 2e-3, 1_000_912, 12, 65_536, 1251),
    SelfDistilled(
        "dino_vit_b16", VITS["b16"].weights + _head(768, 65_536, gains=False), 3e-3, 500_456, 12, 65_536, 3753
    ),
    SelfDistilled(
        "ibot_vit_s16", SMALL_VIT + 384 + _head(384, 8_192, gains=True), 2e-3, 1_000_912, 12, 8_192, 1251
    ),
    SelfDistilled(
        "ibot_vit_b16", VITS["b16"].weights + 768 + _head(768, 8_192, gains=False), 3e-3, 500_456, 12, 8_192, 3753
    ),
    SelfDistilled(
        "ibot_vit_l16", VITS["l16"].weights + 1024 + _head(1024, 8_192, gains=False), 3e-3, 312_785, 12, 8_192, 3753
    ),
    SelfDistilled(
        "dinov2_vit_l16_short",
        VITS["l16"].weights + 2 * 24 * 1024 + 1024 + _head(1024, 65_536, gains=True),
        4e-3 * 2**0.5, 125_000, 10, 65_536, 1251,
    ),
]  # fmt: skip


@pytest.mark.parametrize("paper", SELF_DISTILLED, ids=lambda paper: paper.recipe)
def test_the_published_self_distillation_is_built_at_full_size(paper: SelfDistilled) -> None:
    config = load_recipe("pretrain", paper.recipe).with_length(IMAGENET)
    with torch.device("meta"):
        objective = METHODS[config.method.name].build(config)
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == paper.weights
    optim = config.optim
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)
    assert peak == pytest.approx(paper.lr)
    assert config.run.steps == paper.steps
    assert sum(view.count for view in objective.request.views) == paper.crops
    rules = objective.parameter_rules(optim.layer_decay)
    assert rules.keys() == trained.keys()
    assert rules["student.head.last_layer.weight_v"].frozen_steps == paper.frozen_steps
    assert trained["student.head.last_layer.weight_v"].shape == (paper.prototypes, 256)
    assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.4)
    (of_lr,) = objective.notes[:1]
    assert of_lr.startswith(f"peak lr {peak:.4g}: ")
    assert not any("never" in note or "hardly" in note for note in objective.notes)


def test_dino_trains_a_resnet_as_its_readme_states() -> None:
    config = load_recipe("pretrain", "dino_resnet50").with_length(IMAGENET)
    with torch.device("meta"):
        objective = METHODS[config.method.name].build(config)
    rules = objective.parameter_rules(config.optim.layer_decay)
    optimizer = SteppedOptimizer(
        torch.nn.ModuleDict({"student": objective.student}), rules, config.optim,
        global_size=config.batch.global_size, total_steps=config.run.steps or 0,
    )  # fmt: skip
    assert isinstance(optimizer.optimizer, torch.optim.SGD)
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.optimizer.param_groups} == {(0.9, False)}
    assert optimizer.peak_lr == pytest.approx(0.06)
    assert optimizer.weight_decay(0) == optimizer.weight_decay(200_000) == 1e-4
    assert sum(view.count for view in objective.request.views) == 10


@pytest.mark.parametrize(("verb", "recipe"), [("pretrain", "mae_cpu_minutes"), ("tokenizer", "vqkd_cpu_minutes")])
@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("views.rand_augment=rand-m9", r"views\.rand_augment rand-m9 is of fine-tuning alone: set .*=null; colours"),
        ("views.three_augment=0.3", r"views\.three_augment 0\.3 is of fine-tuning alone"),
        ("views.three_augment=0", r"views\.three_augment 0\.0 is of fine-tuning alone: set .*=null"),
        ("views.erase=0.25", r"views\.erase 0\.25 is of fine-tuning alone: set views\.erase=0; colours"),
    ],
)
def test_what_only_finetuning_does_to_pictures_is_refused_elsewhere(
    verb: Verb, recipe: str, override: str, sentence: str
) -> None:
    with pytest.raises(BadInput, match=sentence):
        load_recipe(verb, recipe, [override])
