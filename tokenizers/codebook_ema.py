"""How a codebook moves: k-means at the start, then a moving average, and codes that nobody uses begin anew.

Everything is of the global batch: statistics are added up over the micro-batches of a step and the ranks, tokens are
chosen among all by keys, and the codes move once a step, where the step was finite. Nothing waits for the device.

Source: Peng et al. 2022, BEiT v2, arXiv:2208.06366; microsoft/unilm at 768a3c8, beit2/norm_ema_quantizer.py. Codes that
begin anew are Dhariwal et al. 2020, Jukebox, arXiv:2005.00341, section 3.1.

Letters: B images, L tokens of each, D their width, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foreseen import device_keys
from foreseen.engine.objective import all_reduce_sum
from foreseen.tokenizers.choose_tokens import choose_tokens
from foreseen.tokenizers.cosine_kmeans import cosine_kmeans
from foreseen.tokenizers.quantizer import Codebook, Quantized, sum_by_code
from foreseen.tokenizers.tokenizer import usage

USAGE_STEPS = 100
"""A code counts as used if it was hit within so many steps; the counts' average forgets at about that pace, too."""

# With fp16 the first steps overflow while the scale of the loss is looked for, and a step that is not finite moves
# nothing: so k-means is tried for so long, and which try counts is decided on the device.
_STARTING_STEPS = 16
_NEVER = 1 << 30


class CodebookEMA(nn.Module):
    """Moves a codebook towards the tokens that take its codes: e <- unit(decay * e + (1 - decay) * unit(mean)).

    Args:
        codebook_size: K.
        decay: what a code that was hit keeps of itself in a step.
        kmeans_iterations: of k-means on the first global batch; 0 leaves the codes random.
        revive_after: every so many steps, codes that were not hit within as many are put on tokens of the batch; None
            never does.

    Attributes:
        hits: moving average of how often each code comes in a step, [K].
        unused_steps: steps since each code was hit last, [K] int64.
        started: 1 once k-means is done, int64 scalar.
    """

    hits: Tensor
    unused_steps: Tensor
    started: Tensor

    def __init__(self, codebook_size: int, *, decay: float, kmeans_iterations: int, revive_after: int | None) -> None:
        super().__init__()
        self.codebook_size, self.decay = codebook_size, decay
        self.kmeans_iterations, self.revive_after = kmeans_iterations, revive_after
        self.register_buffer("hits", torch.zeros(codebook_size))
        self.register_buffer("unused_steps", torch.full((codebook_size,), _NEVER))
        self.register_buffer("started", torch.tensor(int(kmeans_iterations == 0)))
        self.begin()

    def begin(self) -> None:
        """Forget what was collected, before the first micro-batch of a step."""
        self._total: Tensor | None = None
        self._tokens: list[Tensor] = []
        self._priorities: list[Tensor] = []

    def collect(self, quantized: Quantized, key: Tensor, step: int) -> None:
        """Take note of a micro-batch.

        Args:
            quantized: its tokens [B, L, D] and their codes.
            key: one integer per image, [B].
            step: number of the update being made.
        """
        tokens = quantized.unit.detach().flatten(0, -2)
        counted = torch.cat([tokens, torch.ones_like(tokens[:, :1])], dim=1)
        total = sum_by_code(counted, quantized.codes.flatten(), self.codebook_size)
        self._total = total if self._total is None else self._total + total
        if self._starts(step) or self._revives(step):
            self._tokens.append(tokens)
            self._priorities.append(device_keys.keyed_bits(key, "codebook", len(tokens) // len(key)).flatten())

    def move(self, codebook: Codebook, step: int, finite: Tensor) -> None:
        """Move the codes by what was collected on all ranks, once a step.

        Args:
            codebook: what moves.
            step: number of the update just made.
            finite: boolean scalar on the device; where False nothing changes.
        """
        assert self._total is not None, "a step has a micro-batch"
        total = all_reduce_sum(self._total)
        sums, count = total[:, :-1], total[:, -1]
        hit = count > 0
        old = codebook.weight
        towards = torch.where(hit[:, None], F.normalize(sums, dim=-1), old)
        new = F.normalize(self.decay * old + (1 - self.decay) * towards, dim=-1)
        hits = self.decay * self.hits + (1 - self.decay) * count
        unused = torch.where(hit, 0, self.unused_steps + 1)
        if self._revives(step):
            assert self.revive_after is not None
            new = self._revived(new, unused >= self.revive_after)
        if self._starts(step):  # the counts of codes that k-means replaces say nothing
            started = self.started.bool()
            new = torch.where(started, new, self._centres(old))
            hits = torch.where(started, hits, self.hits)
            unused = torch.where(started, unused, self.unused_steps)
            self.started.copy_(started | finite)
        for state, value in ((codebook.weight, new), (self.hits, hits), (self.unused_steps, unused)):
            state.copy_(torch.where(finite, value, state))
        self.begin()

    def _starts(self, step: int) -> bool:
        return self.kmeans_iterations > 0 and step < _STARTING_STEPS

    def _revives(self, step: int) -> bool:
        return self.revive_after is not None and (step + 1) % self.revive_after == 0

    def _centres(self, old: Tensor) -> Tensor:
        """Codes after k-means, [K, D]; of a global batch with fewer tokens than codes the others stay random."""
        tokens = torch.cat(self._tokens)
        first = choose_tokens(tokens, torch.cat(self._priorities), self.codebook_size)
        return torch.cat([cosine_kmeans(tokens, first, self.kmeans_iterations)[0], old[len(first) :]])

    def _revived(self, codes: Tensor, dead: Tensor) -> Tensor:
        """The codes with those that are dead, [K], put on tokens of the global batch."""
        tokens = choose_tokens(torch.cat(self._tokens), torch.cat(self._priorities), self.codebook_size)
        number = dead.cumsum(0) - 1  # of each dead code among them
        replaced = dead & (number < len(tokens))
        return torch.where(replaced[:, None], tokens[number.clamp(0, len(tokens) - 1)], codes)

    def health(self) -> dict[str, Tensor]:
        """Share of codes hit within the last `USAGE_STEPS` steps, and the perplexity of their average counts."""
        share, perplexity = usage(self.hits * (self.unused_steps < USAGE_STEPS))
        return {"codebook_usage": share, "codebook_perplexity": perplexity}
