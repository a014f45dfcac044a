"""The attempts of a restarted job, which meet in one store and have no number in common."""

from __future__ import annotations

import datetime
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from distopt.engine.attempt import agreed_name

SECONDS = datetime.timedelta(seconds=20)


def names(store: dist.Store, world: int, late: int | None = None) -> list[str]:
    """What the ranks of one attempt agree on; `late` comes when all others wait already."""
    pause = threading.Event()

    def rank(number: int) -> str:
        if number == late:
            pause.wait(0.2)
        return agreed_name(store, number, world, SECONDS)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(rank, range(world)))


@pytest.mark.parametrize("late", [None, 0, 1])
def test_the_ranks_of_an_attempt_agree_and_no_two_attempts_do(late: int | None) -> None:
    store = dist.HashStore()
    seen = [names(store, 3, late) for _ in range(3)]
    assert [len(set(each)) for each in seen] == [1, 1, 1]
    assert len({each[0] for each in seen}) == 3


def test_a_rank_that_died_while_it_asked_is_not_waited_for() -> None:
    """Once before its question was in the store, once before it took the answer."""
    store = dist.HashStore()
    store.add("questions", 1)
    store.set(f"question_{store.add('questions', 1)}", "the dead")
    first, second = names(store, 2)
    assert first == second
    assert store.get("answer_to_the dead").decode() == first


def test_the_ranks_that_do_not_come_are_counted() -> None:
    with pytest.raises(dist.DistStoreError, match="2 of 3 processes did not come"):
        agreed_name(dist.HashStore(), 0, 3, datetime.timedelta(seconds=0.1))


def test_one_process_waits_for_nobody() -> None:
    assert agreed_name(dist.HashStore(), 0, 1, datetime.timedelta(seconds=0)) != ""
