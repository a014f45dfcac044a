"""`optimizer=mezo` in `distopt.train`: the same on every engine that it has, resumed, and refused with the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.harness import jobs
from tests.harness.jobs import metrics, overrides, write_text

# Steps as large as a model from scratch bears, so that eight of them matter.
MEZO = {
    "optimizer": "mezo",
    "optimizer.lr": "1e-3",
    "optimizer.eps": "1e-2",
    "train.max_grad_norm": "null",
    "schedule": "constant",
    "train.micro_batch_size": "2",
    "evaluation.every": "4",
    "evaluation.sample_tokens": "0",
    "model.config.resid_pdrop": "0.1",
}


def words(**changes: str | None) -> list[str]:
    changed = {name.replace(".", "__"): value for name, value in MEZO.items()} | changes
    return overrides(schedule__warmup_steps=None, **changed)


def trained(cwd: Path, world: int, **changes: str) -> list[dict[str, Any]]:
    ended = jobs.start(cwd, words(**changes), world).wait(280.0)
    assert [rank.code for rank in ended] == [0] * world, "\n".join(rank.err for rank in ended)
    return metrics(cwd / "runs" / changes["name"])


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row[name] for row in rows for name in ("loss", "validation_loss") if name in row]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


@pytest.mark.matrix
def test_a_run_is_the_same_on_shards_and_after_a_stop(folder: Path) -> None:
    """The noise is the same at every world size; its slope is the difference of two float32 losses over 2 eps."""
    plain = {"model__config__resid_pdrop": "0.0"}  # every process has a dropout of its own
    one = trained(folder, 1, name="one", engine="ddp", train__steps="4", **plain)
    two = trained(folder, 2, name="two", engine="fsdp2", train__steps="4", **plain)
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    slopes = [[row["grad_norm"] for row in rows if "loss" in row] for rows in (one, two)]
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-2) and min(slopes[0]) > 1e-3
    unbroken = trained(folder, 2, name="unbroken", engine="fsdp2", train__steps="8")
    trained(folder, 2, name="stopped", engine="fsdp2", train__steps="4")
    resumed = trained(folder, 2, name="stopped", engine="fsdp2", train__steps="8", train__resume="auto")
    assert losses(resumed)[-5:] == losses(unbroken)[-5:]  # bit for bit: the count of steps is in the checkpoint
    assert len(set(losses(unbroken))) == len(losses(unbroken))


REFUSED = {
    "optimizer=mezo has no gradients to clip, to ascend or to watch: give train.max_grad_norm=null": {
        "train.max_grad_norm": "1.0"
    },
    "has no gradients to clip, to ascend or to watch: give sam=off": {"sam": "on"},
    "engine=zero1 shards the optimizer's state, and MeZO has none: use engine=ddp or fsdp2": {"engine": "zero1"},
    "DeepSpeed owns the weights, which MeZO moves itself": {"engine": "deepspeed_zero3"},
    "eps must be a number > 0, got 0": {"optimizer.eps": "0.0"},
}


def test_what_it_has_not_is_refused(folder: Path) -> None:
    commands = [words(**{k.replace(".", "__"): v for k, v in changes.items()}) for changes in REFUSED.values()]
    for message, ended in zip(REFUSED, jobs.one_after_another(folder, commands), strict=True):
        assert ended.code == 1 and message in ended.err, ended.err
        assert len(ended.err.splitlines()) == 1
