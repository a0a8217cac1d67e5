"""Nothing in a step waits for the device: no number of a tensor is read on the host."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from foreseen.commands.verbs import Verb
from foreseen.engine.trainer import Trainer
from tests.engine.topologies import GLOBAL_SIZE, Topology, config_of, job_of, methods

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class Reads(TorchDispatchMode):
    """Notes what on a GPU would wait for it: `item`, `bool`, `float`, `tolist`, indexing by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("verb", "method"), methods())
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_reads_nothing_from_the_device(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb, method: str, precision: str
) -> None:
    # On a CPU torch's own looks at the labels; on a GPU it does not.
    monkeypatch.setattr(F, "one_hot", lambda labels, classes: (labels[:, None] == torch.arange(classes)).long())
    config = config_of(verb, method, small_shards, tmp_path, Topology(1, 2, precision=precision))
    adamw = config.optim.model_copy(update={"name": "adamw"})  # others wait once a step, and the log says so
    config = config.model_copy(update={"optim": adamw})
    job = job_of(verb, config, small_shards)
    trainer = Trainer(job, Accelerator(cpu=True))
    assert None not in (trainer.ledger, trainer.recorder, trainer.average)
    assert trainer.layout.micro_size == GLOBAL_SIZE // 2
    trainer.job.objective.train()
    batches = trainer.batches(0)
    loaded = [next(batches) for _ in range(4)]
    trainer.step(0, iter(loaded[:2]))  # what is made once, such as tables
    with Reads() as reads:
        trainer.step(1, iter(loaded[2:]))
    assert reads.found == []
    with Reads() as reads:
        int(trainer.skipped)
    assert reads.found
