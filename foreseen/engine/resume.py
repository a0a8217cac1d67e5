"""What makes two starts the same run: the config but for what cannot change the result, and the data."""

from collections.abc import Mapping, Sequence
from typing import Any

from foreseen.config import Config
from foreseen.data.feed import Pictures
from foreseen.data.order import FULL, ORDER_VERSION
from foreseen.errors import BadInput

# Where things lie, how they are reached and spread over machines, how often one looks, and what changes no more than
# rounding. The order of the samples is compared with the data.
_FREE = {
    "run.dir", "run.epochs", "run.save_every", "run.keep_last", "run.log_every", "run.eval_every",
    "run.pictures_every", "run.ledger", "data.path", "data.hf_config", "data.columns.image", "data.columns.label",
    "data.columns.split", "data.test_fraction", "data.workers", "data.max_bad_fraction", "data.shards_at", "data.fetch",
    "data.cache_dir", "data.cache_gb", "data.order", "data.block_shards", "data.samples", "data.shuffle_buffer",
    "data.allow_shell_urls", "optim.warmup_epochs",
    "batch.micro_size", "model.init_from", "method.tokenizer", "method.min_usage", "method.teacher", "compute.compile",
    "compute.checkpoint_activations",
    # These matter to a run that goes wrong, whose owner may then want to change them.
    "run.recorder", "run.explode_factor", "run.rewind_after",
}  # fmt: skip


def run_state(
    config: Config,
    data: Mapping[str, Any],
    parents: Sequence[Mapping[str, Any]],
    frozen_inputs: Mapping[str, str],
    step: int,
) -> dict[str, Any]:
    """What a checkpoint says of its run; `data` is of `describe_data`."""
    return {
        "order_version": ORDER_VERSION,
        "samples_seen": step * config.batch.global_size,
        **data,
        "parents": list(parents),
        "frozen_inputs": dict(frozen_inputs),
        "config": config.public(),
    }


def describe_data(shards: Pictures, *, labels: bool) -> dict[str, str | None]:
    """What a run was trained on; `labels` where it was trained on labels, too."""
    return {
        "dataset_fingerprint": shards.fingerprint,
        "labels_fingerprint": shards.labels_fingerprint if labels else None,
    }


def check_same_data(shards: Pictures, then: Mapping[str, Any]) -> None:
    """Refuse to go on with other pictures, or other labels where labels were trained on.

    Args:
        shards: of this start.
        then: of `describe_data`, at the first start.

    Raises:
        BadInput: says which changed.
    """
    where = f"split {shards.split!r} in data.path {shards.place} changed since the run in run.dir was begun"
    if then["dataset_fingerprint"] != shards.fingerprint:
        raise BadInput(f"the pictures of {where}; bring the old ones back, or take another run.dir")
    if then["labels_fingerprint"] not in (None, shards.labels_fingerprint):
        raise BadInput(f"the labels of {where}; bring the old ones back, or take another run.dir")


def check_same_run(
    config: Config,
    shards: Pictures,
    order: str,
    parents: Sequence[Mapping[str, Any]],
    frozen_inputs: Mapping[str, str],
    state: dict[str, Any],
) -> None:
    """Refuse to go on with another job's checkpoint.

    Args:
        config: of this start, its length resolved.
        shards: trained on in this start.
        order: of their samples; see `Feed.order_name`.
        parents: what this start's weights are from.
        frozen_inputs: checksums of the frozen networks of this start; see `Objective.frozen_inputs`.
        state: of the checkpoint.

    Raises:
        BadInput: names the keys that differ, or the data, the weights that it began from, or the frozen networks.
    """
    check_same_config(config, state["config"])
    _check_same_weights(config, parents, state["parents"])
    _check_same_frozen(config, frozen_inputs, state.get("frozen_inputs", {}))  # not in those of older versions
    check_same_data(shards, state)
    if state["order_version"] != ORDER_VERSION:
        raise BadInput(
            f"run.dir {config.run.dir} was begun with order version {state['order_version']}, this program has "
            f"{ORDER_VERSION}; go on with the older program, or take another run.dir"
        )
    if (then := state.get("order", FULL)) != order:
        raise BadInput(
            f"run.dir {config.run.dir} was begun with the order of samples {then!r} and this start has {order!r}; set "
            "data.order, data.block_shards and data.path back, or take another run.dir"
        )


def _check_same_weights(
    config: Config, parents: Sequence[Mapping[str, Any]], then: Sequence[Mapping[str, Any]]
) -> None:  # fmt: skip
    """Where `model.init_from` lies is free; what it holds is not."""
    if [_weights_of(parent) for parent in parents] != [_weights_of(parent) for parent in then]:
        before, now = (", ".join(map(_name, both)) or "random weights" for both in (then, parents))
        raise BadInput(
            f"run.dir {config.run.dir} holds a checkpoint of a job that began from {before}, and this one begins from "
            f"{now}; take another run.dir, or set model.init_from back"
        )


def _check_same_frozen(config: Config, now: Mapping[str, str], then: Mapping[str, str]) -> None:
    """Where a tokenizer or a teacher lies is free; what it holds is not."""
    for name in sorted(now.keys() | then.keys()):
        if now.get(name) != then.get(name):
            before, found = (f"{one[name][:8]}…" if name in one else "none" for one in (then, now))
            raise BadInput(
                f"the {name} changed since the run in run.dir {config.run.dir} was begun: its sha256 was {before} and "
                f"is {found}; bring the old one back, or take another run.dir"
            )


def _weights_of(parent: Mapping[str, Any]) -> str:
    """Public weights have no file here to take a checksum of."""
    return str(parent["weights_sha256"] or parent["source"])


def _name(parent: Mapping[str, Any]) -> str:
    checksum = parent["weights_sha256"]
    return f"{parent['source']} (sha256 {checksum[:8]}…)" if checksum else str(parent["source"])


def check_same_config(config: Config, then: Any) -> None:
    """Refuse a run folder that a job with another result was begun in.

    Args:
        config: of this start, its length resolved.
        then: the resolved config of that job, as plain values.

    Raises:
        BadInput: names the keys that differ.
    """
    if not isinstance(then, dict):
        raise BadInput(f"run.dir {config.run.dir} holds no config that was written there; take another run.dir")
    before, now = _flat(then), _flat(config.public())
    keys = sorted(before.keys() | now.keys())
    decides = _decides_the_end(config)
    changed = [key for key in keys if (key in decides or not _is_free(key)) and before.get(key) != now.get(key)]
    if changed:
        differences = ", ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise BadInput(
            f"run.dir {config.run.dir} holds a checkpoint of another job ({differences}); "
            "take another run.dir, or set these keys back"
        )


def _decides_the_end(config: Config) -> set[str]:
    """How often one looks is free, but where a run ends by what is seen."""
    if config.run.stop_after is None:
        return set()
    return {"run.eval_every"} if config.run.eval_every is not None else {"run.eval_every", "run.save_every"}


def _is_free(key: str) -> bool:
    return key in _FREE or key.startswith(("probe.", "data.storage_options"))


def _flat(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
