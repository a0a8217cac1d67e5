"""Whether a tokenizer makes use of its codebook: what is measured on its pictures, and what to do about it.

Masked image modelling predicts codes. Of a codebook of which three entries are in use there is nothing to learn, and
the loss looks fine all the same: so the tokenizer is judged before the pretraining is.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from foreseen.data.contact_sheet import Tile, draw_sheet
from foreseen.data.views import Request
from foreseen.errors import BadInput
from foreseen.tokenizers.looking import Cut, look_at
from foreseen.tokenizers.pictures import as_uint8, code_map
from foreseen.tokenizers.tokenizer import Tokenizer, usage

PICTURES = 2048
_SHOWN = 8
_SIDE_PX = 120  # of a picture on the sheet
_CODES_A_CODE = 10  # in one pass over the pictures, or an entry of the codebook is met too rarely to be learnt
_CONCENTRATED = 0.5


@dataclass(frozen=True)
class Health:
    """How a tokenizer codes a set of pictures.

    Attributes:
        codebook_size: K.
        pictures: looked at, the middle of each.
        codes: that these came to.
        used: different ones among them.
        perplexity: of their frequencies: as hard to guess as so many codes that are equally frequent.
        most_frequent_share: of the code that comes most often.
        reconstruction_error: mean absolute difference of decoded pixels in [0, 1]; None without a decoder.
        codes_in_a_pass: over the whole set.
        fingerprint: of the set.
    """

    codebook_size: int
    pictures: int
    codes: int
    used: int
    perplexity: float
    most_frequent_share: float
    reconstruction_error: float | None
    codes_in_a_pass: int
    fingerprint: str

    @property
    def used_share(self) -> float:
        """Of the codebook."""
        return self.used / self.codebook_size

    @property
    def fillable_share(self) -> float:
        """Of the codebook that so many codes would fill if all entries were equally frequent: 1 - (1 - 1 / K) ** n."""
        return -math.expm1(self.codes * math.log1p(-1 / self.codebook_size))

    @property
    def usage(self) -> float:
        """The used share, measured by what could have been used: few pictures are no fault of a codebook's."""
        return min(1.0, self.used_share / self.fillable_share)

    @property
    def is_too_large(self) -> bool:
        """Whether the set holds fewer codes than the codebook needs, whatever the tokenizer."""
        return self.codes_in_a_pass < _CODES_A_CODE * self.codebook_size

    def as_dict(self) -> dict[str, Any]:
        """For health.json."""
        shares = {"used_share": self.used_share, "fillable_share": self.fillable_share, "usage": self.usage}
        return asdict(self) | shares

    @classmethod
    def from_dict(cls, measured: Mapping[str, Any]) -> Self | None:
        """Of health.json; None where that holds something else."""
        try:
            health = cls(**{field.name: measured[field.name] for field in fields(cls)})
            health.sentence()
            return health if health.usage <= 1 else None
        except (KeyError, TypeError, ValueError, ArithmeticError):
            return None

    def sentence(self) -> str:
        """The numbers, in one line."""
        error = "" if self.reconstruction_error is None else f", pixels are off by {self.reconstruction_error:.3f}"
        return (
            f"{self.used:,} of {self.codebook_size:,} codes used ({self.used_share:.0%}), perplexity "
            f"{self.perplexity:.0f}, the most frequent code is {self.most_frequent_share:.1%}{error}; "
            f"{self.codes:,} codes of {self.pictures:,} pictures"
        )

    def verdict(self, min_usage: float = 0.5) -> str:
        """What to make of the numbers, in one sentence."""
        if self.usage < min_usage:
            return f"not fit for pretraining: {_shortage(self)}"
        if self.is_too_large:
            return (
                f"the codebook is larger than these pictures can fill: one pass holds {self.codes_in_a_pass:,} codes "
                f"for {self.codebook_size:,} entries; take at most {max(2, self.codes_in_a_pass // _CODES_A_CODE):,}"
            )
        if self.most_frequent_share > _CONCENTRATED:
            return (
                f"one code stands for {self.most_frequent_share:.0%} of everything, so guessing it is right as often; "
                "look at its places in health.png"
            )
        return "healthy: the codebook is in use"


