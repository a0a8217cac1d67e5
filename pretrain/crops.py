"""Crops of a batch, which stand crop-major: all first crops before all second ones."""

import torch
from torch import Tensor

from foreseen.data.batch import Batch
from foreseen.data.views import View
from foreseen.device_keys import subkey


def crop_keys(batch: Batch, view: View) -> Tensor:
    """One key per crop of a view, in the order of its images: [n * B]."""
    return torch.cat([subkey(batch.key, f"{view.name}/{crop}") for crop in range(view.count)])


def by_crop(rows: Tensor, crops: int) -> Tensor:
    """[n * B, ...] -> [n, B, ...]."""
    return rows.reshape(crops, -1, *rows.shape[1:])
