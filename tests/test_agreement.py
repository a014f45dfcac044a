"""Processes that differ are found before the first step, and the first difference is named on every one of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from distopt.job.agreement import check_agreement
from tests.harness import faults, jobs
from tests.harness.distributed import run
from tests.harness.jobs import overrides

WORDS = {
    "optimizer.lr": ("optimizer.lr=0.5", "0.002 on rank 0, 0.5 on rank 1"),
    "optimizer._target_": ("optimizer=sgd", '"distopt.AdamW" on rank 0, "distopt.SGD" on rank 1'),
    "seed": ("seed=7", "0 on rank 0, 7 on rank 1"),
    "train.batch_size": ("train.batch_size=16", "8 on rank 0, 16 on rank 1"),
    "train.steps": ("train.steps=13", "12 on rank 0, 13 on rank 1"),
    "evaluation.every": ("evaluation.every=5", "6 on rank 0, 5 on rank 1"),
    "model.config.n_layer": ("++model.config.n_layer=1", "2 on rank 0, 1 on rank 1"),
    "engine._target_": ("engine=zero1", '"distopt.engine.DDP" on rank 0, "distopt.engine.Zero1" on rank 1'),
    "train.max_grad_norm": ("train.max_grad_norm=null", "1.0 on rank 0, null on rank 1"),
    "checkpoint.keep": ("checkpoint.keep=3", "2 on rank 0, 3 on rank 1"),
}
QUICK = ("optimizer.lr", "engine._target_")


@pytest.mark.parametrize("key", [pytest.param(key, marks=() if key in QUICK else pytest.mark.matrix) for key in WORDS])
def test_a_configuration_that_differs_is_named_on_every_rank(cwd: Path, key: str) -> None:
    word, sides = WORDS[key]
    ended = jobs.run(cwd, overrides(name="differs"), 2, faults.differ, [word])
    for each in ended:
        assert each.code == 1
        assert f"error: the processes differ: {key} is {sides}; start all with the same command" in each.err


def test_a_rank_without_kernels_is_named(cwd: Path) -> None:
    for each in jobs.run(cwd, overrides(name="differs"), 2, faults.without_kernels):
        assert each.code == 1
        assert 'the processes differ: the kernels in use is "C" on rank 0, "none" on rank 1' in each.err


def test_data_that_differs_is_named(cwd: Path) -> None:
    (cwd / "other").mkdir()
    jobs.write_text(cwd / "other", words=6000)
    for each in jobs.run(cwd, overrides(name="differs"), 2, faults.elsewhere, str(cwd / "other")):
        assert each.code == 1
        assert "the processes differ: the digest of the data is" in each.err and "on rank 0" in each.err


def test_the_ranks_on_either_side_are_told() -> None:
    assert run(4, _claim) == ["the processes differ: b is 0 on ranks 0, 1, 3, 1 on rank 2; mend it"] * 4


def _claim() -> str:
    from distopt import collective

    check_agreement({"a": 1, "b": [1, 2]}, "mend it")
    with pytest.raises(ValueError) as error:
        check_agreement({"a": 1, "b": int(collective.rank() == 2)}, "mend it")
    return str(error.value)
