"""Runs on shards behind a URL: the same weights as from the disk, kills survived, no credential left in a record."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from foreseen import cli
from tests.servers import http_server, s3_server, upload

Recipe = Callable[..., list[str]]
SECRET = "not-to-be-written-down"
LENGTH = {"run__steps": 6, "run__save_every": 2, "optim__warmup_steps": 1, "batch__global_size": 8}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def bucket(s3: str, small_shards: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "a-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        return upload(small_shards, s3, "runs", "small")


def _foreseen(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def _refused(*arguments: str) -> str:
    result = CliRunner().invoke(cli.app, list(arguments))
    assert result.exit_code == 2 or result.exception is not None, result.output
    return result.output + str(result.exception)


def _weights(folder: Path, step: int = 6) -> bytes:
    return (folder / f"checkpoints/step-{step}/model.safetensors").read_bytes()


def _remote(bucket: str, s3: str) -> dict[str, object]:
    return {
        "data__path": bucket, "data__storage_options": f"{{endpoint_url: '{s3}', key: a-key, secret: {SECRET}}}",
    }  # fmt: skip


@pytest.mark.parametrize("more", [{}, {"data__fetch": "shard", "data__order": "block", "data__block_shards": 2}])
def test_weights_are_those_of_the_local_set_and_no_credential_is_recorded(
    more: dict[str, object], recipe: Recipe, tmp_path: Path, bucket: str, s3: str
) -> None:
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**LENGTH, **more, run__dir=tmp_path / "local"))
    there = recipe(**(LENGTH | more | {"run__dir": tmp_path / "there"} | _remote(bucket, s3)))
    output = _foreseen("pretrain", "mae_cpu_minutes", *there)
    assert _weights(tmp_path / "there") == _weights(tmp_path / "local")
    lineage = json.loads((tmp_path / "there/encoder/lineage.json").read_text(encoding="utf-8"))
    assert lineage["data"]["path"] == bucket
    assert "fetching the index of 37 samples" in output
    for file in (path for path in (tmp_path / "there").rglob("*") if path.is_file()):
        assert SECRET.encode() not in file.read_bytes(), file
    assert SECRET not in output


def test_a_run_goes_on_with_the_set_elsewhere_and_not_in_another_order(
    recipe: Recipe, tmp_path: Path, bucket: str, s3: str
) -> None:
    _foreseen("pretrain", "mae_cpu_minutes", *recipe(**LENGTH, run__dir=tmp_path / "whole"))
    folder = tmp_path / "moved"
    for step in (4, 6):
        for checkpoint in (folder / "checkpoints").glob("step-6"):
            checkpoint.rename(tmp_path / "aside")
        where = _remote(bucket, s3) if step == 6 else {}
        _foreseen("pretrain", "mae_cpu_minutes", *recipe(**(LENGTH | {"run__dir": folder} | where)))
    assert _weights(folder) == _weights(tmp_path / "whole")
    other = recipe(**LENGTH, run__dir=folder, data__order="block")
    assert "was begun with the order of samples 'full' and this start has 'blocks of 16 shards'" in _refused(
        "pretrain", "mae_cpu_minutes", *other
    )


def test_a_stream_is_pretrained_on_says_what_it_cannot_and_nothing_else_takes_it(
    recipe: Recipe, tmp_path: Path, small_shards: Path
) -> None:
    with http_server(small_shards) as http:
        http.ranges = False
        path = f"{http.url}/train-{{000000..000003}}.tar"
        run = recipe(**(LENGTH | {"data__path": path, "optim__warmup_epochs": "null", "run__epochs": "null"}))
        assert "resuming is best-effort" in _foreseen("pretrain", "mae_cpu_minutes", *run)
        aside = tmp_path / "run/checkpoints/step-6"
        aside.rename(tmp_path / "aside")
        output = _foreseen("pretrain", "mae_cpu_minutes", *run)
        assert "going on from step 4" in output
        assert "resuming is best-effort" in output
        lineage = json.loads((tmp_path / "run/encoder/lineage.json").read_text(encoding="utf-8"))
        assert lineage["data"]["path"] == path
        only = "which only pretraining can stream"
        assert only in _refused("finetune", "cpu_minutes", *recipe(data__path=path))
        assert only in _refused("probe", str(tmp_path / "run/encoder"), path)
        probing = [*run, "probe.every=2", f"run.dir={tmp_path}/other"]
        assert "name a packed set in probe.data" in _refused("pretrain", "mae_cpu_minutes", *probing).replace("\n", " ")
    shell = recipe(**(LENGTH | {"data__path": "pipe:touch mark"}))
    assert "data.allow_shell_urls=true" in _refused("pretrain", "mae_cpu_minutes", *shell).replace("\n", " ")


def _start(overrides: list[str], s3: str) -> subprocess.Popen[str]:
    keys = {"AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": SECRET}
    return subprocess.Popen(
        [sys.executable, "-m", "foreseen", "pretrain", "mae_cpu_minutes", *overrides],
        env={**os.environ, **keys, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("fetch", ["range", "shard"])
def test_a_run_with_workers_survives_kills_bit_for_bit(
    fetch: str, recipe: Recipe, tmp_path: Path, bucket: str, s3: str
) -> None:
    common = LENGTH | {
        "run__steps": 60, "run__save_every": 10, "run__log_every": 2, "data__workers": 2, "data__fetch": fetch,
        "data__order": "block", "data__block_shards": 2, "data__cache_gb": 6e-5,  # two shards
    }  # fmt: skip
    whole = _start(recipe(**common, run__dir=tmp_path / "local"), s3)
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    folder = tmp_path / "there"
    overrides = recipe(**(common | {"run__dir": folder, "data__path": bucket}))
    job = _start(overrides, s3)
    began = time.monotonic()
    while not (folder / "checkpoints/step-20").is_dir():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() - began < 300
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    again = _start(overrides, s3)
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    assert "going on from step" in output
    assert _weights(folder, 60) == _weights(tmp_path / "local", 60)
