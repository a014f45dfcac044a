"""SAM: steps in the wrong order, and random numbers in both passes."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import distopt
from distopt import SAM
from distopt.rng import random_state, same_random_numbers
from tests.harness.optimizers import distance
from tests.harness.sam_problems import Regression, every_kind

# Steps in the wrong order.


@every_kind
def test_a_step_between_perturb_and_restore_is_refused(kind: Any) -> None:
    """It stepped from perturbed weights, and restore() undid the step."""
    task = Regression(kind)
    task.sam.step(task.closure)
    task.closure()
    before = task.end
    task.sam.perturb()
    for closure in (None, task.closure):
        with pytest.raises(RuntimeError, match=r"step\(\) was called between perturb\(\) and restore\(\)"):
            task.sam.step(closure)
    task.sam.abort_pass()
    assert distance(task.end, before) == 0.0


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught if "without perturb()" in str(warning.message)]


@every_kind
def test_a_step_without_its_passes_is_told_once(kind: Any) -> None:
    """A loop that does not know of SAM trained without it, and nobody knew."""
    task = Regression(kind)
    with told() as messages:
        for _ in range(3):
            task.closure()
            task.sam.step()
    assert messages == [
        f"{kind.__name__}.step() was called without perturb() and restore(), so this is a plain step of AdamW: run the "
        "passes around them, or give step a closure"
    ]


def test_steps_that_do_not_ascend_need_no_perturb() -> None:
    """But LookSAM's, whose direction is in all of them."""
    for kind, expected in ((SAM, []), (distopt.LookSAM, [1])):
        task = Regression(kind, interval=3)
        task.sam.step(task.closure)
        with told() as messages:
            for _ in range(2):
                task.closure()
                task.sam.step()
        assert len(messages) == len(expected)


# Random numbers.


@pytest.mark.parametrize("interval", [1, 2])
def test_numpys_and_pythons_random_numbers_are_the_same_in_both_passes(interval: int) -> None:
    """torch's were; a mask drawn by numpy was another one in the second pass."""
    task, drawn = Regression(SAM, interval=interval), []

    def draw() -> tuple[float, float, float]:
        return (np.random.rand(), random.random(), float(torch.rand(())))

    def closure() -> Tensor:
        drawn.append(draw())
        return task.closure()

    for _ in range(4):
        ascends, start = task.sam.ascends, random_state()
        drawn.clear()
        task.sam.step(closure)
        assert drawn == [drawn[0]] * (1 + ascends)
        then = draw()
        with same_random_numbers(start):
            assert [draw(), draw()] == [drawn[0], then]  # one pass has been drawn
    assert len(set(then)) == 3


def test_random_numbers_continue_after_a_pass_that_raised() -> None:
    start = random_state()
    first = np.random.rand(), random.random()
    following = None
    for raises in (False, True):
        with same_random_numbers(start):
            np.random.rand(), random.random()
            with contextlib.suppress(KeyError), same_random_numbers(start):
                assert (np.random.rand(), random.random()) == first
                if raises:
                    raise KeyError
            following = following or (np.random.rand(), random.random())
            if raises:
                assert following == (np.random.rand(), random.random())
