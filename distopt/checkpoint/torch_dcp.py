"""torch's distributed checkpoints (DCP), with errors of one line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distopt import collective


@contextlib.contextmanager
def torch_dcp(path: Path) -> Iterator[Any]:
    """Yields the module `torch.distributed.checkpoint`.

    Raises:
        FileError: In place of DCP's CheckpointException, which is no `Exception` and whose text is a traceback.
    """
    import torch.distributed.checkpoint as dcp  # takes a second, which `import distopt` does not need to wait for

    with warnings.catch_warnings():
        # torch 2.13 (checkpoint/state_dict_saver.py and _loader.py) warns without a process group, which is intended.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            yield dcp
        except dcp.CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            raise collective.FileError(f"{path}: rank {rank}: {type(cause).__name__}: {cause}") from error
