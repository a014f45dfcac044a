"""`examples/convex.py`: the rates that theory promises for convex losses, measured."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from tests.harness.jobs import ROOT


@pytest.fixture(scope="module")
def convex() -> Any:
    spec = importlib.util.spec_from_file_location("convex", ROOT / "examples" / "convex.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
