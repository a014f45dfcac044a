from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.harness import distributed

# Before anything asks: the tests never reach for a hub, and every process computes with one thread.
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--table", help="a file with the markers of `tests/harness/matrix_table.py`: write the matrix there"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is marked `gpu` is selected only where there is one."""
    if not torch.cuda.is_available() and (gpu := [item for item in items if item.get_closest_marker("gpu")]):
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in gpu]


@pytest.fixture(scope="session", autouse=True)
def _ranks() -> Iterator[None]:
    yield
    distributed.stop_all()
