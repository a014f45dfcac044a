"""How a rank learns that another one failed, without torch: two errors, and the launcher's count of restarts."""

from __future__ import annotations

import os


class FileError(RuntimeError):
    """An error of a rank that could not read or write a file."""


class LostRank(RuntimeError):
    """An error of a rank that waits for another one which does not come."""


def attempt() -> int:
    """Returns how often torch's launcher on this machine counts that it has restarted this job."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
