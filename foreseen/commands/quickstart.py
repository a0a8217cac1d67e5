"""`foreseen quickstart`: the whole life on a laptop, in minutes and without a download."""

from pathlib import Path
from typing import Annotated

import typer


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("quickstart"),
) -> None:
    """Draw procedural pets, pretrain on them, fine-tune on a few labels, and compare with scratch."""
    import json
    import os

    from foreseen.commands import finetune, pretrain
    from foreseen.commands.verbs import leave, load_recipe
    from foreseen.errors import BadInput

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BadInput("quickstart runs several jobs in one process; start it with plain `foreseen quickstart`")
    print("1. Pretrain a tiny ViT on 6,000 unlabelled pictures (MAE).")
    leave(pretrain.run(load_recipe("pretrain", "mae_cpu_minutes", [f"run.dir={out / 'pretrain'}"])))
    print("2. Fine-tune it on 10 labelled pictures a class, and the same ViT from scratch on the same labels.")
    encoder = out / "pretrain" / "encoder"
    jobs = {
        "pretrained": ("cpu_minutes", [f"model.init_from={encoder}"]),
        "from scratch": ("cpu_minutes_scratch", []),
    }
    scores = {}
    for name, (recipe, overrides) in jobs.items():
        folder = out / name.replace(" ", "_")
        leave(finetune.run(load_recipe("finetune", recipe, [f"run.dir={folder}", *overrides])))
        scores[name] = json.loads((folder / "result.json").read_text(encoding="utf-8"))["test"]["top1"]
    gain = 100 * (scores["pretrained"] - scores["from scratch"])
    verdict = (
        f"pretraining helped by {gain:.1f} points" if gain > 0 else f"pretraining did not help ({gain:.1f} points)"
    )
    print()
    for name, score in scores.items():
        print(f"  {name:14} {score:6.1%} top-1 on the test split")
    print(f"{verdict}: one seed and one learning rate a side, so take it as a hint.")
    print(f"Look at the reconstructions: tensorboard --logdir {out}")
