"""What timm has not: masked encoders, decoders, keyed drop path. Knows no data and no engine."""
