"""The authors' key layout of BEiT and BEiT v2, and timm's.

timm took over their names, so what there is to do is to leave out the integer buffers that timm computes itself, and to
account for every other key. Source: microsoft/unilm at 768a3c8, beit/ and beit2/, modeling_pretrain.py and
modeling_finetune.py; a file of theirs holds this under `model` (older ones `module`).
"""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from foreseen.errors import BadInput

BLOCK = (
    r"(gamma_[12]|norm[12]\.(weight|bias)|attn\.(q_bias|v_bias|qkv\.weight|relative_position_bias_table"
    r"|proj\.(weight|bias))|mlp\.fc[12]\.(weight|bias))"
)
_BACKBONE = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|rel_pos_bias\.relative_position_bias_table|norm\.(weight|bias)"
    rf"|blocks\.\d+\.{BLOCK}"
)
_INDEX = re.compile(r"(rel_pos_bias|(blocks|cls_pt_layers)\.\d+\.attn)\.relative_position_index")
_CLASSIFIER = re.compile(r"(fc_norm|head)\.(weight|bias)")


def is_backbone(name: str) -> bool:
    """Whether a key of theirs is a weight of the backbone, whose name in timm is the same."""
    return _BACKBONE.fullmatch(name) is not None


def is_index(name: str) -> bool:
    """Whether a key of theirs is a buffer that is computed from the grid."""
    return _INDEX.fullmatch(name) is not None


def check_all_known(unknown: Iterable[str], what: str) -> None:
    """Refuse a state dict with keys that would be lost.

    Raises:
        BadInput: there are any; it names them.
    """
    names = sorted(unknown)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise BadInput(f"{what} has keys that are not BEiT's: {', '.join(names[:5])}{more}")


def beit_finetuned_from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A fine-tuned model of the authors by the names of timm's Beit, pooled as theirs is.

    With `fc_norm` among them it is mean pooling (`pool: mean`), without it the class token is read (`pool: token`).

    Raises:
        BadInput: keys that have no place there.
    """
    kept = {name: tensor for name, tensor in state.items() if not is_index(name)}
    check_all_known(
        (name for name in kept if not is_backbone(name) and not _CLASSIFIER.fullmatch(name)),
        "the fine-tuned checkpoint",
    )
    return kept
