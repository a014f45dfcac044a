"""The random state: one implementation for SAM's second pass and for checkpoints."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

import distopt
from distopt.layout import unwrap_optimizer
from distopt.rng import RandomState, random_state, same_random_numbers, set_random_state

Drawn = tuple[float, float, float]


def drawn() -> Drawn:
    """One number of each generator: Python's, NumPy's and torch's."""
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def saved(path: Path) -> tuple[torch.nn.Module, distopt.SGD]:
    model = torch.nn.Linear(2, 1)
    optimizer = distopt.SGD(model.parameters(), lr=0.1)
    seed(1)
    distopt.save_checkpoint(path, model, optimizer)
    return model, optimizer


def test_a_checkpoint_resumes_the_numbers_of_torch_numpy_and_python(tmp_path: Path) -> None:
    """It resumed torch's alone, so that a data pipeline that draws from `random` or NumPy saw other numbers."""
    model, optimizer = saved(tmp_path / "checkpoint")
    expected = drawn()
    seed(2)
    distopt.load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    assert drawn() == expected


def test_a_checkpoint_without_numpy_s_and_python_s_numbers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions wrote it: those generators are left alone."""
    monkeypatch.setattr(RandomState, "state_dict", lambda self: {"cpu": self.cpu, "cuda": None})
    model, optimizer = saved(tmp_path / "checkpoint")
    expected = drawn()
    seed(2)
    alone = drawn()
    seed(2)
    distopt.load_checkpoint(tmp_path / "checkpoint", model, optimizer)
    assert drawn() == (*alone[:2], expected[2])


def test_the_state_dict_is_the_state() -> None:
    seed(3)
    state = random_state()
    expected = drawn()
    set_random_state(RandomState.from_state_dict(state.state_dict()))
    assert drawn() == expected


def test_a_block_repeats_numbers_and_leaves_the_generators_as_they_were() -> None:
    seed(4)
    start = random_state()
    first = drawn()
    with same_random_numbers(start):
        assert drawn() == first
    after = drawn()
    seed(4)
    assert (drawn(), drawn()) == (first, after)


def test_an_optimizer_is_found_inside_its_wrappers() -> None:
    inner = distopt.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
    sam = distopt.SAM(inner)
    wrapper = type("Wrapper", (), {"optimizer": sam, "param_groups": inner.param_groups})()
    assert unwrap_optimizer(wrapper) is unwrap_optimizer(sam) is unwrap_optimizer(inner) is inner
    assert unwrap_optimizer(wrapper, lambda found: isinstance(found, distopt.SAM)) is sam
