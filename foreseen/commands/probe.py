"""`foreseen probe`: how good the features of a frozen encoder are, without training it."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from foreseen.commands.data import Column

if TYPE_CHECKING:
    import numpy as np
    from accelerate import Accelerator
    from numpy.typing import NDArray

    from foreseen.config import Compute
    from foreseen.data.batch import Problem
    from foreseen.data.loader import BatchBuilder
    from foreseen.data.shards import ShardSet
    from foreseen.data.subsets import Subsets
    from foreseen.engine.extract import Extracted
    from foreseen.engine.labelled import TrainedProbe
    from foreseen.engine.probe import Probe
    from foreseen.handoff.frozen import FrozenEncoder
    from foreseen.models.features import Features

_PRECISION: Final = "fp32"  # so that the numbers do not depend on the machine
_SHOWN = 5  # unreadable pictures
_BATCH = 64  # pictures a forward; features do not depend on it
_VALIDATION_FRACTION = 0.1  # of each class, for choosing the learning rate


class Pooling(StrEnum):
    """What stands for a picture; see `foreseen.models.features`."""

    CLS = "cls"
    MEAN = "mean"
    BOTH = "both"


def probe(
    encoder: Annotated[str, typer.Argument(help="An encoder folder, or timm:NAME for public weights.")],
    data: Annotated[str, typer.Argument(help="Shards, a folder of pictures, a CSV or hf:NAME; best with labels.")],
    split: Annotated[str, typer.Option(help="Its pictures vote (k-NN) and train (linear).")] = "train",
    test_split: Annotated[str, typer.Option(help="Its pictures are judged, once.")] = "test",
    features: Annotated[
        Pooling | None, typer.Option(help="Class token, mean of the patches, or both; else the encoder's own way.")
    ] = None,
    shots: Annotated[int | None, typer.Option(min=1, help="Labels a class; all if left out.")] = None,
    linear: Annotated[
        bool, typer.Option(help="Train a linear probe as well, over a grid of learning rates and weight decays.")
    ] = True,
    attentive: Annotated[
        bool, typer.Option("--attentive", help="Train an attentive probe on the patches as well, over such a grid.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Which shots, and how what is trained starts.")] = 0,
    image_column: Column = None,
    label_column: Column = None,
    split_column: Column = None,
    hf_config: Annotated[str | None, typer.Option(help="Configuration of a Hugging Face set on the hub.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes a rank.")] = 4,
    out: Annotated[Path | None, typer.Option(help="A JSON file for the numbers.")] = None,
) -> None:
    """Judge a frozen encoder: k-nearest neighbours, a linear probe, and the rank of its features."""
    from dataclasses import asdict

    from foreseen.commands.session import open_data
    from foreseen.commands.verbs import leave
    from foreseen.config import Columns, Compute, Data
    from foreseen.engine.launch import choose_attention, start
    from foreseen.engine.unreadable import describe_problem
    from foreseen.engine.verdict import verdict
    from foreseen.errors import BadInput
    from foreseen.handoff.frozen import frozen_encoder
    from foreseen.handoff.seen import count_seen, describe_seen
    from foreseen.models.features import default_features

    accelerator = start(Compute(precision=_PRECISION))
    if attentive and accelerator.num_processes > 1:
        raise BadInput("--attentive is one process: start it without a launcher")
    with accelerator.main_process_first():  # public weights are downloaded once
        frozen = frozen_encoder(encoder)
    choose_attention(frozen.model.to(accelerator.device), accelerator.device)
    pooling = default_features(frozen.model) if features is None else features.value
    columns = Columns(image=image_column, label=label_column, split=split_column)
    named = Data(path=data, columns=columns, hf_config=hf_config)
    size = max(frozen.preprocessing.size)
    shards = open_data(named, split, accelerator, size=size)
    exam = _Exam(
        frozen, pooling, accelerator, shots=shots, linear=linear, attentive=attentive, seed=seed, workers=workers
    )
    seen, note = None, None
    if shards.labels is None or not (shards.labels >= 0).any():
        found = exam.without_labels(shards)
    else:
        test = open_data(named, test_split, accelerator, size=size)
        found = exam.with_labels(shards, test)
        seen = count_seen(frozen.lineage, test)
        note = describe_seen(seen, test)
    if accelerator.is_main_process:
        print("\n".join(_table(found, pooling, exam.problems)))
        print(verdict(found, {}))
        if note is not None:
            print(note)
        if out is not None:
            asked = {"encoder": encoder, "data": data, "split": split, "test_split": test_split, "features": pooling}
            _write(
                out,
                asked
                | {
                    "shots": shots,
                    "seed": seed,
                    "unreadable": len(exam.problems),
                    "unreadable_pictures": [describe_problem(problem) for problem in exam.problems],
                    "test_pictures_seen": seen,
                    **asdict(found),
                },
            )
    leave(False)


class _Exam:
    """Looks at the pictures of splits through an encoder, and asks what their labels allow."""

    def __init__(
        self, frozen: "FrozenEncoder", features: "Features", accelerator: "Accelerator", *, shots: int | None,
        linear: bool, attentive: bool, seed: int, workers: int,
    ) -> None:  # fmt: skip
        self.frozen, self.features, self.accelerator = frozen, features, accelerator
        self.shots, self.linear, self.attentive = shots, linear, attentive
        self.seed, self.workers = seed, workers
        self.problems: list[Problem] = []

    def without_labels(self, shards: "ShardSet") -> "Probe":
        """The spectrum of a fixed choice of a split's pictures."""
        from foreseen.engine.extract import choose
        from foreseen.engine.probe import SPECTRUM_PICTURES, probe

        return probe(self._seen(shards, choose(len(shards), SPECTRUM_PICTURES, self.seed)).features)

    def with_labels(self, shards: "ShardSet", test: "ShardSet") -> "Probe":
        """Everything: the test split is read once, and nothing is chosen by it."""
        from dataclasses import replace

        import numpy as np
        import torch

        from foreseen.data.subsets import labelled_subsets
        from foreseen.engine.probe import Exam, probe
        from foreseen.errors import BadInput

        if test.labels is None or shards.labels is None or not (test.labels >= 0).any():
            raise BadInput(
                f"split {test.split!r} of {test.place} has no labels to judge by; name a labelled one with --test-split"
            )
        parts = labelled_subsets(
            shards.labels, validation_fraction=_VALIDATION_FRACTION, shots=self.shots, seed=self.seed
        )
        both = np.union1d(parts.train, parts.validation)
        seen, judged = self._seen(shards, both), self._seen(test, np.flatnonzero(test.labels >= 0))
        train, validation = (seen.labelled(part, shards.labels) for part in (parts.train, parts.validation))
        exam = Exam(
            judged=judged.labelled(judged.samples, test.labels),
            bank=train if self.shots else seen.labelled(both, shards.labels),
            linear=(train, validation) if self.linear else None,
            num_classes=max(shards.num_classes, test.num_classes),
            seed=self.seed,
        )
        found = probe(torch.cat([seen.features, judged.features]), exam)
        return replace(found, attentive=self._attentive(shards, test, parts)) if self.attentive else found

    def _attentive(self, shards: "ShardSet", test: "ShardSet", parts: "Subsets") -> "TrainedProbe":
        """The attentive probe, on the same cut; patches lie in files that are removed at the end."""
        import tempfile

        import numpy as np

        from foreseen.engine.attentive_probe import attentive_probe
        from foreseen.engine.extract_patches import extract_patches

        assert shards.labels is not None
        assert test.labels is not None
        with tempfile.TemporaryDirectory(prefix="foreseen-patches-") as folder:
            seen, judged = (
                extract_patches(
                    self.frozen.model, self._builder(split), samples, self.accelerator, _compute(),
                    Path(folder) / f"{split.split}.npy", batch_size=_BATCH, workers=self.workers,
                )
                for split, samples in (
                    (shards, np.union1d(parts.train, parts.validation)),
                    (test, np.flatnonzero(test.labels >= 0)),
                )
            )  # fmt: skip
            return attentive_probe(
                seen.labelled(parts.train, shards.labels),
                seen.labelled(parts.validation, shards.labels),
                judged.labelled(judged.samples, test.labels),
                num_classes=max(shards.num_classes, test.num_classes),
                seed=self.seed,
                device=self.accelerator.device,
            )

    def _builder(self, shards: "ShardSet") -> "BatchBuilder":
        from foreseen.data.loader import BatchBuilder
        from foreseen.data.views import Request

        return BatchBuilder(shards, Request(views=(self.frozen.preprocessing.view(),)), self.seed)

    def _seen(self, shards: "ShardSet", samples: "NDArray[np.int64]") -> "Extracted":
        from foreseen.engine.extract import extract

        found = extract(
            self.frozen.model, self.features, self._builder(shards), samples, self.accelerator, _compute(),
            batch_size=_BATCH, workers=self.workers,
        )  # fmt: skip
        self.problems += found.problems
        return found


