"""How a frozen network sees the crops that another one is trained on: each with its own normalisation and size."""

from dataclasses import replace

import torch
from torch import Tensor

from foreseen.data.batch import Batch
from foreseen.data.views import Transform, View
from foreseen.errors import BadInput
from foreseen.handoff.encoder import Preprocessing


class SameCrop:
    """The crops of a view, as a frozen network wants them.

    At the view's own size they are the very pixels, normalised anew. At another size they are cut once more from the
    picture, from the same window, with the same flip, colours and random numbers of the transform; where its shape
    differs, the crop is stretched.

    Args:
        view: that the other network is trained on.
        seen: what the frozen network wants.
        transform: of the view, at the frozen network's size; not used at the same size.

    Attributes:
        view: to be asked for besides; None at the same size.

    Raises:
        BadInput: the network does not want pictures of three channels.
    """

    def __init__(self, view: View, seen: Preprocessing, *, transform: Transform | None = None) -> None:
        if len(seen.mean) != len(view.mean):
            raise BadInput(
                f"the teacher wants pictures of {len(seen.mean)} channels, and the crops have {len(view.mean)}; "
                "take another in method.teacher"
            )
        self.size = seen.size
        self._own, self._mean, self._std = view, seen.mean, seen.std
        self.view: View | None = None
        if seen.size != view.size:
            self.view = replace(
                view, name="teacher", size=seen.size, window_of=view.name, transform=transform, mean=seen.mean,
                std=seen.std,
            )  # fmt: skip

    @property
    def views(self) -> tuple[View, ...]:
        """What to ask for: the view of the trained network, and this one's where it is another."""
        return (self._own,) if self.view is None else (self._own, self.view)

    def images(self, batch: Batch) -> Tensor:
        """The frozen network's input before anything else is done to it: normalised, [B, 3, H, W]."""
        if self.view is not None:
            return batch.images[self.view.name]
        return self.normalised(batch.images[self._own.name])

    def normalised(self, images: Tensor) -> Tensor:
        """Images of the trained network's normalisation in this one's: [B, 3, H, W] -> [B, 3, H, W]."""
        own = self._own
        if (own.mean, own.std) == (self._mean, self._std):
            return images
        scale = [theirs / ours for theirs, ours in zip(own.std, self._std, strict=True)]
        shift = [(m - mean) / std for m, mean, std in zip(own.mean, self._mean, self._std, strict=True)]
        return torch.addcmul(_channels(shift, images), images, _channels(scale, images))

    def note(self, source: str) -> str:
        """What is done, in words."""
        height, width = self.size
        text = f"teacher {source}: sees the same crops at {height}×{width} px"
        if self.view is not None:
            text += f", cut again from the same windows, as the student sees {self._own.size[0]}×{self._own.size[1]}"
        return f"{text}, normalised by its own mean {_shown(self._mean)} and std {_shown(self._std)}"


def _channels(values: list[float], like: Tensor) -> Tensor:
    """[C] plain numbers -> [C, 1, 1] on the device, filled there: nothing is sent to it."""
    return torch.stack([like.new_full((1, 1), value) for value in values])


def _shown(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.3g}" for value in values)
