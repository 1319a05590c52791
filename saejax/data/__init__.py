"""Text -> token rows -> activation store -> deterministic batches."""
