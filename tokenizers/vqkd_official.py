"""The authors' VQ-KD checkpoints: their keys, and the tokenizer that one holds.

microsoft/unilm at 768a3c8, beit2/modeling_vqkd.py, norm_ema_quantizer.py.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor

from foreseen.errors import BadInput
from foreseen.tokenizers.build import build_for
from foreseen.tokenizers.vqkd import VQKD

_HEAD_DIM = 64  # of their encoders, which no weight tells


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' keys (`model` of a checkpoint) to those of `VQKDObjective`; the teacher's are left out.

    Raises:
        BadInput: a key that their model does not have.
    """
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        part, _, rest = name.partition(".")
        if part in ("encoder", "decoder"):
            owner = "tokenizer.encoder" if part == "encoder" else "decoder"
            if rest.endswith(".attn.q_bias"):  # keys have none, which changes nothing
                bias = [value, torch.zeros_like(value), _v_bias_of(state, name)]
                renamed[f"{owner}.{rest.removesuffix('q_bias')}qkv.bias"] = torch.cat(bias)
            elif not rest.endswith(".attn.v_bias"):
                renamed[f"{owner}.{rest.replace('fc_norm.', 'norm.')}"] = value
        elif part == "encode_task_layer":
            renamed[f"tokenizer.{name}"] = value
        elif part == "decode_task_layer":
            renamed[name] = value
        elif name == "quantize.embedding.weight":
            renamed["tokenizer.codebook.weight"] = value
        elif name == "quantize.cluster_size":
            renamed["codebook_ema.hits"] = value
            renamed["codebook_ema.unused_steps"] = torch.zeros(len(value), dtype=torch.int64)
        elif name == "quantize.embedding.initted":
            renamed["codebook_ema.started"] = value.long().squeeze(0)
        elif name not in ("quantize.embedding.cluster_size", "quantize.embedding.embed_avg") and not part.startswith(
            ("loss", "teacher", "scaling")
        ):  # two tables that their own code never reads, and what they delete themselves before use
            raise BadInput(f"{name} is no weight of an official VQ-KD tokenizer")
    return renamed


def _v_bias_of(state: Mapping[str, Tensor], q_bias: str) -> Tensor:
    name = q_bias.removesuffix("q_bias") + "v_bias"
    if name not in state:
        raise BadInput(f"{name} is missing beside {q_bias}")
    return state[name]


def official_tokenizer(state: Mapping[str, Tensor], *, num_heads: int | None = None) -> VQKD:
    """The tokenizer of an official checkpoint, ready to be saved as a folder.

    Args:
        state: `model` of the checkpoint, as `torch.load(file, weights_only=True)` reads it.
        num_heads: of the encoder; None takes heads of 64 channels.

    Raises:
        BadInput: it is no such checkpoint.
    """
    renamed, prefix = from_official(state), "tokenizer."
    own = {name.removeprefix(prefix): value for name, value in renamed.items() if name.startswith(prefix)}
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    try:
        (width, _, patch, _), (codes, code_dim) = shapes["encoder.patch_embed.proj.weight"], shapes["codebook.weight"]
        side = isqrt(shapes["encoder.pos_embed"][1] - 1)
        depth = len({name.split(".")[2] for name in own if name.startswith("encoder.blocks.")})
        vit = {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": num_heads or width // _HEAD_DIM}
        arguments = {
            "architecture": "vit_base_patch16_224", "model_args": vit, "input_size": (side * patch, side * patch),
            "codebook_size": codes, "code_dim": code_dim,
        }  # fmt: skip
        tokenizer = build_for(shapes, VQKD, arguments)
        tokenizer.load_state_dict(own)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise BadInput(f"these are no weights of an official VQ-KD tokenizer: {what}") from error
    return tokenizer.eval()
