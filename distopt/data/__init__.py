"""From text and examples to batches of tokens, the same whatever the number of processes."""
