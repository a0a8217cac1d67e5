"""What makes each method's recipes small enough for tests, besides a narrow backbone, small pictures and few steps."""

_SMALL_CROPS = "method.crops={local_count: 2, local_size: 16}"
_SMALL_HEAD = ["method.out_dim=64", "method.hidden_dim=32", "method.bottleneck_dim=16", "method.head_warmup_steps=0"]

SMALL: dict[str, list[str]] = {
    "mae": ["method.decoder={embed_dim: 32, depth: 1, num_heads: 2}"],
    "dinov2": [
        *_SMALL_HEAD,
        "method.patch_bottleneck_dim=12",
        "method.koleo_group=2",
        _SMALL_CROPS,
    ],
    "ibot": [*_SMALL_HEAD, _SMALL_CROPS],
    "dino": [*_SMALL_HEAD, _SMALL_CROPS],
}
"""Overrides by the method's name; sizes fit patches of 8 px."""
