"""`examples/convex.py`: the rates that theory promises for convex losses, measured."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from sklearn.svm import LinearSVC

from tests.harness.jobs import ROOT


@pytest.fixture(scope="module")
def convex() -> Any:
    spec = importlib.util.spec_from_file_location("convex", ROOT / "examples" / "convex.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.matrix
def test_the_exponents_are_those_of_theory(convex: Any) -> None:
    """Fits over one to one and a half decades: terms of lower order shift an exponent by up to a tenth, 0.06 here. For
    the hinge theory has an upper bound only, and 1.29 was measured."""
    panels = convex.measure()
    found = convex.exponents(panels)
    for kind in ("logistic, over L / m", "squared hinge, over L / m"):
        assert found[f"{kind}: gradient descent"] == pytest.approx(1.0, abs=0.12)
        assert found[f"{kind}: Nesterov"] == pytest.approx(0.5, abs=0.12)
    assert found["logistic, over L / m: heavy ball"] == pytest.approx(0.5, abs=0.12)
    assert found["logistic, m = 0, over k: gradient descent"] == pytest.approx(-1.0, abs=0.15)
    assert found["logistic, m = 0, over k: Nesterov"] == pytest.approx(-2.0, abs=0.25)
    assert -1.6 < found["hinge, over k: lr of 1 / (decay k), average"] < -0.8
    assert "squared hinge, over L / m: heavy ball" not in found  # it ends in a cycle, as its theory allows


def test_the_minimum_of_the_hinge_loss_is_scikit_learns(convex: Any) -> None:
    """Which minimizes C * sum of losses + |w|^2 / 2: C = 1 / (decay * points)."""
    data, decay = convex.points(margin=0.0, count=60), 0.05
    model = LinearSVC(loss="hinge", C=1.0 / (decay * 60), fit_intercept=False, tol=1e-8, max_iter=10**6)
    signs = torch.ones(60, dtype=torch.float64).index_fill(0, torch.arange(0, 60, 2), -1.0)  # it wants two classes
    model.fit((data * signs[:, None]).numpy(), signs.numpy())
    theirs = convex.hinge(data, decay, torch.from_numpy(model.coef_[0])).item()
    assert convex.least_hinge(data, decay) == pytest.approx(theirs, rel=1e-6)
