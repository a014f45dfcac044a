"""Every example runs by its first line, with the same results at one process and at two, on any engine."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from tests.harness.accelerated import start, start_deepspeed, start_fsdp
from tests.harness.cells import some
from tests.harness.distributed import run
from tests.harness.jobs import BIN, ENVIRONMENT, ROOT, fork, launch

SCRIPT = ROOT / "examples" / "accelerate_script.py"
FINETUNE = SCRIPT.with_name("finetune.py")
OWN_TESTS = ("accelerate_script", "convex", "finetune", "robustness")
EXAMPLES = [path for path in sorted(SCRIPT.parent.glob("*.py")) if path.stem not in OWN_TESTS]


def norms(out: str) -> list[float]:
    return [float(number) for number in re.findall(r"gradient norm ([\d.]+)", out)]


# The loss printed is rank 0's own; the norm is global. Three decimals are printed, rounding may tip the last one.
LAST = 2e-3


def example_alone(example: Path, file: Path) -> None:
    """Run an example as torchrun runs the only rank, with its output in a file."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    with file.open("w") as out, contextlib.redirect_stdout(out):
        runpy.run_path(str(example), run_name="__main__")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    """Two processes as in its first line; a single one is forked, which takes a second where a launch takes ten."""
    alone = fork(example_alone, example, tmp_path / "out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(example)]
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(torchrun, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    alone.join(60.0)
    assert alone.exitcode == 0
    expected = norms((tmp_path / "out").read_text())
    assert len(expected) >= 3
    assert norms(done.stdout) == pytest.approx(expected, abs=LAST)


# The Accelerate script, the same for all engines.

ENGINES: dict[str, Callable[[], Any]] = {
    "ddp": start,
    "zero1": start,
    "fsdp2 zero2": lambda: start_fsdp(reshard=False),
    "fsdp2 zero3": start_fsdp,
    "deepspeed zero1": lambda: start_deepspeed(1),
    "deepspeed zero2": lambda: start_deepspeed(2),
    "deepspeed zero3": lambda: start_deepspeed(3),
}


def script_on(engine: str, folder: Path) -> list[float]:
    """The norms that the script prints, with an Accelerator that the launcher of this machine cannot make."""
    import accelerate

    accelerator = ENGINES[engine]()
    accelerator.end_training = lambda: None  # the processes are kept
    spec = importlib.util.spec_from_file_location("script", SCRIPT)
    assert spec is not None and spec.loader is not None
    kept, here, sys.argv = (accelerate.Accelerator, sys.argv), os.getcwd(), ["script", engine[-1].replace("p", "0")]
    os.chdir(folder)
    try:
        accelerate.Accelerator = lambda **kwargs: accelerator
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            module.main()
    finally:
        accelerate.Accelerator, sys.argv = kept
        os.chdir(here)
    return norms(out.getvalue())


@lru_cache
def norms_of_one_process(folder: Path) -> list[float]:
    (printed,) = run(1, script_on, "ddp", folder)
    return printed


@pytest.mark.parametrize("engine", some(["zero1", "fsdp2 zero3", "deepspeed zero2"], ENGINES))
def test_the_accelerate_script_is_the_same_on_every_engine(engine: str, tmp_path: Path) -> None:
    """It saves before its last epoch, loads that, and trains it again."""
    expected = norms_of_one_process(tmp_path)
    printed, nothing = run(2, script_on, engine, tmp_path)
    assert printed == pytest.approx(expected, abs=LAST) and len(expected) == 5
    assert printed[-1] == printed[-2] != printed[-3]
    assert nothing == []


LAUNCH = [str(BIN / "accelerate"), "launch"]
FSDP2 = [*LAUNCH, "--use_fsdp", "--fsdp_version", "2", "--num_processes", "2", "--main_process_port", "0"]


@pytest.mark.matrix
def test_the_accelerate_script_under_accelerate_launch(tmp_path: Path) -> None:
    """As its first line says."""
    ended = launch(tmp_path, [str(SCRIPT)], [*LAUNCH, "--config_file", str(ROOT / "launch" / "local.yaml")])
    assert ended.code == 0, ended.err
    assert norms(ended.out) == pytest.approx(norms_of_one_process(tmp_path), abs=LAST)


@pytest.mark.matrix
def test_what_accelerate_silently_drops_is_refused(tmp_path: Path) -> None:
    """FSDP2 on the CPU."""
    ended = launch(tmp_path, [str(SCRIPT), "3"], FSDP2)
    assert ended.code == 1
    assert "zero_stage=3 was asked, Accelerate prepared DDP" in ended.err and "silently drops" in ended.err


@pytest.mark.matrix
def test_a_model_is_fine_tuned_exported_and_answers(tmp_path: Path) -> None:
    env = {**os.environ, **ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, str(FINETUNE)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    answers = re.findall(r"^What is the capital of (\w+)\?  before: (.*)  after: '(.*)'$", done.stdout, re.MULTILINE)
    assert [(country, after) for country, _, after in answers] == [("Japan", "Tokyo."), ("Peru", "Lima.")]
    assert all(after not in before for _, before, after in answers)
