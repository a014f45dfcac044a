"""A user's type checker accepts a program that uses the public names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.jobs import ROOT

PROGRAM = ROOT / "tests" / "harness" / "typed_program.py"


def mypy(folder: Path, cache: Path) -> list[str]:
    """The errors in the files of a folder."""
    # Errors inside the package are not the user's: mypy does not show those of installed packages.
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={cache}", "--no-error-summary"]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", *options, *(file.name for file in folder.iterdir())]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 1 and not done.stderr, done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def test_public_names_are_typed_strictly(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """And a wrong argument is an error, so that the annotations were read.

    mypy's cache is kept from one run of the tests to the next: without it mypy reads all of torch.
    """
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM.read_text())
    wrong.write_text(PROGRAM.read_text().replace("rho=0.05", 'rho="0.05"').replace("max_norm=1.0", "max_nrm=1.0"))
    errors = mypy(tmp_path, pytestconfig.cache.mkdir("mypy"))
    assert all(error.startswith("wrong.py:") for error in errors), errors
    assert any('Argument "rho" to "SAM" has incompatible type "str"' in error for error in errors)
    assert any('Unexpected keyword argument "max_nrm" for "clip_grad_norm_"' in error for error in errors)
