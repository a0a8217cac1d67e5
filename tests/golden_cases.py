"""Numbers of the authors' own code: `tests/golden/FIXTURE.{json,safetensors}`, one case at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

FOLDER = Path(__file__).parent / "golden"
_EXACT = {"rtol": 1e-8, "atol": 1e-10}


def load_case(fixture: str, case: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One case of a fixture.

    Returns:
        Its description, with "values" as plain numbers and lists; and its tensors by `KIND/NAME`, where the kinds are
        "weights" (of the case that `weights_from` names, if it does), "in", "out" and "out64".
    """
    described = json.loads((FOLDER / f"{fixture}.json").read_text())["cases"][case]
    described["values"] = {name: entry["value"] for name, entry in described["values"].items()}
    owners = {f"{described.get('weights_from', case)}/weights/", f"{case}/"}
    tensors: dict[str, Tensor] = {}
    with safe_open(FOLDER / f"{fixture}.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if any(name.startswith(owner) for owner in owners):
                tensors[name.split("/", 1)[1]] = file.get_tensor(name)
    return described, tensors


def weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a case, in the authors' names."""
    return {name.removeprefix("weights/"): value for name, value in tensors.items() if name.startswith("weights/")}


def authors_answer(case: dict[str, Any], tensors: dict[str, Tensor], name: str, dtype: torch.dtype) -> Any:
    """What the authors' code gave, and how near it is to be met: float64 nearly exactly, where there is any."""
    if dtype == torch.float64 and f"out64/{name}" in tensors:
        return tensors[f"out64/{name}"], _EXACT
    return tensors[f"out/{name}"].to(dtype), case["tolerance"]
