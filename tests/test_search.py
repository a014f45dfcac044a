"""Random trainings against a reference in float64: models, groups, rules, layouts, SAM's family, and events in mid-run.

What the tables of rows cannot list is drawn here by Hypothesis. `make test` draws the same cases every time, for
a minute; `make matrix` draws others every time, for an hour, and tells the seed.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.harness import oracles
from tests.harness.optimizers import ROWS, Row, distance
from tests.harness.sams import EVERYONE, RHO, RHO_OTHERS, Member, Task
from tests.harness.search.case import Case, Group, Leg, Param, Step
from tests.harness.search.check import check
from tests.harness.search.model import batch, criterion, feature, initial, joined
from tests.harness.search.reference import DEFAULTS, Reference
from tests.harness.search.search import search

SECONDS, HOUR = 60.0, 3600.0
STEPS = 4  # a cycle of three, and one more
PARAMS = (Param((5, 3)), Param((3,)), Param((2, 3)), Param(()), Param((4, 2), zero=True))


# What an hour has found, kept as it was printed.
FOUND = (
    Case(
        params=(Param((0,)),),
        groups=(Group((0,)),),
        optimizer="Adagrad",
        options={},
        legs=(Leg("zero1_scattered", 2, (Step(),)),),
    ),
    # The gradients of one weight are parallel, and LookSAM's v was their rounding, scaled up.
    Case(
        params=(Param(()),),
        groups=(Group((0,)),),
        optimizer="Adagrad",
        options={},
        legs=(Leg("zero1", 4, (Step(), Step())),),
        sam="LookSAM",
        closure=True,
    ),
    # A gradient in the second pass alone is not parallel to one of zeros.
    Case(
        params=(Param(()),),
        groups=(Group((0,)),),
        optimizer="Adagrad",
        options={},
        legs=(Leg("hsdp", 4, (Step(unused=(0,), unused_in_second=()), Step())),),
        sam="LookSAM",
    ),
    # A step without any gradient divided what was left of the numerator by a sum of nothing, so that d was inf.
    Case(
        params=(Param(()),),
        groups=(Group((0,)),),
        optimizer="DAdaptAdam",
        options={"d0": 0.01},
        legs=(Leg("plain", 1, (Step(), Step(), Step(unused=(0,)), Step())),),
    ),
    # The state of a scalar was saved as one of the scalars, and looked for among the tensors, where it is a DTensor.
    Case(
        params=(Param(()), Param(())),
        groups=(Group((0, 1)),),
        optimizer="ADOPT",
        options={},
        legs=(Leg("plain", 1, (Step(),)), Leg("tensor", 2, (Step(),))),
    ),
    # ADOPT's first step leaves the weights as they are; a cautious one decayed them.
    *(
        Case(
            params=(Param(()),),
            groups=(Group((0,)),),
            optimizer="ADOPT",
            options={option: True, "weight_decay": 0.1},
            legs=(Leg("plain", 1, (Step(), Step())),),
        )
        for option in ("cautious", "cautious_decay")
    ),
    # The only matrix was frozen in the second leg, which so had no buffers of matrices and refused the checkpoint's.
    Case(
        params=(Param(()), Param((2, 3))),
        groups=(Group((0, 1)),),
        optimizer="Adafactor",
        options={},
        legs=(Leg("plain", 1, (Step(), Step(events=(("freeze", 1),)))), Leg("fsdp2", 2, (Step(),))),
    ),
)


@pytest.mark.parametrize("case", FOUND, ids=range(len(FOUND)))
def test_what_an_hour_has_found(case: Case) -> None:
    check(case)


def test_a_minute_of_random_trainings() -> None:
    count = search(SECONDS, number=0, most=300)  # the same cases on every machine that is fast enough
    assert count > 3  # a quiet machine comes to some hundreds


@pytest.mark.matrix
@pytest.mark.timeout(HOUR + 900.0)
def test_an_hour_of_random_trainings() -> None:
    number = random.SystemRandom().randrange(2**32)
    print(f"\n{search(HOUR, number, shrinking=600.0)} cases of seed {number}")


def outputs(params: list[torch.Tensor], step: int) -> torch.Tensor:
    return joined([feature(p, batch(step)) for p in params])


TASK = Task(outputs, lambda out, step: criterion(out, PARAMS, range(len(PARAMS)), step))


def in_groups(row: Row, **others: float) -> Case:
    """The groups of `Row.groups`."""
    matrices = tuple(i for i, p in enumerate(PARAMS) if len(p.shape) > 1)
    rest = tuple(i for i in range(len(PARAMS)) if i not in matrices)
    options = {"weight_decay": 0.0, "trust_ratio": False, "lr": row.slower * row.kwargs["lr"], **others}
    if row.name == "muon":  # whose own rule is for matrices
        options["rule"] = "adamw"
    groups = (Group(matrices), Group(rest, options))
    return Case(PARAMS, groups, row.cls.__name__, row.kwargs, (Leg("plain", 1, (Step(),) * STEPS),))


def trajectory(case: Case) -> list[list[torch.Tensor]]:
    reference = Reference(case)
    return [reference.step(step) for step in case.legs[0].steps]


@pytest.mark.parametrize("row", [row for row in ROWS if row.cls.__name__ in DEFAULTS], ids=lambda row: row.name)
def test_the_reference_is_the_oracle(row: Row) -> None:
    """Two who know nothing of each other, where both can say it."""
    expected = row.expected(
        initial(PARAMS), oracles.gradient_of(lambda p, step: TASK.criterion(outputs(p, step), step)), 6
    )
    assert max(map(distance, trajectory(in_groups(row)), expected)) < 1e-12


@pytest.mark.parametrize(("member", "row"), EVERYONE, ids=lambda value: value.name)
def test_the_reference_is_the_oracle_of_sams_family(member: Member, row: Row) -> None:
    case = in_groups(row, sam_rho=RHO_OTHERS)
    case = replace(case, sam=member.cls.__name__, sam_options={"rho": RHO, **member.kwargs})
    expected = member.expected(row, initial(PARAMS), TASK, STEPS)
    assert max(map(distance, trajectory(case), expected)) < 1e-11


@pytest.mark.parametrize("layout", ["zero1", "fsdp2"])
def test_what_differs_is_found(layout: str) -> None:
    """A check that always passes would find nothing: here the reference decays a little less in the second group."""
    groups = (Group((0, 2)), Group((3, 1, 4)))
    case = Case(PARAMS, groups, "LAMB", {"lr": 0.05}, (Leg(layout, 2, (Step(), Step(unused=(1,)))),))
    check(case)
    less = replace(case, groups=(groups[0], Group((3, 1, 4), {"weight_decay": 0.0099})))
    with pytest.raises(AssertionError, match=r"leg 0, step [01], rank 0, parameter \d .*off by"):
        check(case, Reference(less))
