"""The proof: what is right passes, what is wrong is one sentence on every rank, and nothing hangs."""

from __future__ import annotations

import re

import pytest

from tests.distributed import run
from tests.proof_cases import CASES, prove_each


@pytest.mark.parametrize("world", [2, 4])
def test_set_ups(world: int) -> None:
    """Each case says the same on every rank: nothing if it is right, else what the case expects."""
    cases = {name: case for name, case in CASES.items() if world in case.worlds}
    answers = run(world, prove_each, list(cases))
    apart = {name: [said[name] for said in answers] for name in cases if len({said[name] for said in answers}) > 1}
    assert apart == {}
    said = answers[0]
    alarms = {name: said[name] for name, case in cases.items() if case.says is None and said[name]}
    assert alarms == {}
    unseen = {name: said[name] for name, case in cases.items() if case.says and not re.search(case.says, said[name])}
    assert unseen == {}
