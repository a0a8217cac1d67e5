"""Every picture of a split once, in order, packed or not: for what is asked of each picture by itself.

Other than in training and scoring, nothing stands in for a picture that cannot be read: it is named and left out.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from foreseen.data.batch import Batch, Problem
from foreseen.data.decode import MAX_PIXELS, decode
from foreseen.data.pictures import PackedPictures, Pictures
from foreseen.data.shards import CorruptSample
from foreseen.data.store import MAX_BYTES
from foreseen.data.views import View, ViewCutter
from foreseen.device_keys import as_tensor
from foreseen.errors import BadInput
from foreseen.keys import sample_keys
from foreseen.printable import printable


class PictureSweep(Dataset[Batch]):
    """Batches of the pictures that can be read, with their numbers as `sample`; item i is the i-th batch.

    Args:
        pictures: of one split.
        view: without anything random.
        batch_size: pictures of a batch, those among them that cannot be read included.
        max_pixels: of one picture; larger ones are unreadable, by their headers.
    """

    def __init__(self, pictures: Pictures, view: View, batch_size: int, *, max_pixels: int = MAX_PIXELS) -> None:
        self.pictures, self.view, self.batch_size, self.max_pixels = pictures, view, batch_size, max_pixels

    def __len__(self) -> int:
        return -(-len(self.pictures) // self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        numbers = np.arange(number * self.batch_size, min((number + 1) * self.batch_size, len(self.pictures)))
        keys = sample_keys(0, numbers)  # a view without anything random draws nothing from them
        cutter = ViewCutter((self.view,), keys)
        readable = torch.zeros(len(numbers), dtype=torch.bool)
        problems = []
        for row, (sample, image) in enumerate(self._decoded(numbers.tolist())):
            if isinstance(image, str):
                name = self.pictures.name(sample)
                problems.append(Problem(sample, sample, "", "", "", name, image))
            else:
                cutter.cut(row, image)
                readable[row] = True
        samples = torch.from_numpy(numbers)[readable]
        images = {name: tensor[readable] for name, tensor in cutter.tensors.items()}
        return Batch(samples, as_tensor(keys)[readable], samples, images, problems=tuple(problems))

    def _decoded(self, numbers: Sequence[int]) -> Iterator[tuple[int, NDArray[np.uint8] | str]]:
        """Each picture, or why it cannot be had."""
        for sample, data in zip(numbers, self._read(numbers), strict=True):
            try:
                if not isinstance(data, bytes):
                    raise data
                yield sample, decode(data, max_pixels=self.max_pixels)
            except (CorruptSample, OSError) as error:
                yield sample, printable(str(error))

    def _read(self, numbers: Sequence[int]) -> Iterator[bytes | CorruptSample | OSError]:
        if isinstance(self.pictures, PackedPictures):  # of which many are fetched at a time
            yield from self.pictures.shards.read_many(numbers, max_bytes=MAX_BYTES)
            return
        for sample in numbers:
            try:
                yield self.pictures.read(sample)
            except (CorruptSample, OSError) as error:
                yield error
            except BadInput as error:
                yield CorruptSample(str(error))
