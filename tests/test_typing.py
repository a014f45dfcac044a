"""A user's type checker accepts a program that uses the public names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.harness.jobs import ROOT

PROGRAM = ROOT / "tests" / "harness" / "typed_program.py"


def mypy(file: Path, cache: Path) -> subprocess.CompletedProcess[str]:
    # Errors inside the package are not the user's: mypy does not show those of installed packages.
    options = ["--strict", "--follow-imports=silent", "--config-file=", f"--cache-dir={cache}"]
    env = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", *options, file.name]
    return subprocess.run(command, cwd=file.parent, env=env, capture_output=True, text=True, timeout=280)


def test_public_names_are_typed_strictly(tmp_path: Path) -> None:
    """And a wrong argument is an error, so that the annotations were read."""
    right, wrong = tmp_path / "right.py", tmp_path / "wrong.py"
    right.write_text(PROGRAM.read_text())
    wrong.write_text(PROGRAM.read_text().replace("rho=0.05", 'rho="0.05"').replace("max_norm=1.0", "max_nrm=1.0"))
    checked = mypy(right, tmp_path / "cache")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    refused = mypy(wrong, tmp_path / "cache")
    assert refused.returncode == 1
    assert 'Argument "rho" to "SAM" has incompatible type "str"' in refused.stdout
    assert 'Unexpected keyword argument "max_nrm" for "clip_grad_norm_"' in refused.stdout
