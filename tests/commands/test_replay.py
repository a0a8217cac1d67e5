"""`foreseen replay` as a user meets it: a real run with one bad picture, which it names."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from foreseen import cli
from foreseen.data.batch import Batch
from foreseen.engine import trainer
from foreseen.engine.bundle import read_bundle
from foreseen.errors import BadInput
from tests.documentation import arguments_of, typed_commands

Recipe = Callable[..., list[str]]
SICK = 11  # number of the sample whose pixels are not finite


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], None]]:
    """Multiply the normalised pixels of one sample by a number."""
    plain = trainer.finish

    def by(factor: float) -> None:
        def finish(batch: Batch, *arguments: Any) -> Batch:
            done = plain(batch, *arguments)
            for images in done.images.values():
                images[batch.sample.to(images.device) == SICK] *= factor
            return done

        monkeypatch.setattr(trainer, "finish", finish)

    yield by
    monkeypatch.setattr(trainer, "finish", plain)


def _foreseen(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, list(map(str, arguments)), catch_exceptions=False)


def _train(verb: str, name: str, recipe: Recipe, **more: object) -> Path:
    """A run of five steps of 8 in an epoch of at least 30, hence with one bad step; returns the bundle."""
    common = {
        "run__steps": 5, "run__epochs": "null", "run__save_every": 2, "optim__warmup_steps": 1,
        "optim__warmup_epochs": "null", "batch__global_size": 8, "batch__micro_size": 4,
    }  # fmt: skip
    overrides = recipe(**common | more)
    assert _foreseen(verb, name, *overrides).exit_code == 0
    folder = next(Path(o.removeprefix("run.dir=")) for o in overrides if o.startswith("run.dir="))
    return sorted((folder / "bundles").iterdir())[0]


def test_a_replay_of_mae_names_the_picture_that_is_not_finite(recipe: Recipe, spoil: Any) -> None:
    spoil(float("nan"))
    bundle = _train("pretrain", "mae_cpu_minutes", recipe)
    before = sorted(path for path in bundle.parents[1].rglob("*") if bundle not in path.parents)
    for _ in range(2):
        result = _foreseen("replay", bundle)
        assert result.exit_code == 0, result.output
        assert "reproduced, bit for bit" in result.output
        assert re.search(r"first output that is not finite: .*its input was not finite already", result.output)
        (sick,) = [sample for sample in read_bundle(bundle).samples if sample.sample == SICK]
        lines = result.output.splitlines()
        at = lines.index("1 of 8 samples stand out, by loss or gradient:")
        assert re.fullmatch(rf"  loss nan +gradient norm nan +{re.escape(sick.name)}", lines[at + 1])
    step = read_bundle(bundle).step
    facts = json.loads((bundle / "replay.json").read_text(encoding="utf-8"))
    assert (facts["begun_at"], facts["reproduced"]) == (step, True)  # the second replay, of the step alone
    assert facts["outlying"] == [{"samples": [sick.name], "loss": "NaN", "grad_norm": "NaN"}]
    assert before == sorted(path for path in bundle.parents[1].rglob("*") if bundle not in path.parents)


def test_a_replay_of_beit_finds_the_tokenizer_of_its_run(recipe: Recipe, spoil: Any, tmp_path: Path) -> None:
    spoil(float("nan"))
    bundle = _train("pretrain", "beit_cpu_minutes", recipe, method__pixel_clusters="{clusters: 16}")
    for options in ([], ["--out", tmp_path / "elsewhere"]):
        result = _foreseen("replay", bundle, *options)
        assert result.exit_code == 0, result.output
        assert "reproduced, bit for bit" in result.output


@pytest.mark.slow
def test_a_healthy_run_of_mae_leaves_no_bundle(recipe: Recipe, tmp_path: Path) -> None:
    overrides = recipe(run__steps=250, optim__warmup_steps=100, batch__global_size=8)
    assert _foreseen("pretrain", "mae_cpu_minutes", *overrides).exit_code == 0
    assert not (tmp_path / "run/bundles").exists()


def test_a_replay_of_fine_tuning_elsewhere_leaves_the_bundle_alone(
    recipe: Recipe, spoil: Any, small_shards: Path, tmp_path: Path
) -> None:
    spoil(float("nan"))
    bundle = _train("finetune", "cpu_minutes_scratch", recipe, data__shots="null", batch__global_size=32)
    moved = tmp_path / "moved"
    shutil.copytree(small_shards, moved)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    result = _foreseen("replay", bundle, "--data", moved, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "reproduced, bit for bit" in result.output
    assert before == {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    step = read_bundle(bundle).step
    assert (tmp_path / f"out/checkpoints/step-{step}/model.safetensors").is_file()
    assert (tmp_path / "out/replay.json").is_file()


def test_a_replay_without_the_cause_is_not_reproduced_and_exits_with_1(recipe: Recipe, spoil: Any) -> None:
    spoil(float("nan"))
    bundle = _train("pretrain", "mae_cpu_minutes", recipe)
    spoil(1.0)
    result = _foreseen("replay", bundle)
    assert result.exit_code == 1
    assert "NOT reproduced" in result.output


def test_a_replay_with_other_pictures_or_of_an_unknown_command_is_refused(
    recipe: Recipe, spoil: Any, small_shards: Path, tmp_path: Path
) -> None:
    spoil(float("nan"))
    bundle = _train("pretrain", "mae_cpu_minutes", recipe)
    changed = tmp_path / "changed"
    shutil.copytree(small_shards, changed)
    manifest = json.loads((changed / "manifest.json").read_text(encoding="utf-8"))
    manifest["splits"]["train"]["index_digest"] = "0" * 64
    (changed / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(BadInput, match="the pictures of split .* changed"):
        _foreseen("replay", bundle, "--data", changed)
    content = json.loads((bundle / "bundle.json").read_text(encoding="utf-8")) | {"verb": "paint"}
    (bundle / "bundle.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        BadInput, match="the bundle is of foreseen paint, and tokenizer, pretrain, finetune can be replayed"
    ):
        _foreseen("replay", bundle)


def test_the_run_of_the_page_that_cannot_work_stops_and_its_bundle_is_replayed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain, again = (arguments_of(command) for command in typed_commands("docs/flight_recorder.md"))
    small = [override for override in recipe(batch__global_size=8) if not override.startswith("run.dir=")]
    with pytest.raises(
        BadInput, match=r"10 steps in a row are bad.* gone back once already, from step \d+ to 2: it stops"
    ):
        _foreseen(*pretrain, *small)
    result = _foreseen(*again)
    assert result.exit_code == 0, result.output
    assert "step 2 (counted from 0) is not finite" in result.output
    assert "reproduced, bit for bit" in result.output
    assert re.search("first output that is not finite: module .*, from finite input", result.output)
