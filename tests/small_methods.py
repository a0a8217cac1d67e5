"""What makes a method's own networks as small as the two blocks that tests give its backbone."""

from foreseen.config import Config


def small_method(config: Config) -> dict[str, str]:
    """Overrides for a recipe's method, by their keys."""
    options = config.method.model_dump()
    if "decoder" in options:
        return {"method.decoder": "{embed_dim: 32, depth: 1, num_heads: 2}"}
    small = {}
    if "pixel_clusters" in options:  # fitted in no time, in the place of a folder that a test does not have
        small |= {"method.tokenizer": "null", "method.pixel_clusters": "{clusters: 16}"}
    if options.get("aggregate"):
        small["method.aggregate"] = "{from_block: 1, depth: 1}"
    return small
