"""Element for element, whatever the ranks and micro-batches: crops, masks, mixing, drop path, all that is drawn."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from foreseen import device_keys
from foreseen.commands.verbs import Verb, command_of
from foreseen.data.batch import BatchLayout
from foreseen.data.shards import ShardSet
from foreseen.data.views import finish
from foreseen.engine.objective import Progress
from tests.engine.topologies import ACCUMULATIONS, EXEMPT, GLOBAL_SIZE, WORLDS, Topology, config_of, made_ready, methods

STEPS = 3  # 48 of 37 samples: an epoch's edge lies within a step
METHODS = [(verb, method) for verb, method in methods() if method not in EXEMPT]
DRAWN_ON_THE_DEVICE = {
    "vqkd": {"drop_path", "codebook"},
    "mae": {"mask", "drop_path"},
    "beit": {"drop_path"},
    "supervised": {"drop_path"},
    "dino": {"drop_path"},
    "ibot": {"drop_path"},
    "dinov2": {"drop_path"},
    "distill": {"drop_path", "erase"},
    "feature_distill": {"drop_path"},
}
DRAWN_BY_WORKERS = {
    "vqkd": set[str](),
    "mae": set[str](),
    "beit": {"mask"},
    "supervised": {"mix", "erase"},
    "distill": {"mix", "erase", "teacher"},
    "feature_distill": {"teacher"},
    "ibot": {"mask"},
    "dinov2": {"mask"},
}


@pytest.mark.parametrize(("verb", "method"), METHODS)
def test_all_that_is_drawn_is_the_same_however_a_batch_is_cut(
    small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb, method: str
) -> None:
    shards = ShardSet.open(small_shards, "train")
    config = config_of(verb, method, small_shards, tmp_path / "run", Topology(1, 1)).with_length(37)
    config = made_ready(verb, config, shards)
    torch.manual_seed(0)
    job = command_of(verb).make_job(config, shards)
    job.objective.train().double()
    drawn: dict[str, Tensor] = {}
    bits = device_keys.keyed_bits

    def note(key: Tensor, stream: str, n: int) -> Tensor:
        found = bits(key, stream, n)
        times = sum(name.startswith(f"{stream}/") for name in drawn)
        drawn[f"{stream}/{times}"] = found
        return found

    monkeypatch.setattr(device_keys, "keyed_bits", note)

    def micro_batches(layout: BatchLayout) -> Iterator[dict[str, Tensor]]:
        """All that is drawn for each micro-batch, in the order of the global batch."""
        feeds = [job.builder.feed(layout, rank, job.subset) for rank in range(layout.ranks)]
        streams = [feed.batches(0, STEPS, workers=0, pin_memory=False) for feed in feeds]
        for step in range(STEPS):
            for stream in streams:
                for _ in range(layout.accumulation):
                    drawn.clear()
                    batch = finish(next(stream), job.objective.request, torch.device("cpu"), torch.float64)
                    progress = Progress(step, STEPS, 1.0, 0, layout.ranks, layout.accumulation)
                    (prepared,) = job.objective.prepare([batch], progress)
                    job.objective(batch, prepared, progress)
                    found = {"sample": batch.sample, "key": batch.key, **batch.images, **batch.draws, **drawn}
                    # Several crops of a sample stand apart, all first ones before all second ones.
                    yield {
                        name: values.unflatten(0, (-1, len(batch))).transpose(0, 1) for name, values in found.items()
                    }

    def run(ranks: int, accumulation: int) -> dict[str, Tensor]:
        layout = BatchLayout(GLOBAL_SIZE, GLOBAL_SIZE // (ranks * accumulation), ranks)
        parts = list(micro_batches(layout))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    whole = run(1, 1)
    on_the_device = {name.partition("/")[0] for name in whole if "/" in name}
    assert on_the_device >= DRAWN_ON_THE_DEVICE.get(method, set())
    assert whole.keys() >= DRAWN_BY_WORKERS.get(method, set())
    assert all(len(values) == STEPS * GLOBAL_SIZE for values in whole.values())
    for ranks in WORLDS:
        for accumulation in ACCUMULATIONS:
            if GLOBAL_SIZE // (ranks * accumulation) % job.objective.group:
                continue
            cut = run(ranks, accumulation)
            assert cut.keys() == whole.keys()
            for name, values in whole.items():
                assert torch.equal(values, cut[name]), (ranks, accumulation, name)
