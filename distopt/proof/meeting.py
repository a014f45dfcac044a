"""The meeting of ranks before a proof: a rank that proves alone finds out before it sends a message."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist

from distopt import collective

_proofs: dict[tuple[int, ...], int] = {}  # the number that these ranks have started


def meet(ranks: tuple[int, ...], step: object) -> None:
    """Waits until all of these ranks have started as many proofs as this one, for at most the timeout of their store.

    A collective would not do: gloo (torch 2.13) aborts the process if all-reduces of different sizes meet, and NCCL
    hangs. The store knows which ranks arrived.

    Raises:
        ValueError: If some ranks did not arrive.
    """
    store = collective.store()
    number = _proofs[ranks] = _proofs.get(ranks, 0) + 1
    place = f"proof/{hashlib.blake2b(repr(ranks).encode(), digest_size=8).hexdigest()}"
    store.set(f"{place}/{dist.get_rank()}", str(number))
    if store.add(f"{place}/came/{number}", 1) >= len(ranks):
        store.set(f"{place}/all/{number}", "")
        for key in (f"{place}/came/{number - 1}", f"{place}/all/{number - 1}"):  # no rank waits for them any more
            store.delete_key(key)
    try:
        store.wait([f"{place}/all/{number}"])
    except RuntimeError as error:  # a FileStore's error; a TCPStore's is a subclass
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
