"""Every kind of tokenizer that a folder can hold, by its name."""

from foreseen.tokenizers.dvae import DVAE
from foreseen.tokenizers.fsq import FSQ
from foreseen.tokenizers.pixel_clusters import PixelClusters
from foreseen.tokenizers.tokenizer import Tokenizer
from foreseen.tokenizers.vqkd import VQKD

KINDS: dict[str, type[Tokenizer]] = {
    PixelClusters.kind: PixelClusters,
    DVAE.kind: DVAE,
    FSQ.kind: FSQ,
    VQKD.kind: VQKD,
}
