"""What would add in any order on a GPU, and so differ from run to run, is not in a step."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from foreseen.commands.verbs import Verb
from foreseen.engine.trainer import Trainer
from tests.engine.any_order import AnyOrder
from tests.engine.topologies import Topology, config_of, job_of, methods


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "method"), methods())
def test_nothing_in_a_step_adds_in_any_order(small_shards: Path, tmp_path: Path, verb: Verb, method: str) -> None:
    config = config_of(verb, method, small_shards, tmp_path, Topology(1, 2, precision="fp32"))
    job = job_of(verb, config, small_shards)
    trainer = Trainer(job, Accelerator(cpu=True))
    trainer.job.objective.train()
    with AnyOrder() as any_order:
        trainer.step(0, trainer.batches(0))
    assert any_order.found == []


def test_it_would_be_seen() -> None:
    table = torch.randn(4, 3, requires_grad=True)
    with AnyOrder() as any_order:
        table.gather(0, torch.tensor([[0, 0, 1], [1, 2, 2]])).sum().backward()
    assert any_order.found == []  # ones
    with AnyOrder() as any_order:
        table.gather(0, torch.tensor([[0, 0, 1], [0, 1, 2]])).square().sum().backward()
        torch.nn.functional.interpolate(table[None, None], scale_factor=2, mode="bicubic").square().sum().backward()
    assert any_order.found == ["scatter_add", "upsample_bicubic2d_backward"]
