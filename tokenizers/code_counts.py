"""How often each code of a codebook came in the global batch, while a tokenizer is trained."""

import torch
from torch import Tensor

from foreseen.engine.objective import all_reduce_sum
from foreseen.tokenizers.tokenizer import usage


class CodeCounts:
    """Counts of one step at a time; they are numbers to log, no state of the run.

    Args:
        codebook_size: K.
    """

    def __init__(self, codebook_size: int) -> None:
        self._size = codebook_size
        self._running: Tensor | None = None
        self._last: Tensor | None = None

    def add(self, codes: Tensor) -> None:
        """Count the codes of a micro-batch, any shape."""
        codes = codes.detach().flatten()
        counts = torch.zeros(self._size, dtype=torch.float32, device=codes.device)
        counts.scatter_add_(0, codes, torch.ones_like(codes, dtype=torch.float32))
        self._running = counts if self._running is None else self._running + counts

    def begin(self) -> None:
        """Forget what was counted since the last step ended."""
        self._running = None

    def close(self) -> None:
        """End a step: sum over all ranks."""
        assert self._running is not None
        self._last, self._running = all_reduce_sum(self._running), None

    @property
    def last(self) -> Tensor:
        """Counts of the last step's global batch, [K]."""
        assert self._last is not None
        return self._last

    def health(self) -> dict[str, Tensor]:
        """Share of the codes that the last step's global batch used, and their perplexity."""
        if self._last is None:
            return {}
        used, perplexity = usage(self._last)
        return {"codes_used": used, "code_perplexity": perplexity}
