"""Self-supervised pretraining of vision backbones, and the hand-off to fine-tuning."""

__version__ = "0.1.0"
