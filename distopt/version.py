"""The version of the package, of which checkpoints and the wheel are told."""

__version__ = "0.1.0"
