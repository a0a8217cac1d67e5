"""The page that a quickstart ends in: pictures, curves and the table, in one HTML file that needs nothing else."""

import html
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foreseen.commands.html_page import figure, write_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from foreseen.commands.controls import Plan
    from foreseen.config import Config

FILE_NAME = "summary.html"
_BLUE, _RED, _DARK = "#2a7f9e", "#b5562b", "#1c2733"
_FOR_REAL = {  # recipes that pretrain and fine-tune, and what to change in the first; else METHOD_pets and pets
    "mae": ("mae_vit_b16", " batch.global_size=1024 batch.micro_size=128", "vit_b16_mae"),
    "beit": ("beit_pets", "", "pets_beit"),
}
_CAPTIONS = {  # of TensorBoard's pictures, where their name says too little
    "global": "Large crops of some pictures, which both networks see; crops of one picture should get one answer.",
    "local": "Small crops of the same pictures, which the student alone sees.",
    "global, masked": "The large crops with the patches greyed out that the student has to guess.",
}
_ZOOM = 2  # the pictures are small


def write_page(folder: Path, pretraining: "Config", plan: "Plan") -> Path:
    """Write `summary.html` from the folders of finished runs.

    Args:
        folder: where to.
        pretraining: the job that made the encoder.
        plan: the comparison that it was judged by, concluded.

    Returns:
        The file.
    """
    from foreseen.commands import controls
    from foreseen.commands.quickstart import TEST, TRAIN, network_word

    finetuning = plan.pretrained.config
    record = json.loads((finetuning.run.dir.parent / controls.FILE_NAME).read_text(encoding="utf-8"))
    method = pretraining.method.name
    labels, network = controls.describe_labels(record["labels"]), network_word(pretraining)
    parts = [
        f"<h1>Did {html.escape(method)} pretraining help?</h1>",
        f"<p>A tiny {network}, pretrained on {TRAIN:,} cartoon pets without their labels; then {labels}; tested on "
        f"{TEST:,} others. The pretrained side has had more computing: what is compared is what the same labels "
        "give.</p>",
        f"<p class=verdict>{html.escape(record['verdict'])}</p>",
        _table(record),
        figure(_scores(record), "Top-1 on the test pictures; a dot is a seed, with labels of its own.", "plot"),
        "<h2>The pictures</h2>",
        figure(
            _breeds(pretraining.views.size[0]),
            "Twelve breeds, told apart by ears, face and coat; colour, pose, light and background say nothing.",
            "plot",
        ),
        f"<h2>{html.escape(method)}, without labels</h2>",
        *(
            figure(image, _CAPTIONS.get(name, name), "pixels")
            for name, image in _pictures(pretraining.run.dir / "tensorboard").items()
        ),
        figure(
            _curves(pretraining, plan),
            "Pretraining's loss; how often the frozen encoder's nearest neighbours name the breed, from before the "
            "first step on; and the training loss on the labelled pictures of the first seed. Frozen neighbours show "
            "only a part of what pretraining gives: fine-tuning is the judge.",
            "plot",
        ),
        "<h2>Your own pictures</h2>",
        f"<p>This {network} sees 48 × 48 pixels; for real work take a recipe of <code>foreseen recipes</code>, as it "
        "is or as a copy in a file of yours.</p>",
        f"<pre>{html.escape(_for_real(method))}</pre>",
    ]
    title = f"foreseen quickstart: {method}"
    path = folder / FILE_NAME
    write_html(path, title, parts)
    return path


def _for_real(method: str) -> str:
    """The commands for pictures of one's own, with a method."""
    pretrain, changed, finetune = _FOR_REAL.get(method, (f"{method}_pets", "", "pets model.name=null model.args=null"))
    return (
        "foreseen data pack MY_PICTURES shards/mine --max-side 500\n"
        f"foreseen pretrain {pretrain} data.path=shards/mine{changed}\n"
        f"foreseen probe runs/{pretrain}/encoder MY_LABELLED\n"
        f"foreseen finetune {finetune} data.path=MY_LABELLED data.validation_fraction=0.1 batch.global_size=64 \\\n"
        f"    model.init_from=runs/{pretrain}/encoder --controls"
    )


