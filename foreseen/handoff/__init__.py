"""What a run hands over: the encoder folder that timm loads."""
