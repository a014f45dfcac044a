"""The name of an attempt, in which a restarted job meets: its ranks agree on one, and no earlier attempt had it."""

from __future__ import annotations

import datetime
import time
import uuid

import torch.distributed as dist

_PAUSE = 0.01  # seconds between two looks into the store


def agreed_name(store: dist.Store, rank: int, world: int, timeout: datetime.timedelta) -> str:
    """Returns a name that all ranks of this attempt have, by what the store of the launcher still holds or not.

    No number of the launcher can be that name. Where a rank of one machine dies, torchrun counts a restart there; on
    the other machines it counts one or not, as they see the death or the new rendezvous first; and a launcher that is
    started again counts from 0. So rank 0 draws a name and gives it to every rank that asks, which does so by a name of
    its own: the questions of an earlier attempt are still in the store, but nobody takes the answers to them.

    Args:
        store: The store of the launcher, which outlives attempts.
        rank: The rank of this process.
        world: The number of processes.
        timeout: How long to wait for the other ranks.

    Raises:
        DistStoreError: If the other ranks do not ask or answer in time.
    """
    own, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank > 0:
        store.set(f"question_{store.add('questions', 1)}", own)
        store.wait([f"answer_to_{own}"], timeout)
        name = store.get(f"answer_to_{own}").decode()
        store.add(f"taken_{name}", 1)
        return name
    open_questions: list[int] = []
    seen = 0
    while store.add(f"taken_{own}", 0) < world - 1:
        asked = store.add("questions", 0)
        open_questions += range(seen + 1, asked + 1)
        seen = asked
        for number in [n for n in open_questions if store.check([f"question_{n}"])]:
            store.set(f"answer_to_{store.get(f'question_{number}').decode()}", own)
            open_questions.remove(number)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"{world - 1 - store.add(f'taken_{own}', 0)} of {world} processes did not come")
        time.sleep(_PAUSE)
    return own
