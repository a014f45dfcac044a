"""distopt in an Accelerate script."""

from distopt.integrations.accelerate.attach import attach

__all__ = ["attach"]
