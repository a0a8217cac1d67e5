"""Every method, through its own command: the same run on 1, 2 and 4 ranks, any accumulation and any loader workers."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from _pytest.mark import ParameterSet

from foreseen.engine.ledger import read_ledger
from tests.engine.driver import loss_distance, norm_distance, relative, weight_distance
from tests.engine.topologies import (
    ACCUMULATIONS,
    EXEMPT,
    GLOBAL_SIZE,
    STEPS,
    WORKERS,
    WORLDS,
    Topology,
    history,
    methods,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
METHODS = [method for _, method in methods() if method not in EXEMPT]
CUTS = [(ranks, accumulation) for ranks in WORLDS for accumulation in ACCUMULATIONS]
MOST_RANKS = WORLDS[-1]
# The worst of all tensors, which in these is a small one that began at zero; all their weights together differ by 1e-7.
SINGLE_PRECISION = {"fsq": 3e-5, "distill": 3e-5}
ON_MOST_RANKS = ("mae", "supervised")  # the others take many minutes there


def cases(cuts: Sequence[tuple[int, ...]]) -> list[ParameterSet]:
    """Each method at each cut, whose first number is that of the ranks."""

    def marks(method: str, ranks: int) -> list[pytest.MarkDecorator]:
        return [pytest.mark.proof] if ranks == MOST_RANKS and method not in ON_MOST_RANKS else []

    return [pytest.param(method, *cut, marks=marks(method, cut[0])) for cut in cuts for method in METHODS]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs that the chosen tests look at."""
    out = tmp_path_factory.mktemp("topologies")
    wanted: dict[int, set[str]] = {}
    for item in request.session.items:
        if item.path == request.path and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            method, ranks = (item.callspec.params.get(name) for name in ("method", "ranks"))
            for number in {1, ranks}:
                wanted.setdefault(number, set()).add(method or "mae")
    for ranks, chosen in sorted(wanted.items()):
        launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(ranks)]
        launcher = [*launch, "--main_process_port", "0"] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "tests.engine.topologies", str(out), str(small_shards), *chosen]
        env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out


def _folder(runs: Path, method: str, topology: Topology, suffix: str = "") -> Path:
    folder = runs / f"{method}-{topology.name}{suffix}"
    if not folder.is_dir() and GLOBAL_SIZE // (topology.ranks * topology.accumulation) == 1:
        pytest.skip("the method relates two pictures, so a micro-batch of one is refused")
    return folder


@pytest.mark.parametrize(("method", "ranks", "accumulation"), cases(CUTS[1:]))
def test_a_method_does_not_depend_on_how_its_batches_are_cut(
    runs: Path, method: str, ranks: int, accumulation: int
) -> None:
    whole, cut = _folder(runs, method, Topology(1, 1)), _folder(runs, method, Topology(ranks, accumulation))
    for kind in ("samples", "pixels"):
        assert np.array_equal(read_ledger(whole, kind), read_ledger(cut, kind)), kind
    one, two = history(whole), history(cut)
    assert one.norms.min() > 0.05  # clipping is at work in every step
    assert len(one.losses.unique()) == STEPS
    assert loss_distance(one, two) < 1e-12
    assert norm_distance(one, two) < 1e-12
    assert weight_distance(one, two) < 1e-10


@pytest.mark.parametrize(("method", "ranks"), cases([(ranks,) for ranks in WORLDS[1:]]))
def test_in_single_precision_only_rounding_differs(runs: Path, method: str, ranks: int) -> None:
    one, two = (history(_folder(runs, method, Topology(r, 2, precision="fp32"))) for r in (1, ranks))
    assert relative(one.losses, two.losses) < 1e-5
    assert relative(one.norms, two.norms) < 1e-5
    assert weight_distance(one, two) < SINGLE_PRECISION.get(method, 1e-5)


@pytest.mark.parametrize(("method", "ranks"), cases([(ranks,) for ranks in WORLDS]))
def test_a_run_goes_on_to_the_bit_on_the_same_ranks_and_exactly_on_others(runs: Path, method: str, ranks: int) -> None:
    topology = Topology(ranks, 2)
    whole, again = (_folder(runs, method, topology, suffix) for suffix in ("", "-again"))
    for name in ("model", "optimizer", "average"):
        files = [folder / f"checkpoints/step-{STEPS}/{name}.safetensors" for folder in (whole, again)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert np.array_equal(history(whole).losses, history(again).losses)
    elsewhere = history(_folder(runs, method, topology, "-elsewhere"))
    assert loss_distance(history(whole), elsewhere) < 1e-12
    assert weight_distance(history(whole), elsewhere) < 1e-10


@pytest.mark.parametrize("workers", WORKERS[1:])
@pytest.mark.parametrize(("ranks", "accumulation"), CUTS)
def test_loader_workers_change_neither_the_order_nor_a_pixel(
    runs: Path, workers: int, ranks: int, accumulation: int
) -> None:
    whole = _folder(runs, "mae", Topology(1, 1))
    cut = _folder(runs, "mae", Topology(ranks, accumulation, workers, "fp32"))
    stream = read_ledger(whole).ravel()
    assert len(stream) > 8 * 37  # many an epoch's edge lies within a step
    assert all(len(set(stream[start : start + 37].tolist())) == 37 for start in range(0, len(stream) - 37, 37))
    for kind in ("samples", "pixels"):
        assert np.array_equal(read_ledger(whole, kind), read_ledger(cut, kind)), kind
