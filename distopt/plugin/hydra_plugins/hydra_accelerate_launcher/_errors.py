"""Errors of one line, which Hydra prints without a traceback."""

from __future__ import annotations

from hydra.errors import CompactHydraException


class LauncherError(CompactHydraException):
    """A sweep that cannot be launched as it is configured."""


class JobFailed(CompactHydraException):
    """A job that ended without a return value."""
