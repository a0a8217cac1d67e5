"""`foreseen quickstart` made small: 144 pictures, two seeds, some steps, one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from foreseen.commands import quickstart
from foreseen.config import Config
from foreseen.data import pack


def shrink(replace: Callable[[Any, str, Any], None]) -> None:
    """Make it small by `setattr`, or by that of pytest's monkeypatch."""
    whole = quickstart.configs

    def shorter(config: Config, steps: int) -> Config:
        run = config.run.model_copy(update={"steps": steps, "save_every": steps, "log_every": 1})
        optim = config.optim.model_copy(update={"warmup_steps": 1})
        data = config.data.model_copy(update={"shots": config.data.shots and 2})
        probe = config.probe.model_copy(update={"every": config.probe.every and steps, "samples": 60})
        batch = config.batch.model_copy(update={"global_size": 8})
        groups = {"koleo_group": 4} if hasattr(config.method, "koleo_group") else {}
        method = config.method.model_copy(update=groups)
        sections = {"run": run, "optim": optim, "data": data, "batch": batch, "probe": probe, "method": method}
        return config.model_copy(update=sections)

    def configs(out: Path, method: str, seed: int) -> tuple[Config, Config]:
        pretraining, finetuning = whole(out, method, seed)
        return shorter(pretraining, 3), shorter(finetuning, 2)

    replace(quickstart, "configs", configs)
    replace(quickstart, "TRAIN", 96)
    replace(quickstart, "TEST", 24)
    replace(quickstart, "SEEDS", 2)
    replace(pack, "count_cpus", lambda: 1)
