"""From pictures on disk to batches: shards, order, decoding, views. Knows no model and no engine."""