def _compute() -> "Compute":
    from foreseen.config import Compute

    return Compute(precision=_PRECISION)


def _table(found: "Probe", features: str, unreadable: "Sequence[Problem]") -> list[str]:
    rows = [(f"k-NN, k = {k}", accuracy, "") for k, accuracy in found.knn.items()]
    for name, trained in (("linear", found.linear), ("attentive", found.attentive)):
        if trained is not None:
            edge = ", the end of the grid" if trained.lr_is_extreme else ""
            rates = f"lr {trained.lr:g}{edge}, weight decay {trained.weight_decay:g}"
            rows.append((name, trained.accuracy, f"{rates}, by {trained.validation_top1:.1%} on validation"))
    lines = []
    if rows:
        lines = [f"{found.judged} pictures judged".ljust(28) + f"{'top-1':>8}{'top-5':>8}"]
        lines += [f"{name:28}{shown.top1:8.1%}{shown.top5:8.1%}  {note}".rstrip() for name, shown, note in rows]
        lines.append(f"{'the commonest class':28}{found.chance:8.1%}")
    if found.rankme is not None:
        slope = "" if found.alpha_req is None else f", α-ReQ {found.alpha_req:.2f}"
        lines.append(
            f"features {features}: RankMe {found.rankme:.1f}, centred {found.rankme_centred:.1f}, "
            f"of {found.dimensions} dimensions{slope}"
        )
    if unreadable:
        lines.append(f"{len(unreadable)} pictures could not be read and are left out; --out lists them, such as")
        lines += [f"  {problem}" for problem in unreadable[:_SHOWN]]
    return lines


def _write(out: Path, numbers: dict[str, Any]) -> None:
    import json

    from foreseen.errors import BadInput
    from foreseen.files import write_atomically

    try:
        write_atomically(out, json.dumps(numbers, indent=2) + "\n")
    except OSError as error:
        raise BadInput(f"--out {out} cannot be written: {error}") from error
