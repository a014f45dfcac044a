"""Every example runs as its first line says, and gives the same numbers at one process and at two."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs import ENVIRONMENT

FINETUNE = Path("examples/finetune.py")
EXAMPLES = sorted({*Path("examples").glob("*.py")} - {FINETUNE})


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path) -> None:
    outputs, env = [], {**os.environ, **ENVIRONMENT}
    for processes in ("1", "2"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
        done = subprocess.run([*launch, str(example)], env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        outputs.append([float(number) for number in re.findall(r"gradient norm ([\d.]+)", done.stdout)])
    # The loss printed is rank 0's own; the norm is global. Three decimals are printed, rounding may tip the last one.
    assert len(outputs[0]) >= 3
    assert outputs[0] == pytest.approx(outputs[1], abs=2e-3)
    if example.stem == "accelerate_script":  # the last epoch, and the same one from what was saved before it
        for norms in outputs:
            assert norms[-1] == norms[-2] != norms[-3]


def test_a_model_is_fine_tuned_exported_and_answers(tmp_path: Path) -> None:
    env = {**os.environ, **ENVIRONMENT}
    command = [sys.executable, str(FINETUNE.absolute())]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"^What is the capital of (\w+)\?  before: (.*)  after: '(.*)'$", done.stdout, re.MULTILINE)
    assert [(country, after) for country, _, after in answers] == [("Japan", "Tokyo."), ("Peru", "Lima.")]
    assert all(after not in before for _, before, after in answers)