def _table(record: dict[str, Any]) -> str:
    from statistics import mean

    rows = [
        "<tr><th>begins from<th>lr, layer decay<th>seeds<th>validation<th>test, mean ± sd<th>gain of pretraining</tr>"
    ]
    for name, arm in record["arms"].items():
        difference = record["differences"].get(name)
        spread = "" if arm["sd"] is None else f" ± {arm['sd']:.1f}"
        cells = [
            arm["title"],
            f"{arm['base_lr']:.3g}, {arm['layer_decay'] or 1.0:g}",
            str(len(arm["seeds"])),
            f"{mean(arm['validation']):.1f}",
            f"{arm['mean']:.1f}{spread}",
            "" if difference is None else _gain(difference),
        ]
        rows.append(f"<tr{' class=first' if not difference else ''}>" + "".join(f"<td>{html.escape(c)}" for c in cells))
    tried = ", ".join(
        f"{arm['title']} {mean(arm['validation']):.1f}" for arm in record["control_candidates"].values()
    )  # fmt: skip
    chosen = (
        "Validation, on the first seeds, chose among the recipes of scratch, “same” being the pretrained side's and "
        f"“own” one without layer decay: {tried}."
    )
    return f"<table>{''.join(rows)}</table><p>{html.escape(chosen)}</p>"


def _gain(difference: dict[str, Any]) -> str:
    gain = f"{difference['mean']:+.1f}"
    return gain if difference["low"] is None else f"{gain} [{difference['low']:+.1f}, {difference['high']:+.1f}]"


def _scores(record: dict[str, Any]) -> "Figure":
    from matplotlib.figure import Figure

    arms = list(record["arms"].values())
    figure = Figure(figsize=(9, 0.6 * len(arms) + 0.9), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        axes.plot(arm["test"], [row] * len(arm["test"]), "o", color=_BLUE, alpha=0.6)
        axes.plot([arm["mean"]] * 2, [row - 0.25, row + 0.25], color=_DARK, linewidth=2)
    axes.set_yticks(range(len(arms)), [arm["title"] for arm in arms])
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 1.03 * max(score for arm in arms for score in arm["test"])))
    axes.set_xlabel("test top-1, %")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _breeds(size: int) -> "Figure":
    from matplotlib.figure import Figure

    from foreseen.data.procedural import BREEDS, draw_pet

    figure = Figure(figsize=(12, 2.5), layout="constrained")
    columns = figure.subplots(2, len(BREEDS))
    empty = {breed: list(columns[:, breed]) for breed in range(len(BREEDS))}
    number = 0
    while any(empty.values()):
        pet = draw_pet(0, number, size=size)
        number += 1
        if empty[pet.label]:
            empty[pet.label].pop().imshow(pet.image)
    for breed, name in enumerate(BREEDS):
        columns[0, breed].set_title(name.replace("-", "\n"), fontsize=9)
    for axes in columns.flat:
        axes.axis("off")
    return figure


def _pictures(events: Path) -> "dict[str, Image]":
    """The last picture under each name in TensorBoard's files."""
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(events), size_guidance={"images": 1})
    found.Reload()
    pictures = {}
    for name in found.Tags()["images"]:
        image = Image.open(io.BytesIO(found.Images(name)[-1].encoded_image_string))
        pictures[name] = image.resize((_ZOOM * image.width, _ZOOM * image.height), Image.Resampling.NEAREST)
    return pictures


def _curves(pretraining: "Config", plan: "Plan") -> "Figure":
    from matplotlib.figure import Figure

    from foreseen.data.procedural import BREEDS

    figure = Figure(figsize=(10, 3), layout="constrained")
    loss, probe, labelled = figure.subplots(1, 3)
    loss.plot(*_curve(pretraining.run.dir, "loss"), color=_BLUE)
    loss.set(title=f"{pretraining.method.name} loss", xlabel="step")
    steps, accuracy = _curve(pretraining.run.dir, "probe/knn_top1")
    probe.plot(steps, [100 * share for share in accuracy], "o-", color=_BLUE)
    probe.axhline(100 / len(BREEDS), color=_DARK, linestyle=":", label="chance")
    probe.set(title="k-NN of frozen features, %", xlabel="step", ylim=(0, None))
    probe.legend()
    for arm, colour in ((plan.pretrained, _BLUE), (plan.chosen(), _RED)):
        labelled.plot(*_curve(arm.seeded(plan.seeds[0]).run.dir, "loss"), color=colour, label=arm.title)
    labelled.set(title="fine-tuning loss", xlabel="step")
    labelled.legend()
    for axes in (loss, probe, labelled):
        axes.grid(alpha=0.3)
    return figure


def _curve(folder: Path, name: str) -> tuple[list[int], list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in points], [value for _, value in points]
