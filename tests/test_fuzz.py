"""Random command lines and data files: each is a run, or one clear line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.harness.fuzz.run import fuzz

CASES = int(os.environ.get("DISTOPT_FUZZ_CASES", "1500"))
SEED = int(os.environ.get("DISTOPT_FUZZ_SEED", "0"))


def test_some_that_were_once_wrong(tmp_path: Path) -> None:
    counts, faults = fuzz(tmp_path, 0, seed=0, every=4)
    assert faults == [], counts


@pytest.mark.matrix
@pytest.mark.timeout(0)
def test_many_command_lines_and_files(tmp_path: Path) -> None:
    counts, faults = fuzz(tmp_path, CASES, SEED)
    print(counts)
    assert faults == [], counts