def _shortage(health: Health) -> str:
    """Which share is used, of what."""
    share = f"only {health.used:,} of {health.codebook_size:,} codes are used ({health.used_share:.1%})"
    if health.fillable_share < 0.99:
        share += f", where {health.codes:,} codes could use {health.fillable_share:.1%}"
    return share


def refuse_unused(health: Health, min_usage: float, *, name: str) -> None:
    """Refuse a tokenizer that leaves most of its codebook unused.

    Args:
        health: of it.
        min_usage: smallest share; 0 refuses none.
        name: of the tokenizer, in the message.

    Raises:
        BadInput: says the share, and what to do.
    """
    if health.usage < min_usage:
        raise BadInput(
            f"the tokenizer {name} has collapsed on these pictures: {_shortage(health)}, which is {health.usage:.1%} "
            f"of what could be and under method.min_usage {min_usage:g}; train it again on them with a smaller "
            f"codebook (its perplexity is {health.perplexity:.0f}), name another in method.tokenizer, or set "
            "method.min_usage=0 to use it as it is"
        )


@torch.no_grad()
def measure_health(
    tokenizer: Tokenizer, cut: Cut, *, pictures: int = PICTURES, workers: int = 0, device: torch.device | None = None
) -> tuple[Health, Image.Image]:
    """Look at how a tokenizer codes pictures.

    Args:
        tokenizer: on `device`.
        cut: of which pictures; see `foreseen.tokenizers.looking`.
        pictures: at most so many, the first of the run's own order.
        workers: loader processes.
        device: to compute on; None for the CPU.

    Returns:
        The numbers, and a contact sheet of the first pictures: original, reconstruction if there is one, code map.

    Raises:
        BadInput: a code lies outside the codebook.
    """
    feeder = cut(Request(views=(tokenizer.centre_view(),)))
    counts = torch.zeros(tokenizer.codebook_size, dtype=torch.int64)
    rows: list[tuple[str, list[Tile]]] = []
    error, seen = 0.0, 0
    for view in look_at(feeder, pictures, workers=workers):
        pixels = view.to(device).float() / 255
        codes = tokenizer.encode(tokenizer.normalised(pixels))
        found = torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        if len(found) > len(counts):
            raise BadInput(f"the tokenizer made the code {len(found) - 1}, and its codebook has {len(counts)}")
        counts += found
        again = tokenizer.decode(codes) if tokenizer.has_decoder else None
        if again is not None:
            error += float((again - pixels).abs().mean()) * len(view)
        if not rows:
            rows = _rows(pixels, again, code_map(codes, tokenizer.codebook_size, tokenizer.input_size))
        seen += len(view)
    total, (height, width) = int(counts.sum()), tokenizer.grid(tokenizer.input_size)
    health = Health(
        codebook_size=tokenizer.codebook_size,
        pictures=seen,
        codes=total,
        used=int((counts > 0).sum()),
        perplexity=float(usage(counts.double())[1]),
        most_frequent_share=float(counts.max()) / total,
        reconstruction_error=error / seen if tokenizer.has_decoder else None,
        codes_in_a_pass=len(feeder.shards) * height * width,
        fingerprint=feeder.shards.fingerprint,
    )
    title = (
        f"{tokenizer.kind}: {health.used:,} of {health.codebook_size:,} codes used, perplexity {health.perplexity:.0f}"
    )
    return health, draw_sheet(title, rows, columns=_SHOWN, side=_SIDE_PX)


def _rows(pixels: Tensor, again: Tensor | None, codes: Tensor) -> list[tuple[str, list[Tile]]]:
    """What stands on the sheet: a row of the first pictures for each way to see them."""
    named = {"original": as_uint8(pixels), "reconstruction": None if again is None else as_uint8(again), "codes": codes}
    return [
        (name, [Tile(picture.permute(1, 2, 0).cpu().numpy(), "", "") for picture in row[:_SHOWN]])
        for name, row in named.items()
        if row is not None
    ]
