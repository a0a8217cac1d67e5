"""Every kind of tokenizer that a folder can hold, by its name."""

from foreseen.tokenizers.tokenizer import Tokenizer
from foreseen.tokenizers.vqkd import VQKD

KINDS: dict[str, type[Tokenizer]] = {"vqkd": VQKD}
