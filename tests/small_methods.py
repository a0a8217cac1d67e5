"""What makes each method's recipes small enough for tests, besides a narrow backbone, small pictures and few steps."""

_SMALL_HEAD = ["method.out_dim=64", "method.hidden_dim=32", "method.bottleneck_dim=16"]

SMALL: dict[str, list[str]] = {
    "mae": ["method.decoder={embed_dim: 32, depth: 1, num_heads: 2}"],
    "dino": [*_SMALL_HEAD, "method.local={count: 2, size: 16}"],
}
"""Overrides by the method's name; sizes fit patches of 8 px."""
