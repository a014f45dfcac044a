from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from distopt.job.stop import SIGNALS
from tests.harness import cpu_time, distributed, forkserver, jobs, launcher

# Before anything asks: the tests never reach for a hub, and every process computes with one thread.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", help="a file with the markers of `tests/harness/matrix_table.py`: write the matrix there"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(cpu_time.Meter())


# The files that take ten seconds or more, slowest first.
SLOW = (
    *("optimizer", "search", "sam_layouts", "matrix", "watchdog", "cli", "schema", "configs", "bits", "kernels"),
    *("engines", "train_refused", "finetuning", "launcher", "train", "plan", "train_nonfinite", "resume", "rules"),
    *("sam_family", "examples", "docs", "stop", "bench", "compare", "train_resume", "engines_skipped", "wire", "zero1"),
    *("layout", "wheel", "triton", "slurm", "machines", "restart", "launcher_programs", "phases", "packing", "imports"),
    *("average", "trainer", "sam_passes", "command", "data", "export", "checkpoint", "torch_suite", "own_parts"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests that need a GPU where there is none, and puts slow files first, so that workers end together."""
    order = {f"test_{name}": place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if not torch.cuda.is_available() and (gpu := [item for item in items if item.get_closest_marker("gpu")]):
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


def pytest_collection_finish() -> None:
    """Leaves the libraries and the tests out of the garbage collections to come, which took a seventh of the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _ranks() -> Iterator[None]:
    forkserver.start()
    yield
    distributed.stop_all()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A test that leaves a signal ignored changes later ones: the processes that they start ignore it as well."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    now = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert now == before


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    """The command of a program that knows nothing of distopt, with its configuration next to it."""
    return launcher.written(tmp_path)


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    """A folder with the text of a tiny run."""
    jobs.write_text(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 8 steps, `done`, with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    jobs.write_text(folder)
    jobs.train(folder, name="done", schedule="constant", schedule__warmup_steps="0", train__steps="8")
    return folder
