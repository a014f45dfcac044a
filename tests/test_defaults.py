"""Every rule at the hyper-parameters that users have, and at the edges, against its oracle and torch's optimizer.

The rows of `tests.harness.optimizers.ROWS` have short memories (betas of 0.8 and 0.95), in which errors show soon; a
constant such as 1 - 0.999, rounded to float32, is wrong in the fifth digit, and they do not see it.
"""

from __future__ import annotations

import pytest
import torch

from tests.harness import oracles
from tests.harness.optimizers import EDGES, Row, distance, pull
from tests.test_rules import STEPS, TOLERANCE, leaves, trajectory


@pytest.mark.parametrize("row", EDGES, ids=lambda row: row.name)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_step_equals_the_oracle(row: Row, dtype: torch.dtype) -> None:
    params = leaves(dtype)
    expected = row.expected(params, oracles.gradient_of(pull), STEPS)
    for step, ours in enumerate(trajectory(row.make(row.groups(params)), params, STEPS)):
        assert distance(ours, expected[step]) < TOLERANCE[dtype], step


@pytest.mark.parametrize("row", [row for row in EDGES if row.peer], ids=lambda row: row.name)
def test_every_step_equals_torchs(row: Row) -> None:
    ours, theirs = leaves(), leaves()
    optimizer, peer = row.make(row.groups(ours)), row.make_peer(row.groups(theirs))
    for step, params in enumerate(trajectory(optimizer, ours, STEPS)):
        peer.zero_grad()
        pull(theirs, step).backward()
        peer.step()
        assert distance(params, [p.detach() for p in theirs]) < TOLERANCE[torch.float64], step
