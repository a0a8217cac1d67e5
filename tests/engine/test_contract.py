"""The contract of `foreseen.engine.objective` holds what methods need: the same run however a batch is cut."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from foreseen.data.batch import Batch
from foreseen.engine.objective import Objective, Progress
from tests.engine.driver import (
    CLIP, GLOBAL_SIZE, STEPS, History, drive, loss_distance, norm_distance, weight_distance,
)  # fmt: skip
from tests.engine.skeletons import BEiT, CentredIBOT, IBOT, SKELETONS, Supervised, koleo, sinkhorn

whole_run = cache(lambda make: drive(make, GLOBAL_SIZE))


@pytest.mark.parametrize("make", SKELETONS.values(), ids=SKELETONS)
def test_a_run_does_not_depend_on_accumulation(make: type[Objective]) -> None:
    whole = whole_run(make)
    assert whole.norms.min() > CLIP  # clipping was at work
    assert whole.losses.unique().numel() == STEPS
    for micro_size in (8, 4):
        run = drive(make, micro_size)
        assert loss_distance(whole, run) < 1e-12
        assert norm_distance(whole, run) < 1e-12
        assert weight_distance(whole, run) < 1e-10
