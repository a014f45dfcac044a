"""What surrounds the training steps of a run: configuration, folder, metrics, evaluation, signals and errors."""
