"""Where ranks meet before a proof, so that one that proves alone finds that out, and sends nothing that is mistaken."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch.distributed as dist

_proofs: dict[tuple[int, ...], int] = {}  # how many these ranks have begun


def meet(ranks: tuple[int, ...], step: object) -> None:
    """Waits until all of these ranks have begun as many proofs as this one, for as long as their store waits.

    A collective would not do: gloo (torch 2.13) ends the process where one rank's all-reduce meets another's of another
    size, and NCCL hangs. The store knows who came.

    Raises:
        ValueError: Some did not come.
    """
    # Private, as of torch 2.13: the store by which the process group was made.
    from torch.distributed.distributed_c10d import _get_default_store

    store: Any = _get_default_store()
    number = _proofs[ranks] = _proofs.get(ranks, 0) + 1
    # The store of torchelastic outlives an attempt. A key that one has left opens a door early, and closes none.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    place = f"distopt/proof/{attempt}/{hashlib.blake2b(repr(ranks).encode(), digest_size=8).hexdigest()}"
    store.set(f"{place}/{dist.get_rank()}", str(number))
    if store.add(f"{place}/came/{number}", 1) >= len(ranks):
        store.set(f"{place}/all/{number}", "")
        for key in (f"{place}/came/{number - 1}", f"{place}/all/{number - 1}"):  # all have left there
            store.delete_key(key)
    try:
        store.wait([f"{place}/all/{number}"])
    except RuntimeError as error:  # of a FileStore; a TCPStore's is a subclass
        if isinstance(error, dist.DistNetworkError):
            raise
        timeout = store.timeout.total_seconds()
        missing = [rank for rank in ranks if not _came(store, f"{place}/{rank}", number)]
        raise ValueError(
            f"rank {dist.get_rank()} proves {step}, and ranks {missing} do not, within {timeout:g} s: all have to "
            "prove at the same steps; some have left out a step or a call, do something else meanwhile, or have ended "
            "(where each trains by itself, give distopt.prove_every a group)"
        ) from error


def _came(store: Any, key: str, number: int) -> bool:
    return store.check([key]) and int(store.get(key)) >= number
