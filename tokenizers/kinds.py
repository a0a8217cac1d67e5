"""Every kind of tokenizer that a folder can hold, by its name."""

from foreseen.tokenizers.tokenizer import Tokenizer

KINDS: dict[str, type[Tokenizer]] = {}
