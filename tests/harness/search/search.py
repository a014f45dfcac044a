"""The search: random cases until the time is up, and the smallest that fails."""

from __future__ import annotations

import time

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.harness.search.case import Case
from tests.harness.search.check import check
from tests.harness.search.strategies import cases


class _TimeIsUp(BaseException):
    """Not an Exception, which Hypothesis would take for a failure of the case."""


def search(seconds: float, number: int, shrinking: float = 40.0, most: int = 10**7) -> int:
    """Draws cases for so long, or so many, and returns how many; `number` seeds the draws.

    Raises AssertionError with the smallest case that was found, as Python reads it, if one fails; looking for a smaller
    one takes `shrinking` seconds at most, and is left out where ranks hang.
    """
    end = time.monotonic() + seconds
    failed: list[tuple[int, Case, Exception]] = []
    count = 0

    @settings(
        max_examples=most,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @seed(number)
    @given(cases())
    def one(case: Case) -> None:
        nonlocal count, end
        if time.monotonic() > end:
            raise _TimeIsUp
        count += 1
        try:
            check(case)
        except Exception as error:
            if not failed:
                end = time.monotonic() + shrinking
            failed.append((len(repr(case)), case, error))
            if isinstance(error, TimeoutError):
                raise _TimeIsUp from error
            raise

    try:
        one()
    except _TimeIsUp:
        pass
    except Exception:
        if not failed:
            raise
    if failed:
        _, case, error = min(failed, key=lambda found: found[0])
        raise AssertionError(
            f"{error}\n\nafter {count} cases of seed {number}; again: check({case!r}), from tests.harness.search.check"
        ) from error
    return count
