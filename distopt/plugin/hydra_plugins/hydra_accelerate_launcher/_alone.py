"""A lock of a sweep's folder, for launchers and sweepers: what runs there runs alone."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def alone(lock: Path, what: str, error: type[Exception]) -> Iterator[None]:
    """Hold a lock, which ends with the process that holds it, however that ends.

    Args:
        lock: The file of the lock, in the folder of the sweep.
        what: What holds it, for the message to another one.
        error: The class of the error.

    Raises:
        error: If another process holds it.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(f"another {what} runs in {lock.parent}: wait for it, or give another hydra.sweep.dir") from None
        yield
