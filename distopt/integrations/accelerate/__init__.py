"""The integration with Accelerate."""

from distopt.integrations.accelerate.attach import attach

__all__ = ["attach"]
