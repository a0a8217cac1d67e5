"""Finite scalar quantisation: every code is reached, numbered and found again; rounding has the gradient 1."""

from itertools import product
from typing import Any

import pytest
import torch

from foreseen.commands.verbs import load_recipe
from foreseen.data.batch import Batch
from foreseen.engine.objective import Progress
from foreseen.errors import BadInput
from foreseen.tokenizers.fsq import FSQ, FSQObjective, Levels
from tests.engine.driver import assert_the_same_however_cut, drive

PROGRESS = Progress(5, 20, 5.0, 0)
NETWORK = {"groups": 3, "blocks": 1, "width": 8, "decoder_input": 8, "residual_gain": 0.5}
PAPERS = {(8, 6, 5): 240, (8, 8, 8): 512, (8, 5, 5, 5): 1000, (7, 5, 5, 5, 5): 4375, (8, 8, 8, 6, 5): 15_360}


def _small(**more: Any) -> FSQObjective:
    torch.manual_seed(0)
    overrides = {
        "run.dir": "none", "views.size": 16, "method.levels": "[4, 3, 2]",
        "method.network": "{groups: 3, blocks: 1, width: 8, decoder_input: 8, residual_gain: 0.5, standardise: false}",
        **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    config = load_recipe("tokenizer", "fsq_cpu_minutes", [f"{key}={value}" for key, value in overrides.items()])
    return FSQObjective.build(config)


def _batch(objective: FSQObjective, dtype: torch.dtype = torch.float64) -> Batch:
    key = torch.arange(4) * 7919 + 1
    pixels = torch.rand(4, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype)
    pixels = pixels.repeat_interleave(4, 2).repeat_interleave(4, 3)
    return Batch(key, key, key, {"image": objective.tokenizer.normalised(pixels)})


@pytest.mark.parametrize("levels", PAPERS)
def test_the_papers_levels_make_so_many_codes(levels: tuple[int, ...]) -> None:
    assert FSQ(levels, (16, 16), NETWORK).codebook_size == PAPERS[levels]


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 7, 8])
def test_each_number_takes_exactly_its_levels(levels: int) -> None:
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64).view(1, 1, 1, -1)
    reached = (Levels([levels]).quantise(z) * (levels // 2)).round().unique()
    low = -(levels // 2)
    assert reached.tolist() == list(range(low, low + levels))


@pytest.mark.parametrize("levels", [5, 8])
def test_the_bound_is_the_papers(levels: int) -> None:
    """Appendix A.1's numbers, worked out for one number of each kind."""
    z = torch.tensor([-100.0, 0.0, 100.0], dtype=torch.float64).view(1, 1, 1, 3)
    half = (levels - 1) * 0.999 / 2
    offset = 0.0 if levels % 2 else 0.5
    middle = torch.tensor(offset / half, dtype=torch.float64).tan().tanh() * half - offset
    expected = [-half - offset, float(middle), half - offset]
    assert Levels([levels]).bound(z).flatten().tolist() == pytest.approx(expected)


def test_every_combination_has_a_number_of_its_own_and_is_found_again() -> None:
    levels = Levels([4, 3, 5])
    every = [
        [d - size // 2 for d, size in zip(digits, (4, 3, 5), strict=True)] for digits in product(*map(range, (4, 3, 5)))
    ]
    quantised = torch.tensor(every, dtype=torch.float64).T[None, :, None] / torch.tensor([2.0, 1, 2]).view(-1, 1, 1)
    codes = levels.codes(quantised)
    assert sorted(codes.flatten().tolist()) == list(range(60))
    assert torch.equal(levels.combinations(codes, torch.float64), quantised)
    assert levels.codes(torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1) - 1).item() == 2 + 0 * 4 + 0 * 12


def test_rounding_has_the_gradient_of_the_bound() -> None:
    levels = Levels([8, 5])
    z = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    (ours,) = torch.autograd.grad((levels.quantise(z) * weight).sum(), z)
    scale = torch.tensor([4.0, 2.0]).view(-1, 1, 1)
    (bounds,) = torch.autograd.grad((levels.bound(z) / scale * weight).sum(), z)
    torch.testing.assert_close(ours, bounds)
    assert ours.abs().min() > 0


def test_what_training_shows_the_decoder_is_what_codes_are_decoded_from() -> None:
    objective = _small().double()
    tokenizer, images = objective.tokenizer, _batch(objective).images["image"]
    quantised = tokenizer.quantised(images)
    torch.testing.assert_close(
        tokenizer.levels.combinations(tokenizer.encode(images), torch.float64), quantised.detach()
    )


def test_the_gradient_of_the_decoder_is_that_of_finite_differences() -> None:
    objective = _small().double()
    batch = _batch(objective)
    loss = objective(batch, None, PROGRESS)["loss"]
    loss.backward()
    parameter = objective.tokenizer.decoder.blocks.input.w
    direction, step = torch.randn_like(parameter), 1e-6
    with torch.no_grad():
        parameter += step * direction
        up = objective(batch, None, PROGRESS)["loss"]
        parameter -= 2 * step * direction
        down = objective(batch, None, PROGRESS)["loss"]
    assert float((up - down) / (2 * step)) == pytest.approx(float((parameter.grad * direction).sum()), rel=1e-5)
    assert objective.tokenizer.encoder.blocks.input.w.grad.abs().sum() > 0


def test_the_loss_falls_on_one_batch_and_codes_differ() -> None:
    objective = _small()
    batch = _batch(objective, torch.float32)
    optimizer = torch.optim.Adam(objective.parameters(), lr=3e-3)
    losses = []
    for step in range(40):
        progress = Progress(step, 40, 5.0, 0)
        objective.prepare([batch], progress)
        loss = objective(batch, None, progress)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step(progress, torch.tensor(True))
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.15
    assert float(objective.health()["code_perplexity"]) > 4


def test_a_run_does_not_depend_on_accumulation() -> None:
    def make() -> FSQObjective:
        return _small(method__network="{groups: 3, blocks: 1, width: 8, decoder_input: 8, standardise: true}")

    assert_the_same_however_cut(make)


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    def make() -> FSQObjective:
        return _small(method__network="{groups: 3, blocks: 1, width: 8, decoder_input: 8, standardise: true}")

    before, after = (drive(make, 8, steps=steps, spoil_step=2).state for steps in (2, 3))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("method.levels=[8,1]", r"method\.levels \[8, 1\]: each must be at least 2"),
        ("method.levels=[]", r"method\.levels \[\]: each must be at least 2"),
        ("method.levels=[300,300,300]", "product at most 16,777,216"),
        ("views.size=18", "a code for each 4×4 px takes no 18×18 px"),
        ("views.std=[0.5,0.5,0.5]", r"views\.mean and views\.std must be null"),
    ],
)
def test_bad_options_are_a_sentence(override: str, sentence: str) -> None:
    key, value = override.split("=", 1)
    with pytest.raises(BadInput, match=sentence):
        _small(**{key.replace(".", "__"): value})
