"""The codebook computes and moves as the authors' does, by the global batch alone, and never takes up a bad step."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foreseen.tokenizers.choose_tokens import choose_tokens
from foreseen.tokenizers.codebook_ema import CodebookEMA
from foreseen.tokenizers.cosine_kmeans import cosine_kmeans
from foreseen.tokenizers.quantizer import Codebook
from tests.golden_cases import load_case, weights

YES, NO = torch.tensor(True), torch.tensor(False)


def _pair(size: int = 12, dim: int = 4, **more: int | float | None) -> tuple[Codebook, CodebookEMA]:
    torch.manual_seed(0)
    options = {"decay": 0.9, "kmeans_iterations": 0, "revive_after": None} | more
    return Codebook(size, dim).double(), CodebookEMA(size, **options).double()  # type: ignore[arg-type]


def _images(count: int = 16, places: int = 6, dim: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens [B, L, D] in float64, and a key for each image."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(count, places, dim, generator=generator, dtype=torch.float64)
    return tokens, torch.arange(count) * 7919 + seed


def _step(
    codebook: Codebook, ema: CodebookEMA, tokens: Tensor, key: Tensor, step: int, *, cuts: int = 1, finite: Tensor = YES
) -> None:  # fmt: skip
    ema.begin()
    for part, keys in zip(tokens.chunk(cuts), key.chunk(cuts), strict=True):
        ema.collect(codebook(part), keys, step)
    ema.move(codebook, step, finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_training_steps_equal_the_authors(dtype: torch.dtype) -> None:
    case, tensors = load_case("beit2", "quantizer")
    c = case["config"]
    exact = dtype == torch.float64
    tolerance = {"rtol": 1e-8, "atol": 1e-10} if exact else case["tolerance"]
    codebook = Codebook(c["n_embed"], c["dim"])
    ema = CodebookEMA(c["n_embed"], decay=c["decay"], kmeans_iterations=10, revive_after=None)
    given = weights(tensors)
    codebook.weight.copy_(given["embedding.weight"])
    ema.hits.copy_(given["cluster_size"])
    ema.started.copy_(given["embedding.initted"].squeeze())
    codebook.to(dtype), ema.to(dtype)

    def expected(name: str) -> Tensor:
        return tensors[f"out64/{name}" if exact and f"out64/{name}" in tensors else f"out/{name}"].to(dtype)

    def as_map(tokens: Tensor) -> Tensor:
        return tokens.transpose(1, 2).unflatten(2, (3, 3))

    for call in range(2):
        z = tensors["in/z"][call].to(dtype).requires_grad_()
        quantized = codebook(z.flatten(2).transpose(1, 2))
        loss = c["beta"] * quantized.commitment
        (loss + (as_map(quantized.values) * tensors["in/w"].to(dtype)).sum()).backward()
        ema.begin()
        ema.collect(quantized, torch.arange(len(z)), call)
        ema.move(codebook, call, YES)
        assert torch.equal(quantized.codes.flatten(), tensors[f"out/indices.{call}"])
        found = {
            "z_q": as_map(quantized.values), "loss": loss, "grad_z": z.grad, "codebook": codebook.weight,
            "cluster_size": ema.hits,
        }  # fmt: skip
        for name, value in found.items():
            torch.testing.assert_close(value, expected(f"{name}.{call}"), **tolerance)


def test_kmeans_equals_the_authors() -> None:
    case, tensors = load_case("beit2", "kmeans_init")
    samples = tensors["in/samples"]
    means, counts = cosine_kmeans(samples, samples[tensors["in/init_rows"]], case["config"]["iters"])
    torch.testing.assert_close(means, tensors["out/means"], **case["tolerance"])
    assert torch.equal(counts.long(), tensors["out/bins"])


@pytest.mark.parametrize("cuts", [2, 4, 16])
def test_codes_do_not_depend_on_how_a_step_is_cut(cuts: int) -> None:
    """Through k-means in the first step, averages, and codes that begin anew."""
    ways = []
    for number in (1, cuts):
        codebook, ema = _pair(40, kmeans_iterations=10, revive_after=3)
        for step in range(7):
            _step(codebook, ema, *_images(seed=step), step, cuts=number)
        ways.append((codebook.weight, ema.hits, ema.unused_steps))
    for whole, cut in zip(*ways, strict=True):
        torch.testing.assert_close(whole, cut, rtol=0, atol=1e-13)


def test_tokens_are_chosen_by_their_keys_wherever_they_stand() -> None:
    tokens, priorities = torch.arange(20.0)[:, None], torch.randperm(20)
    chosen = choose_tokens(tokens, priorities, 5)[:, 0]
    assert torch.equal(priorities[chosen.long()], torch.arange(19, 14, -1))
    order = torch.randperm(20)
    assert torch.equal(chosen, choose_tokens(tokens[order], priorities[order], 5)[:, 0])
    assert len(choose_tokens(tokens, priorities, 50)) == 20


def test_codes_begin_at_the_clusters_of_the_first_batch() -> None:
    codebook, ema = _pair(24, kmeans_iterations=10)
    centres = torch.eye(4, dtype=torch.float64)
    tokens = (centres[torch.arange(96) % 4] + 0.05 * torch.randn(96, 4, dtype=torch.float64)).view(16, 6, 4)
    _step(codebook, ema, tokens, torch.arange(16), 0)
    assert bool(ema.started)
    assert (codebook.weight @ centres.T).amax(1).min() > 0.98  # each within a cluster
    assert (codebook.weight @ centres.T).amax(0).min() > 0.98  # and none without


def test_a_first_step_that_is_not_finite_leaves_kmeans_to_the_next() -> None:
    codebook, ema = _pair(8, kmeans_iterations=3)
    before = codebook.weight.clone()
    spoiled, key = _images()
    spoiled[0] = torch.nan
    _step(codebook, ema, spoiled, key, 0, finite=NO)
    assert torch.equal(codebook.weight, before)
    assert not ema.started
    _step(codebook, ema, *_images(seed=2), 1)
    other, fresh = _pair(8, kmeans_iterations=3)
    _step(other, fresh, *_images(seed=2), 0)
    assert torch.equal(codebook.weight, other.weight)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    codebook, ema = _pair(8, revive_after=2)
    _step(codebook, ema, *_images(), 0)
    before = [value.clone() for value in (codebook.weight, *ema.buffers())]
    spoiled, key = _images(seed=3)
    spoiled[2, 1] = torch.inf
    _step(codebook, ema, spoiled, key, 1, finite=NO)
    assert all(torch.equal(old, new) for old, new in zip(before, (codebook.weight, *ema.buffers()), strict=True))


def test_codes_that_nobody_uses_are_put_on_tokens_and_used() -> None:
    codebook, ema = _pair(16, revive_after=3)
    tokens, key = _images()
    tokens[..., 0] = tokens[..., 0].abs()  # half of the sphere is empty
    codebook.weight[8:] = F.normalize(torch.tensor([-1.0, 0.01, 0.01, 0.01], dtype=torch.float64), dim=0)
    for step in range(2):
        _step(codebook, ema, tokens, key, step)
        assert ema.health()["codebook_usage"] <= 0.5
    _step(codebook, ema, tokens, key, 2)
    unit = F.normalize(tokens, dim=-1).flatten(0, 1)
    assert (codebook.weight[8:] @ unit.T).amax(1).min() == pytest.approx(1.0)
    _step(codebook, ema, tokens, key, 3)
    assert ema.health()["codebook_usage"] > 0.9


def test_codes_in_use_are_left_alone_by_the_revival() -> None:
    ways: Sequence[Tensor] = []
    for after in (1, None):
        codebook, ema = _pair(3, revive_after=after)
        for step in range(4):
            _step(codebook, ema, *_images(seed=step), step)
        ways = [*ways, codebook.weight]
    assert torch.equal(*ways)


def test_usage_and_perplexity_are_those_of_the_last_steps() -> None:
    codebook, ema = _pair(4, decay=0.5)
    codebook.weight.copy_(torch.eye(4))
    tokens = torch.eye(4, dtype=torch.float64)
    _step(codebook, ema, tokens[:1].expand(8, 6, 4), torch.arange(8), 0)
    assert ema.health()["codebook_usage"] == 0.25
    assert ema.health()["codebook_perplexity"] == pytest.approx(1.0)
    for step in range(1, 30):
        _step(codebook, ema, tokens[:2].repeat(8, 3, 1), torch.arange(8), step)
    assert ema.health()["codebook_usage"] == 0.5
    assert ema.health()["codebook_perplexity"] == pytest.approx(2.0)


def test_gradients_pass_the_codes_as_if_they_were_the_tokens() -> None:
    codebook, _ = _pair()
    tokens = _images()[0].requires_grad_()
    quantized = codebook(tokens)
    weight = torch.randn_like(tokens)
    (through,) = torch.autograd.grad((quantized.values * weight).sum(), tokens, retain_graph=True)
    (straight,) = torch.autograd.grad((quantized.unit * weight).sum(), tokens)
    assert torch.equal(through, straight)
    assert torch.allclose(quantized.values, codebook.weight[quantized.codes])
