"""`foreseen embed`: features of pictures from a frozen encoder, in a file."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foreseen.commands.data import Column

if TYPE_CHECKING:
    from accelerate import Accelerator

    from foreseen.config import Compute
    from foreseen.data.batch import Batch, Problem
    from foreseen.data.pictures import OneSplit
    from foreseen.handoff.frozen import FrozenEncoder
    from foreseen.models.features import Feature

_KINDS: "tuple[Feature, ...]" = ("cls", "mean", "patches")
_SHOWN = 5  # unreadable pictures


def embed(
    encoder: Annotated[
        str, typer.Argument(help="An encoder folder, or timm:NAME for public weights.", show_default=False)
    ],
    data: Annotated[
        str,
        typer.Argument(help="A packed set, a folder of pictures, a list or CSV of paths, tars.", show_default=False),
    ],
    out: Annotated[
        Path, typer.Option(help="A .parquet file, or .npy with .json and .ids.csv beside it.", show_default=False)
    ],
    features: Annotated[
        str | None,
        typer.Option(help="cls, mean, patches, or several between commas. Default: as the encoder pools."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32 or float16, on disk.")] = "float32",
    split: Annotated[str | None, typer.Option(help="Of a set or folder that has several.", show_default=False)] = None,
    image_column: Column = None,
    label_column: Column = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures a forward.")] = 64,
    precision: Annotated[str, typer.Option(help="Of the arithmetic: fp32, bf16 or fp16.")] = "fp32",
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 4,
) -> None:
    """Write the features of every picture that can be read, with its path, key and label; those that cannot are named.

    Features are written as they come, so memory does not grow with the number of pictures.
    """
    import numpy as np

    from foreseen.commands.alone import batch_size_advice, start_alone
    from foreseen.commands.embedding_files import SUFFIXES, Id, Layout, embedding_file
    from foreseen.data.open_source import SourceOptions
    from foreseen.data.pictures import open_one_split
    from foreseen.data.table import Columns
    from foreseen.errors import BadInput
    from foreseen.handoff.frozen import frozen_encoder
    from foreseen.models.features import default_features
    from foreseen.printable import say

    if out.suffix not in SUFFIXES:
        raise BadInput(f"--out {out} ends in {out.suffix or 'nothing'}: {' or '.join(SUFFIXES)} says the format")
    if dtype not in ("float32", "float16"):
        raise BadInput(f"--dtype is {dtype!r}, there are float32 and float16")
    accelerator, compute = start_alone("embed", precision)
    frozen = frozen_encoder(encoder)
    kinds = _kinds(features or default_features(frozen.model))
    found = open_one_split(data, split, SourceOptions(columns=Columns(image_column, label_column)), say)
    batches = _batches(frozen, found, kinds, accelerator, compute, batch_size=batch_size, workers=workers)
    problems: list[Problem] = []
    written = 0
    shapes = _shapes(frozen, kinds, accelerator, compute)
    with batch_size_advice(batch_size), embedding_file(out, Layout(shapes, np.dtype(dtype))) as writing:
        for batch, values in batches:
            problems.extend(batch.problems)
            if len(batch):
                samples = batch.sample.tolist()
                ids = [Id(found.pictures.name(n), found.key(n), found.label(n)) for n in samples]
                writing.add(ids, values)
                written += len(ids)
        if not written:
            raise BadInput(f"none of the {len(problems):,} pictures of {data} can be read, the first: {problems[0]}")
        unreadable = [{"path": problem.key, "reason": problem.reason} for problem in problems]
        writing.finish(_facts(encoder, frozen, data, split) | {"samples": written, "unreadable": unreadable})
    say(f"{out}: {written:,} pictures, " + ", ".join(f"{kind} {_times(shape)}" for kind, shape in shapes.items()))
    if problems:
        say(f"{len(problems):,} of {written + len(problems):,} pictures could not be read and have no row, such as")
        for problem in problems[:_SHOWN]:
            say(f"  {problem}")


def _kinds(features: str) -> "list[Feature]":
    from foreseen.errors import BadInput

    asked = [word.strip() for word in features.split(",")]
    unknown = [word for word in asked if word not in _KINDS]
    if unknown or len(set(asked)) < len(asked):
        wrong = f"{unknown[0]!r} is none" if unknown else "one is named twice"
        raise BadInput(f"--features is {features!r}: {wrong}; there are {', '.join(_KINDS)}, between commas")
    return [kind for kind in _KINDS if kind in asked]


def _batches(
    frozen: "FrozenEncoder", found: "OneSplit", kinds: "list[Feature]", accelerator: "Accelerator", compute: "Compute",
    *, batch_size: int, workers: int,
) -> "Iterator[tuple[Batch, dict[str, Any]]]":  # fmt: skip
    """The batches of all pictures in order, with the features of those that can be read, on the CPU in float32."""
    import torch

    from foreseen.data.loader import load
    from foreseen.data.sweep_pictures import PictureSweep
    from foreseen.data.views import Request, finish
    from foreseen.engine.launch import autocast, choose_attention, image_dtype
    from foreseen.models.features import features_of

    device = accelerator.device
    model = frozen.model.to(device)
    choose_attention(model, device)
    view = frozen.preprocessing.view()
    sweep = PictureSweep(found.pictures, view, batch_size)
    for batch in load(sweep, range(len(sweep)), workers=workers, pin_memory=device.type == "cuda"):
        values: dict[str, Any] = {}
        if len(batch):
            images = finish(batch, Request(views=(view,)), device, image_dtype(compute)).images[view.name]
            with torch.no_grad(), autocast(accelerator, compute):
                values = {kind: part.float().cpu().numpy() for kind, part in features_of(model, images, kinds).items()}
        yield batch, values


def _shapes(
    frozen: "FrozenEncoder", kinds: "list[Feature]", accelerator: "Accelerator", compute: "Compute"
) -> dict[str, tuple[int, ...]]:
    """What a blank picture gives of each kind."""
    import torch

    from foreseen.engine.launch import autocast
    from foreseen.models.features import features_of

    blank = torch.zeros(1, 3, *frozen.preprocessing.size, device=accelerator.device)
    model = frozen.model.to(accelerator.device)
    with torch.no_grad(), autocast(accelerator, compute):
        return {kind: tuple(part.shape[1:]) for kind, part in features_of(model, blank, kinds).items()}


def _facts(encoder: str, frozen: "FrozenEncoder", data: str, split: str | None) -> dict[str, Any]:
    from dataclasses import asdict

    from foreseen.masked import masked

    return {
        "encoder": encoder,
        "weights_sha256": frozen.sha256,
        "preprocessing": asdict(frozen.preprocessing),
        "data": masked(data),
        "split": split,
    }


def _times(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))
