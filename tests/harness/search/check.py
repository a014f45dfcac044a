"""Whether the ranks come where the reference comes."""

from __future__ import annotations

import tempfile

from torch import Tensor

from tests.harness.distributed import run
from tests.harness.search.case import Case
from tests.harness.search.execute import run_leg
from tests.harness.search.reference import Reference

# float64: up to eight steps of about ten roundings of 1e-16, stretched where a small square is divided by. float32: the
# same of 6e-8.
TOLERANCE = {"float64": 1e-10, "float32": 1e-4}


def check(case: Case, reference: Reference | None = None) -> None:
    """Raises AssertionError at the first step after which a weight of any rank is not the reference's.

    reference: that of the case, if it is not given.
    """
    reference = reference or Reference(case)
    with tempfile.TemporaryDirectory() as folder:
        for number, leg in enumerate(case.legs):
            expected = [reference.step(step) for step in leg.steps]
            for rank, steps in enumerate(run(leg.world, run_leg, case, number, folder)):
                for step, (ours, theirs) in enumerate(zip(steps, expected, strict=True)):
                    for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
                        error = _difference(p, q)
                        where = f"leg {number}, step {step}, rank {rank}, parameter {i} {tuple(q.shape)}"
                        assert error < TOLERANCE[case.dtype], f"{where}: off by {error:.1e}\n{p}\nexpected\n{q}"


def _difference(ours: Tensor, expected: Tensor) -> float:
    """Relative, in the 2-norm; of a tensor that has become small, to 1e-3. nan counts as infinite."""
    assert ours.shape == expected.shape
    error = float((ours.double() - expected).norm() / expected.norm().clamp(min=1e-3))
    return error if error == error else float("inf")
