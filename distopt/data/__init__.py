"""Data pipeline: text and fine-tuning examples become batches of tokens, identical at any number of processes."""
