"""Text that is tokenized before a run, or while the other ranks wait outside of any collective."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from distopt import collective
from distopt.data.text_data import TextData
from tests.harness.distributed import run


def prepare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "distopt.prepare", *words, "data=text", "data.path=text.txt", "data.cache_dir=cache"]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some words\n" * 1000)
    ended = prepare(tmp_path, "--processes", "2")
    assert ended.returncode == 0, ended.stderr
    assert "10,781 train and 221 validation tokens" in ended.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "text.txt"]
    (built,) = (tmp_path / "cache").iterdir()
    before = built.stat().st_mtime_ns
    TextData(path=str(tmp_path / "text.txt"), format="text", cache_dir=str(tmp_path / "cache")).build()
    assert list((tmp_path / "cache").iterdir()) == [built] and built.stat().st_mtime_ns == before
    refused = prepare(tmp_path, "--processes", "0")
    assert refused.returncode == 1
    assert refused.stderr.splitlines() == ["distopt: error: --processes must be an integer >= 1, got 0"]


def patient(folder: Path) -> list[str]:
    _set_pg_timeout(timedelta(seconds=1))

    def task() -> str:
        if dist.get_rank() == 0 and not (folder / "done").exists():
            time.sleep(3)
            (folder / "done").touch()
        return f"{dist.get_rank()} {(folder / 'done').exists()}"

    found = collective.one_after_another(task)
    _set_pg_timeout(timedelta(seconds=600))
    with pytest.raises(ValueError, match="rank 1 cannot"):
        collective.one_after_another(refuses)
    return [found]


def refuses() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank 1 cannot")


def test_ranks_wait_longer_than_a_collective_for_the_one_that_works(tmp_path: Path) -> None:
    assert run(2, patient, tmp_path) == [["0 True"], ["1 True"]]
