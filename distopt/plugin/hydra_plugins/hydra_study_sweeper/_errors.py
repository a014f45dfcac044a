"""Errors of one line, which Hydra prints without a traceback."""

from __future__ import annotations

from hydra.errors import CompactHydraException


class StudyError(CompactHydraException):
    """A search that cannot run as it is configured, or whose trials failed."""
