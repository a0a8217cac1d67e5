"""VQ-KD computes what the authors' code computes, learns from any encoder, and hands over a tokenizer alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from foreseen import cli
from foreseen.commands.verbs import command_of, load_recipe
from foreseen.config import Config
from foreseen.data.batch import Batch
from foreseen.engine import loss_scale
from foreseen.engine.objective import Progress
from foreseen.engine.schedule import scaled_lr
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing, save_encoder
from foreseen.models.backbone import create_backbone
from foreseen.tokenizers import vqkd_training
from foreseen.tokenizers.folder import load_tokenizer, save_tokenizer
from foreseen.tokenizers.teacher import Teacher, load_teacher
from foreseen.tokenizers.vqkd_official import from_official, official_tokenizer
from foreseen.tokenizers.vqkd_training import VQKDObjective
from tests.engine.driver import assert_the_same_however_cut
from tests.golden_cases import load_case, weights
from tests.tokenizers.teachers import save_teacher

PROGRESS = Progress(0, 10, 5.0, 0)
RECIPES = ["vqkd_b16", "vqkd_pets", "vqkd_cpu_minutes"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "encoder")


def _config(teacher: Path | str, **more: Any) -> Config:
    overrides = {
        "method.teacher": teacher, "method.codebook_size": 24, "method.code_dim": 8, "views.size": 32,
        "model.args": "{patch_size: 8, embed_dim: 32, depth: 2, num_heads: 2}", "batch.global_size": 16,
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return load_recipe("tokenizer", "vqkd_cpu_minutes", [f"{key}={value}" for key, value in overrides.items()])


def _small(teacher: Path | str, **more: Any) -> VQKDObjective:
    torch.manual_seed(0)
    return VQKDObjective.build(_config(teacher, **more))


def _batch(objective: VQKDObjective, count: int = 4) -> Batch:
    key = torch.arange(count) * 7919 + 1
    generator = torch.Generator().manual_seed(1)
    views = {view.name: torch.randn(count, 3, *view.size, generator=generator) for view in objective.request.views}
    return Batch(key, key, key, views)


class _TargetsGiven(nn.Module):
    """Stands for a teacher whose features a test gives."""

    note, size, mean, std = "", (32, 32), (0.5,) * 3, (0.5,) * 3

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_codes_loss_gradients_and_codebook_equal_the_authors(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, tensors = load_case("beit2", "vqkd")
    c = case["config"]
    monkeypatch.setattr(vqkd_training, "load_teacher", lambda *_, **__: _TargetsGiven(c["decoder_out_dim"]))
    objective = _small(
        "given",
        model__args=f"{{patch_size: {c['patch_size']}, embed_dim: {c['embed_dim']}, depth: {c['encoder_depth']}, "
        f"num_heads: {c['num_heads']}}}",
        views__size=c["img_size"], method__codebook_size=c["n_code"], method__code_dim=c["code_dim"],
        method__codebook_decay=c["decay"], method__decoder=f"{{depth: {c['decoder_depth']}}}",
    )  # fmt: skip
    official = weights(tensors)
    objective.load_state_dict(from_official(official))  # strictly: every weight has its place
    objective.to(dtype)
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if exact else case["tolerance"]

    def check(name: str, value: Tensor) -> None:
        stored = exact and f"out64/{name}" in tensors
        expected = tensors[f"out64/{name}" if stored else f"out/{name}"].to(dtype)
        torch.testing.assert_close(value, expected, **(tolerance if stored or not exact else case["tolerance"]))

    tokenizer = objective.tokenizer
    images = tokenizer.normalised(tensors["in/images_01"].to(dtype))
    check("preprocessed", images)
    check("to_quantizer", tokenizer.tokens(images))
    codes = tokenizer.encode(images)
    assert codes.shape == (2, 4, 4)
    assert torch.equal(codes.flatten(1), tensors["out/tokens"])
    check("decoded", objective.decode(tokenizer.codebook.weight[codes.flatten(1)]))

    loss, parts, quantized = objective.learn(images, tensors["in/target"].to(dtype))
    loss.backward()
    objective.codebook_ema.collect(quantized, torch.arange(2), 0)
    objective.after_step(PROGRESS, torch.tensor(True))
    for name, value in {"loss": loss, "quant_loss": parts["commitment"], "rec_loss": parts["teacher"]}.items():
        check(name, value)
    check("codebook_after", tokenizer.codebook.weight)
    check("cluster_size_after", objective.codebook_ema.hits)
    parameters = dict(objective.named_parameters())
    ours = list(from_official({name: torch.zeros(()) for name in c["grad_norm_params"]}))
    check("grad_norm", torch.stack([parameters[name].grad.norm() for name in ours]))  # type: ignore[union-attr]

    spared = {name for name, rule in objective.parameter_rules(None).items() if not rule.decay}
    matrices = {name for name, parameter in parameters.items() if parameter.ndim > 1}
    undecayed = case["values"]["no_weight_decay"]
    assert spared & matrices == set(from_official({n: torch.zeros(1) for n in undecayed})) & parameters.keys()


def test_every_key_of_an_official_file_has_its_place_and_no_other_is_taken() -> None:
    official = weights(load_case("beit2", "vqkd")[1])
    dropped = {"teacher_model.blocks.0.norm1.weight", "scaling_layer.shift", "loss_fn.weight"}
    with_teacher = official | {name: torch.zeros(1) for name in dropped}
    assert from_official(with_teacher).keys() == from_official(official).keys()
    with pytest.raises(BadInput, match="rel_pos_bias.table is no weight of an official VQ-KD tokenizer"):
        from_official(official | {"rel_pos_bias.table": torch.zeros(1)})


def test_an_official_tokenizer_becomes_a_folder(tmp_path: Path) -> None:
    _, tensors = load_case("beit2", "vqkd")
    tokenizer = official_tokenizer(weights(tensors), num_heads=2)
    save_tokenizer(tokenizer, tmp_path / "official", lineage={})
    read = load_tokenizer(tmp_path / "official").tokenizer
    assert torch.equal(read.encode(read.normalised(tensors["in/images_01"])).flatten(1), tensors["out/tokens"])
    assert (read.input_size, read.stride, read.codebook_size) == ((32, 32), (8, 8), 24)
    with pytest.raises(BadInput, match="no weights of an official VQ-KD tokenizer"):
        official_tokenizer({"encoder.cls_token": torch.zeros(1, 1, 32)})


def test_an_official_file_is_imported_without_running_what_is_in_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    official = {"quantize.embedding.weight": torch.randn(16, 8), "quantize.cluster_size": torch.zeros(16)}
    sizes = {
        "cls_token": (1, 1, 64), "pos_embed": (1, 17, 64), "patch_embed.proj.weight": (64, 3, 8, 8),
        "patch_embed.proj.bias": (64,), "fc_norm.weight": (64,), "fc_norm.bias": (64,),
        "blocks.0.norm1.weight": (64,), "blocks.0.norm1.bias": (64,), "blocks.0.norm2.weight": (64,),
        "blocks.0.norm2.bias": (64,), "blocks.0.attn.q_bias": (64,), "blocks.0.attn.v_bias": (64,),
        "blocks.0.attn.qkv.weight": (192, 64), "blocks.0.attn.proj.weight": (64, 64), "blocks.0.attn.proj.bias": (64,),
        "blocks.0.mlp.fc1.weight": (256, 64), "blocks.0.mlp.fc1.bias": (256,), "blocks.0.mlp.fc2.weight": (64, 256),
        "blocks.0.mlp.fc2.bias": (64,),
    }  # fmt: skip
    official |= {f"encoder.{name}": torch.randn(size) * 0.02 for name, size in sizes.items()}
    task = {"0.weight": (64, 64), "0.bias": (64,), "2.weight": (8, 64), "2.bias": (8,)}
    official |= {f"encode_task_layer.{name}": torch.randn(size) * 0.02 for name, size in task.items()}
    torch.save({"model": official, "epoch": 100}, tmp_path / "vqkd_encoder.pth")
    done = CliRunner().invoke(cli.app, ["import", str(tmp_path / "vqkd_encoder.pth"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "VQ-KD tokenizer of BEiT v2" in done.output
    read = load_tokenizer(tmp_path / "out")
    assert (read.tokenizer.input_size, read.tokenizer.codebook_size) == ((32, 32), 16)
    assert read.lineage["licences"] == ["MIT"]


def test_a_run_does_not_depend_on_accumulation(teacher: Path) -> None:
    def make() -> VQKDObjective:
        return VQKDObjective.build(_config(teacher, model__drop_path_rate=0.3, method__revive_after=4))

    assert_the_same_however_cut(make)


def test_the_loss_falls_on_one_batch(teacher: Path) -> None:
    objective = _small(teacher, method__revive_after="null")
    batch, losses = _batch(objective, 8), []
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for step in range(60):
        progress = Progress(step, 60, 5.0, 0)
        objective.prepare([batch], progress)
        found = objective(batch, None, progress)
        found["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            objective.after_step(progress, torch.tensor(True))
        losses.append(float(found["loss"].detach()))
        assert losses[-1] == pytest.approx(float((found["teacher"] + found["commitment"]).detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_every_trained_weight_has_a_gradient_and_the_teacher_has_none(teacher: Path) -> None:
    objective = _small(teacher).train()
    assert not objective.teacher.training
    objective(_batch(objective), None, PROGRESS)["loss"].backward()
    untouched = {name for name, parameter in objective.named_parameters() if parameter.grad is None}
    assert untouched
    assert all(name.startswith("teacher.") for name in untouched)


def test_the_teacher_is_no_part_of_a_checkpoint_and_loading_one_leaves_it_alone(teacher: Path) -> None:
    objective = _small(teacher)
    state = objective.state_dict()
    assert not any("teacher" in name for name in state)
    before = {name: value.clone() for name, value in objective.teacher.network.state_dict().items()}
    objective.load_state_dict(state)
    after = objective.teacher.network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert objective.frozen_inputs() == {"teacher": objective.parents()[0]["weights_sha256"]}


def test_the_teacher_sees_the_same_pixels_normalised_as_it_is_used_to(teacher: Path) -> None:
    objective = _small(teacher)
    pixels = torch.rand(2, 3, 32, 32)
    key = torch.arange(2)
    batch = Batch(key, key, key, {"image": objective.tokenizer.normalised(pixels)})
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in ((0.4, 0.45, 0.5), (0.2, 0.25, 0.3)))
    model = load_teacher(str(teacher), grid=(4, 4), crop=(32, 32)).network
    expected = model.forward_features((pixels - mean) / std)[:, 1:]
    torch.testing.assert_close(objective.targets(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", ["[48, 48]", "[32, 64]"])
def test_a_teacher_of_another_size_or_patch_sees_the_crop_at_the_grid_of_codes(tmp_path: Path, size: str) -> None:
    taught = _small(save_teacher(tmp_path / "encoder", size=(48, 48), patch=16), views__size=size)
    rows, columns = taught.grid
    assert taught.teacher.size == (rows * 16, columns * 16)
    assert [view.window_of for view in taught.request.views] == [None, "image"]
    assert taught.request.views[1].mean == (0.4, 0.45, 0.5)
    note = f"sees each crop at {rows * 16}×{columns * 16} px (it was trained at 48×48)"
    assert any(note in line for line in taught.notes)
    assert taught.targets(_batch(taught)).shape == (4, rows * columns, 32)


@pytest.mark.parametrize(
    ("name", "args", "seen"),
    [
        ("resnet18", {}, 32),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, 32),
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2), "window_size": 4},
            64,
        ),
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2, "class_token": False}, 64),
        ("vit_small_patch14_reg4_dinov2", {"depth": 1, "embed_dim": 32, "num_heads": 2}, 56),
        ("beit_base_patch16_224", {"depth": 1, "embed_dim": 32, "num_heads": 2}, 64),
    ],
)
def test_any_timm_model_can_teach(name: str, args: dict[str, Any], seen: int, tmp_path: Path) -> None:
    size = (56, 56) if "patch14" in name else (64, 64)
    model = create_backbone(name, img_size=size, args=args)
    wanted = Preprocessing((0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, size)
    save_encoder(model, tmp_path / "encoder", preprocessing=wanted, lineage={})
    objective = _small(tmp_path / "encoder")
    found = objective(_batch(objective), None, PROGRESS)
    assert torch.isfinite(found["loss"])
    assert objective.teacher.size == (seen, seen)
    assert ("interpolated" in objective.notes[-1]) == (name.partition("_")[0] in ("resnet18", "convnext", "swin"))


def test_a_tokenizer_of_another_size_of_picture_is_refused_unless_it_resamples(teacher: Path) -> None:
    with pytest.raises(BadInput, match=r"takes 32×32 px, not 48×48; train it with views.size=\[48,48\]"):
        _small(teacher).tokenizer.grid((48, 48))
    with pytest.raises(BadInput, match=r"has 4×4 codes, not 6×6; train it with views.size=\[48,48\]"):
        _small(teacher).tokenizer.input_for((6, 6))
    args = "{patch_size: 8, embed_dim: 32, depth: 1, num_heads: 2, dynamic_img_size: true}"
    flexible = _small(teacher, model__args=args).tokenizer
    assert flexible.input_for((6, 6)) == (48, 48)
    assert flexible.encode(torch.randn(1, 3, 48, 48)).shape == (1, 6, 6)


def test_codes_do_not_flip_under_autocast(teacher: Path) -> None:
    tokenizer = _small(teacher).tokenizer
    images = torch.randn(8, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), tokenizer.encode(images.float()))
        codes = tokenizer.encode(images)
    assert torch.equal(codes, tokenizer.encode(images))


def test_pictures_show_the_crop_and_its_codes(teacher: Path) -> None:
    objective = _small(teacher).eval()
    (picture,) = objective.pictures(_batch(objective), PROGRESS).values()
    assert picture.dtype == torch.uint8
    assert picture.shape[:3] == (4, 3, 32)


def _run(config: Config) -> Path:
    command_of("tokenizer").run(config)
    return config.run.dir


def _short(teacher: Path, small_shards: Path, run_dir: Path, **more: Any) -> Config:
    own = {
        "run__dir": run_dir, "data__path": small_shards, "data__workers": 0, "run__steps": 12, "run__log_every": 1,
        "run__save_every": 4, "optim__warmup_steps": 1,
    }  # fmt: skip
    return _config(teacher, **(own | more))


def test_a_run_ends_in_a_folder_of_the_tokenizer_alone(
    teacher: Path, small_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = _run(_short(teacher, small_shards, tmp_path / "run"))
    said = capsys.readouterr()
    assert f"teacher {teacher}: sees each crop at 32×32 px" in said.out + said.err
    read = load_tokenizer(folder / "tokenizer")
    parts = {name.partition(".")[0] for name in load_file(folder / "tokenizer/model.safetensors")}
    assert parts == {"encoder", "encode_task_layer", "codebook"}
    assert read.tokenizer.encode(torch.randn(2, 3, 32, 32)).shape == (2, 4, 4)
    assert read.lineage["parents"][0]["weights_sha256"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["health/codebook_usage"] <= 1 for line in lines[1:])  # the first step only places the codes
    assert all(1 <= line["health/codebook_perplexity"] <= 24 for line in lines[1:])


def test_going_on_with_another_teacher_is_refused_and_with_the_same_elsewhere_is_not(
    teacher: Path, small_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    _run(_short(teacher, small_shards, run))
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(BadInput, match="take another run.dir"):
        _run(_short(other, small_shards, run))
    _run(_short(save_teacher(tmp_path / "the same"), small_shards, run))


def test_kmeans_waits_for_the_first_step_that_fp16_can_scale(
    teacher: Path, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0**22)  # the first steps overflow
    more = {"compute__precision": "fp16", "compute__checkpoint_activations": True}
    folder = _run(_short(teacher, small_shards, tmp_path / "run", **more, optim__ema_decay=0.9))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["skipped_steps"] == 1
    assert lines[-1]["skipped_steps"] < 12
    state = load_file(folder / "checkpoints/step-12/model.safetensors")
    assert state["codebook_ema.started"] == 1
    assert lines[-1]["health/codebook_usage"] > 0


@pytest.mark.parametrize("times", [1, 2])
def test_a_codebook_that_is_not_finite_sends_the_run_back_to_the_last_good_checkpoint(
    times: int, teacher: Path, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    left = [times]
    moves = VQKDObjective.after_step

    def spoil(self: VQKDObjective, progress: Progress, finite: Tensor) -> None:
        moves(self, progress, finite)
        if progress.step == 5 and left[0]:
            left[0] -= 1
            self.tokenizer.codebook.weight[3] = torch.nan

    monkeypatch.setattr(VQKDObjective, "after_step", spoil)
    config = _short(teacher, small_shards, tmp_path / "run", run__rewind_after=2)
    if times == 2:
        with pytest.raises(BadInput, match="the run has gone back once already, from step 8 to 4: it stops"):
            _run(config)
        return
    tokenizer = load_tokenizer(_run(config) / "tokenizer").tokenizer
    said = capsys.readouterr()
    assert "Going back to the checkpoint of step 4" in said.out + said.err
    assert all(torch.isfinite(value).all() for value in tokenizer.state_dict().values())


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"method__teacher": "null"}, "method.teacher is null, and this tokenizer learns from a teacher: train one"),
        ({"method__teacher": "no/such"}, "no/such is no encoder folder.*foreseen pretrain mae_cpu_minutes"),
        ({"method__teacher": "timm:no_such_vit"}, "names no model of timm"),
        ({"method__decoder": "{embed_dim: 32, num_heads: 5}"}, "num_heads 5 does not divide"),
        ({"method__codebook_size": 1}, "method.codebook_size .* greater than or equal to 2, got 1"),
        ({"method__codebook_sise": 8}, "did you mean 'method.codebook_size'"),
        ({"model__name": "resnet18", "model__args": "null"}, "resnet18 is no plain ViT"),
        ({"views__size": 36}, "views.size"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(overrides: dict[str, Any], sentence: str, teacher: Path) -> None:
    with pytest.raises(BadInput, match=sentence):
        _small(teacher, **overrides)


def test_a_vocabulary_that_the_data_cannot_fill_is_warned_of_with_the_numbers(teacher: Path) -> None:
    config = _config(teacher, method__codebook_size=700).with_length(37)
    notes = VQKDObjective.build(config).notes
    assert notes[0].startswith("method.codebook_size 700 is more than the 592 patches of the data can fill")
    notes = VQKDObjective.build(_config(teacher, method__codebook_size=300).with_length(37)).notes
    assert notes[0].startswith("method.codebook_size 300 is more than the 256 patches of a step")
    assert len(VQKDObjective.build(_config(teacher).with_length(37)).notes) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_runs(name: str, recipe: Callable[..., list[str]], teacher: Path, tmp_path: Path) -> None:
    overrides = recipe(
        run__steps=2, run__epochs="null", optim__warmup_steps=1, optim__warmup_epochs="null", batch__global_size=8,
        method__teacher=teacher, method__codebook_size=16,
    )  # fmt: skip
    folder = _run(load_recipe("tokenizer", name, overrides))
    assert load_tokenizer(folder / "tokenizer").tokenizer.codebook_size == 16


def test_the_published_recipe_is_built_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = _TargetsGiven(768)
    stand_in.size = (224, 224)
    monkeypatch.setattr(vqkd_training, "load_teacher", lambda *_, **__: stand_in)
    config = load_recipe("tokenizer", "vqkd_b16")
    with torch.device("meta"):
        objective = VQKDObjective.build(config)
    block = 12 * 768**2 + 13 * 768
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in objective.named_children()}
    vit = 85_798_656  # tests/test_recipes.py
    layer = 768 * 768 + 768
    assert sizes["tokenizer"] == vit + layer + 768 * 32 + 32
    # Patch 1 on the map of 32 channels, position table and CLS token, blocks, norm.
    depth = len(objective.decoder.blocks)
    assert sizes["decoder"] == 32 * 768 + 768 + 197 * 768 + 768 + depth * block + 2 * 768
    assert sizes["decode_task_layer"] == 2 * layer
    assert objective.tokenizer.codebook.weight.shape == (8192, 32)
    assert objective.tokenizer.mean == objective.tokenizer.std == (0.5, 0.5, 0.5)
    optim = config.optim
    peak = scaled_lr(optim.base_lr, optim.lr_scaling, config.batch.global_size, optim.lr_reference_batch)
    assert (config.batch.global_size, config.run.epochs, optim.warmup_epochs, depth) == (512, 100, 10, 3)
    assert (peak, optim.betas, optim.weight_decay) == (pytest.approx(2e-4), (0.9, 0.99), 1e-4)


def test_a_teacher_that_is_no_map_of_places_is_refused(tmp_path: Path) -> None:
    from foreseen.handoff.frozen import FrozenEncoder

    class Vector(nn.Module):
        def forward_features(self, images: Tensor) -> Tensor:
            return images.mean((2, 3))

    seen = Preprocessing((0.5,) * 3, (0.5,) * 3, "bicubic", 0.875, (32, 32))
    with pytest.raises(BadInput, match="method.teacher vectors gives no features of places"):
        Teacher(FrozenEncoder(Vector(), seen, {}, {"source": "vectors"}, ""), grid=(4, 4), crop=(32, 32))
