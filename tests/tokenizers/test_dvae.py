"""The discrete VAE computes what DALL·E's published networks compute, and its training keeps what the paper says."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.device_keys import keyed_uniform
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.tokenizers.dvae import (
    DVAE,
    DVAEObjective,
    cosine,
    divergence_to_uniform,
    from_official,
    straight_through,
)
from foreseen.tokenizers.dvae_networks import Standardise
from foreseen.tokenizers.logit_laplace import negative_log_likelihood, pixels_of
from tests.engine.driver import assert_the_same_however_cut, drive
from tests.golden_cases import load_case, weights

PROGRESS = Progress(5, 20, 5.0, 0)
NETWORK = {"groups": 3, "blocks": 1, "width": 8, "decoder_input": 8, "residual_gain": 0.5}


def _small(**more: Any) -> DVAEObjective:
    torch.manual_seed(0)
    overrides = {
        "run.dir": "none", "views.size": 16, "method.codebook_size": 24, "method.balance_rate": 0.1,
        "method.kl_weight": 6.6,
        "method.network": "{groups: 3, blocks: 1, width: 8, decoder_input: 8, residual_gain: 0.5, standardise: false}",
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    config = load_recipe("tokenizer", "dvae_cpu_minutes", [f"{key}={value}" for key, value in overrides.items()])
    return DVAEObjective.build(config)


def _batch(objective: DVAEObjective, count: int = 4, dtype: torch.dtype = torch.float64) -> Batch:
    key = torch.arange(count) * 7919 + 1
    pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return Batch(key, key, key, {"image": objective.tokenizer.normalised(pixels)})


@pytest.fixture(scope="module")
def official() -> DVAE:
    encoder, decoder = (weights(load_case("dalle", case)[1]) for case in ("encoder", "decoder"))
    return from_official(encoder, decoder)


def test_logits_and_codes_equal_the_authors(official: DVAE) -> None:
    case, tensors = load_case("dalle", "encoder")
    images = official.normalised(tensors["in/images_01"])
    torch.testing.assert_close(images, tensors["out/mapped"], **case["tolerance"])
    torch.testing.assert_close(official.logits(images), tensors["out/logits"], **case["tolerance"])
    assert torch.equal(official.encode(images), tensors["out/indices"])
    assert official.encoder.blocks.group_1.block_1.gain == case["values"]["post_gain"]
    assert official.grid((32, 32)) == (case["values"]["tokens_per_side"],) * 2


def test_the_reconstruction_equals_the_authors(official: DVAE) -> None:
    case, tensors = load_case("dalle", "decoder")
    codes = tensors["in/indices"]
    one_hot = torch.nn.functional.one_hot(codes, official.codebook_size).movedim(3, 1).float()
    torch.testing.assert_close(official.decoder(one_hot), tensors["out/x_stats"], **case["tolerance"])
    torch.testing.assert_close(official.decode(codes), tensors["out/reconstruction"], **case["tolerance"])


def test_pixels_are_mapped_as_the_authors_map_them(official: DVAE) -> None:
    case, tensors = load_case("dalle", "pixels")
    torch.testing.assert_close(official.normalised(tensors["in/x"]), tensors["out/mapped"], **case["tolerance"])
    inside = tensors["in/y"].clamp(1e-4, 1 - 1e-4)  # what a sigmoid can be
    parameters = torch.cat([inside.logit(), torch.zeros_like(inside)], dim=1)
    expected = torch.where((tensors["in/y"] == inside), tensors["out/unmapped"], (inside > 0.5).float())
    torch.testing.assert_close(pixels_of(parameters), expected, **case["tolerance"])


def test_official_weights_that_do_not_fit_are_refused_with_the_names() -> None:
    encoder, decoder = (weights(load_case("dalle", case)[1]) for case in ("encoder", "decoder"))
    with pytest.raises(BadInput, match=r"encoder\.blocks\.output\.conv\.w is missing"):
        from_official({k: v for k, v in encoder.items() if k != "blocks.output.conv.w"}, decoder)
    with pytest.raises(BadInput, match=r"encoder\.blocks\.extra\.w is left over"):
        from_official(encoder | {"blocks.extra.w": torch.zeros(1)}, decoder)
    with pytest.raises(BadInput, match="no weights of DALL"):
        from_official(decoder, encoder)


def test_the_published_recipe_is_the_published_network() -> None:
    config = load_recipe("tokenizer", "dvae_dalle", ["run.dir=none"])
    with torch.device("meta"):
        tokenizer = DVAEObjective.build(config).tokenizer
    # What arithmetic gives for dall_e/encoder.py and decoder.py at their defaults.
    assert sum(p.numel() for p in tokenizer.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in tokenizer.decoder.parameters()) == 43_829_766
    assert tokenizer.grid((256, 256)) == (32, 32)
    assert tokenizer.grid((112, 112)) == (14, 14)


def test_the_likelihood_is_a_density() -> None:
    x = torch.linspace(0, 1, 200_001, dtype=torch.float64)[1:-1]
    parameters = torch.tensor([0.4, -0.7], dtype=torch.float64).repeat_interleave(3).view(1, 6, 1, 1)
    nll = negative_log_likelihood(x.view(1, 1, 1, -1).expand(1, 3, 1, -1), parameters.expand(1, 6, 1, len(x)))
    assert float((-nll[0, 0, 0]).exp().sum() * (x[1] - x[0])) == pytest.approx(1.0, abs=1e-4)


def test_the_loss_is_the_evidence_bound_of_a_picture_divided_by_its_values() -> None:
    objective = _small(method__kl_steps=1).double()
    batch = _batch(objective)
    out = objective(batch, None, PROGRESS)
    images = batch.images["image"]
    logits = objective.tokenizer.logits(images)
    q = logits.softmax(dim=1)
    nll = negative_log_likelihood(
        images, objective.tokenizer.decoder(objective.relaxed(logits, batch.key, PROGRESS))
    ).sum(dim=(1, 2, 3))
    kl = (q * (q * q.shape[1]).log()).sum(dim=(1, 2, 3))
    torch.testing.assert_close(out["loss"], ((nll + 6.6 * kl) / images[0].numel()).mean())


def test_the_divergence_does_not_grow_with_batch_or_picture() -> None:
    log_q = torch.randn(1, 5, 1, 1, dtype=torch.float64).log_softmax(dim=1)
    many = log_q.expand(7, 5, 3, 4)
    torch.testing.assert_close(divergence_to_uniform(many).mean(), divergence_to_uniform(log_q).mean())
    assert float(divergence_to_uniform(torch.zeros(1, 5, 1, 1).log_softmax(1))) == pytest.approx(0, abs=1e-6)


def test_schedules_are_the_papers_and_functions_of_the_step() -> None:
    objective = _small(method__temperature_steps=150_000, method__kl_steps=5_000, run__steps=3_000_000)
    at = [Progress(step, 3_000_000, 1.0, 0) for step in (0, 75_000, 150_000, 2_000_000)]
    assert [objective.temperature(p) for p in at] == pytest.approx([1, (1 + 1 / 16) / 2, 1 / 16, 1 / 16])
    at = [Progress(step, 3_000_000, 1.0, 0) for step in (0, 2_500, 5_000, 9_999)]
    weight = objective.options.kl_weight
    assert [objective.kl_weight(p) for p in at] == pytest.approx([0, weight / 2, weight, weight])
    assert cosine(1, 2, 3.0, 3.0) == 3.0


def test_without_lengths_the_schedules_scale_with_the_run() -> None:
    objective = _small(method__temperature_steps="null", method__kl_steps="null")
    for total in (40, 4000):
        assert objective.temperature(Progress(3 * total // 4, total, 1.0, 0)) == pytest.approx(1 / 16)
        assert objective.kl_weight(Progress(total // 10, total, 1.0, 0)) == objective.options.kl_weight
        assert objective.kl_weight(Progress(total // 20, total, 1.0, 0)) < objective.options.kl_weight


def test_the_noise_is_that_of_a_sample_however_a_batch_is_cut() -> None:
    objective = _small().double()
    batch = _batch(objective)
    logits = objective.tokenizer.logits(batch.images["image"])
    whole = objective.relaxed(logits, batch.key, PROGRESS)
    parts = [objective.relaxed(logits[i : i + 1], batch.key[i : i + 1], PROGRESS) for i in range(4)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, objective.relaxed(logits, batch.key + 1, PROGRESS))


def test_the_noise_is_gumbels_and_always_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = _small(method__temperature="[1.0, 1.0]").double()
    key = torch.arange(2000) * 7919 + 1
    logits = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64).view(1, 3, 1, 1).expand(2000, 3, 4, 4)
    chosen = objective.relaxed(logits, key, PROGRESS).argmax(dim=1).flatten().bincount(minlength=3) / (2000 * 16)
    expected = logits[0, :, 0, 0].softmax(dim=0)  # the largest of logits plus Gumbel noise has the softmax's odds
    torch.testing.assert_close(chosen, expected.float(), rtol=0, atol=0.01)
    for edge in (0.0, 1 - 2**-24):  # the ends of what is drawn
        monkeypatch.setattr(
            "foreseen.tokenizers.dvae.keyed_uniform", lambda key, stream, n, edge=edge: torch.full((len(key), n), edge)
        )
        assert objective.relaxed(logits.float()[:1], key[:1], PROGRESS).isfinite().all()
    assert float(keyed_uniform(key, "x", 10).max()) <= 1 - 2**-24


def test_a_hard_choice_is_one_code_with_the_gradient_of_the_relaxed_one() -> None:
    logits = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    hard = straight_through(logits.softmax(dim=1))
    torch.testing.assert_close(hard.detach().sum(dim=1), torch.ones(2, 3, 3, dtype=torch.float64))
    assert torch.equal(hard.detach().argmax(dim=1), logits.argmax(dim=1))
    (ours,) = torch.autograd.grad((hard * weight).sum(), logits)
    (relaxed,) = torch.autograd.grad((logits.softmax(dim=1) * weight).sum(), logits)
    torch.testing.assert_close(ours, relaxed)


def test_the_gradient_is_that_of_finite_differences() -> None:
    objective = _small(method__kl_steps=1).double()
    batch = _batch(objective, 2)
    loss = objective(batch, None, PROGRESS)["loss"]
    loss.backward()
    for parameter in (objective.tokenizer.encoder.blocks.output.conv.w, objective.tokenizer.decoder.blocks.input.w):
        direction = torch.randn_like(parameter)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            up = objective(batch, None, PROGRESS)["loss"]
            parameter -= 2 * step * direction
            down = objective(batch, None, PROGRESS)["loss"]
            parameter += step * direction
        assert float((up - down) / (2 * step)) == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5)


@pytest.mark.parametrize("finite", [True, False])
def test_balancing_moves_each_bias_against_how_often_its_code_came(finite: bool) -> None:
    objective = _small().double()
    batch, bias = _batch(objective), objective.tokenizer.encoder.last_bias
    before = bias.detach().clone()
    progress = Progress(10, 20, 5.0, 0, micro_batches=2)
    objective.prepare([batch, batch], progress)
    for _ in range(2):
        objective(batch, None, progress)["loss"].backward()
    assert torch.equal(bias, before)
    with torch.no_grad():
        objective.after_step(progress, torch.tensor(finite))
    assert bias.grad is None
    moved = bias.detach() - before
    bias.data.copy_(before)
    counts = objective.tokenizer.encode(batch.images["image"]).flatten().bincount(minlength=24)
    way = torch.where(counts < counts.double().mean(), 0.05, -0.05).double()  # half of 0.1: half of the run is over
    torch.testing.assert_close(moved, way if finite else torch.zeros_like(way))


def test_without_balancing_the_bias_is_trained() -> None:
    assert _small(method__balance_rate=0).tokenizer.encoder.last_bias.requires_grad
    assert not _small().tokenizer.encoder.last_bias.requires_grad


def test_health_counts_the_codes_of_the_whole_step() -> None:
    objective = _small(method__balance_rate=0).double()
    batch = _batch(objective)
    assert objective.health() == {}
    progress = Progress(0, 20, 5.0, 0, micro_batches=2)
    objective.prepare([batch, batch], progress)
    objective(batch, None, progress)
    objective(batch, None, progress)
    objective.after_step(progress, torch.tensor(True))
    counts = objective.tokenizer.encode(batch.images["image"]).flatten().bincount(minlength=24).double()
    share = counts[counts > 0] / counts.sum()
    assert float(objective.health()["codes_used"]) == pytest.approx(float((counts > 0).double().mean()))
    assert float(objective.health()["code_perplexity"]) == pytest.approx(math.exp(-(share * share.log()).sum()))


def test_codes_are_those_of_float32_whatever_the_autocast() -> None:
    tokenizer = DVAE(24, (16, 16), NETWORK)
    images = tokenizer.normalised(torch.rand(2, 3, 16, 16))
    plain = tokenizer.encode(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(images), plain)
        assert tokenizer.logits(images).dtype == torch.float32


def test_the_loss_falls_on_one_batch() -> None:
    objective = _small(method__kl_weight=0.1)
    colours = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1)).repeat_interleave(4, 2)
    images = objective.tokenizer.normalised(colours.repeat_interleave(4, 3))
    batch = replace(_batch(objective), images={"image": images})
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        loss = objective(batch, None, Progress(step, 40, 5.0, 0))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.15


def test_pictures_are_original_and_reconstruction() -> None:
    objective = _small()
    (picture,) = objective.pictures(_batch(objective, dtype=torch.float32), PROGRESS).values()
    assert picture.shape == (4, 3, 16, 32)
    assert picture.dtype == torch.uint8


def test_a_run_does_not_depend_on_accumulation() -> None:
    def make() -> DVAEObjective:
        return _small(method__network="{groups: 3, blocks: 1, width: 8, decoder_input: 8, standardise: true}")

    assert_the_same_however_cut(make)


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    def make() -> DVAEObjective:
        return _small(method__network="{groups: 3, blocks: 1, width: 8, decoder_input: 8, standardise: true}")

    before, after = (drive(make, 8, steps=steps, spoil_step=2).state for steps in (2, 3))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.temperature=[1.0,0.0]", r"method\.temperature must be two positive numbers, got \[1\.0, 0\.0\]"),
        ("views.size=18", "a code for each 4×4 px takes no 18×18 px"),
        ("views.mean=[0.5,0.5,0.5]", r"views\.mean and views\.std must be null"),
        ("method.codebook_size=1", r"method\.codebook_size.*greater than or equal to 2"),
        ("method.network.width=6", r"method\.network\.width.*multiple of 4"),
        ("model.name=vit_tiny_patch16_224", "method dvae has networks of its own"),
    ],
)
def test_bad_options_are_a_sentence(override: str, sentence: str) -> None:
    key, value = override.split("=", 1)
    with pytest.raises(BadInput, match=sentence):
        _small(**{key.replace(".", "__"): value})


def test_standardised_features_have_the_statistics_of_the_steps_before() -> None:
    standard = Standardise(3).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64) * 2 + 1
    standard.begin()
    torch.testing.assert_close(standard(x), x, rtol=1e-4, atol=0)  # nothing is known yet
    standard.begin()
    halves = [standard(part) for part in x.chunk(2)]
    standard.move(0, torch.tensor(True))
    torch.testing.assert_close(torch.cat(halves), x, rtol=1e-4, atol=0)
    assert torch.allclose(standard.mean, x.mean(dim=(0, 2, 3)))
    assert torch.allclose(standard.variance, x.var(dim=(0, 2, 3), unbiased=False))
    out = standard.eval()(x)
    assert torch.allclose(out.mean(dim=(0, 2, 3)), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(out.var(dim=(0, 2, 3), unbiased=False), torch.ones(3, dtype=torch.float64), atol=1e-4)
    mean = standard.mean.clone()
    standard.train()(x + 1)
    standard.move(50, torch.tensor(True))
    assert torch.allclose(standard.mean, mean + 0.1)
    standard(x)
    standard.move(51, torch.tensor(False))
    assert torch.allclose(standard.mean, mean + 0.1)
