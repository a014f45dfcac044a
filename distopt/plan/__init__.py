"""The memory, communication and time of a training step, planned before it runs."""
