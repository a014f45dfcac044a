"""Errors of one line, which Hydra prints without a traceback."""

from __future__ import annotations

from hydra.errors import CompactHydraException


class ComparisonError(CompactHydraException):
    """A comparison that cannot run as it is configured, or a run that failed for another reason than its loss."""
