"""Training runs with gradients that are not finite, and on a disk that is full."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.faults import count_passes, full_disk, nan_weight, poison, spoil_one_layer
from tests.harness.jobs import metrics, overrides, train
from tests.harness.runs import checkpoints, rows

POISONED: dict[str, tuple[dict[str, str], int]] = {  # and the forward passes of a step
    "fsdp2 lamb": ({"engine": "fsdp2", "optimizer": "lamb"}, 1),
    "ddp sam": ({"engine": "ddp", "sam": "on"}, 2),
    "deepspeed_zero3 adamw": ({"engine": "deepspeed_zero3", "optimizer": "adamw"}, 1),
}


@pytest.mark.parametrize("case", some(["fsdp2 lamb", "ddp sam"], POISONED))
def test_a_step_without_a_finite_gradient_is_skipped_on_every_rank(cwd: Path, case: str) -> None:
    """One rank has a loss that is not finite in steps 3 to 6: weights and state stay as they are everywhere."""
    changes, passes = POISONED[case]
    # With SAM in the first pass of a step and in the second.
    first, second = (lambda step: (step - 1) * passes + 1), (lambda step: step * passes)
    factors = {first(3): math.nan, second(4): math.nan, first(5): math.inf, second(6): math.inf}
    train(cwd, 2, poison, factors, str(cwd), name="p", train__steps="8", **changes)
    ranks = [[json.loads(line) for line in (cwd / f"steps-{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
    for done in ranks:
        assert [applied for applied, _ in done] == [True, True, False, False, False, False, True, True]
        digests = [state for _, state in done]
        assert len(set(digests[1:6])) == 1
        assert len(set(digests)) == 4
    training = rows(cwd / "runs" / "p", losses_only=True)
    assert [row["skipped"] for row in training] == [0, 0, 1, 2, 3, 4, 4, 4]
    assert [math.isfinite(row["grad_norm"]) for row in training] == [True, True, *[False] * 4, True, True]
    assert all(math.isfinite(row["validation_loss"]) for row in metrics(cwd / "runs" / "p") if "validation_loss" in row)


def test_the_second_pass_of_sam_moves_no_statistics(cwd: Path) -> None:
    """The job did not tell SAM of its model."""
    train(cwd, 1, count_passes, str(cwd / "passes"), sam="on", train__steps="3")
    assert (cwd / "passes").read_text().split() == ["1", "2", "3"]


def test_many_skipped_steps_end_the_run(cwd: Path) -> None:
    """Two, a good one, then three in a row: only those end it, on every rank, with step, layer and remedy."""
    ended = jobs.run(
        cwd,
        overrides(name="p", train__max_skipped_steps="3", engine="fsdp2"),
        2,
        poison,
        dict.fromkeys((2, 3, 5, 6, 7), math.nan),
        str(cwd),
    )
    for rank, (code, _, err) in enumerate(ended):
        assert code == 1
        assert "Traceback" not in err
        assert re.search(
            rf"^distopt{' .rank 1.' * rank}: error: stopped at step 7: the gradient was not finite 3 steps in a row; "
            r"28 parameters are not finite, the first is transformer.wte.weight. Lower optimizer.lr or raise "
            r"schedule.warmup_steps$",
            err,
            re.MULTILINE,
        ), err
    assert [row["skipped"] for row in rows(cwd / "runs" / "p", losses_only=True)] == [0, 1, 2, 2, 3, 4, 5]
    assert checkpoints(cwd / "runs" / "p") == ["step_00000004"]


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.matrix)])
def test_a_weight_that_is_not_finite_is_in_no_checkpoint(cwd: Path, engine: str) -> None:
    """Every later step is skipped; the checkpoints of before stay, and neither they nor the end call it good."""
    words = overrides(name="spoilt", engine=engine, checkpoint__every="2", train__max_skipped_steps="10")
    for code, _, err in jobs.run(cwd, words, 2, nan_weight, 5):
        assert code == 1
        assert re.search(r"the run has diverged: its validation loss is nan; train.resume=auto resumes from ", err)
    assert checkpoints(cwd / "runs" / "spoilt") == ["step_00000002", "step_00000004"]
    out = train(cwd, 2, name="spoilt", engine=engine, checkpoint__every="2", train__resume="auto")[0].out
    assert "resuming after step 4" in out and "nan" not in out


BROKEN: dict[str, tuple[dict[str, str], int]] = {  # and the number of ranks
    "ddp": ({}, 1),
    "zero1 lamb": ({"engine": "zero1", "optimizer": "lamb"}, 2),
    "ddp sam": ({"sam": "on"}, 1),
    "ddp asam local": ({"sam": "asam", "sam__scope": "local"}, 2),
}


@pytest.mark.parametrize("case", some(["zero1 lamb", "ddp sam"], BROKEN))
@pytest.mark.parametrize("value", some([math.nan], [math.nan, math.inf]))
def test_the_layer_that_is_not_finite_is_named(cwd: Path, case: str, value: float) -> None:
    """And no other: clipping by a norm that is nan, and SAM's second pass after a first that broke, make all so."""
    name = "transformer.h.1.mlp.c_fc.weight"
    changes, world = BROKEN[case]
    words = overrides(train__max_skipped_steps="2", **changes)
    for code, _, err in jobs.run(cwd, words, world, spoil_one_layer, name, value):
        assert code == 1
        assert f"not finite 2 steps in a row; 1 parameters are not finite, the first is {name}." in err


def test_the_layer_that_deepspeed_does_not_tell(cwd: Path) -> None:
    """In one process without a launcher, where DeepSpeed itself did not start."""
    name = "transformer.h.1.mlp.c_fc.weight"
    words = overrides(train__max_skipped_steps="2", engine="deepspeed_zero2")
    for code, _, err in jobs.run(cwd, words, 1, spoil_one_layer, name, math.nan):
        assert code == 1
        assert "2 steps in a row; DeepSpeed has freed it, so the parameter is unknown: another engine" in err


@pytest.mark.parametrize("value", some([math.inf], [math.nan, math.inf]))
def test_layers_are_written_at_a_step_that_is_skipped(cwd: Path, value: float) -> None:
    """Their norms were divided by the factor of clipping, 0 where the norm was inf: the run ended with an error."""
    name = "transformer.h.1.mlp.c_fc.weight"
    short = {"train__steps": "2", "schedule__warmup_steps": "0", "evaluation__every": "1", "checkpoint__every": "2"}
    train(cwd, 1, spoil_one_layer, name, value, **short)
    written = (cwd / "runs" / "train" / "layers.jsonl").read_text().splitlines()
    norms = [json.loads(line)["grad_norm"] for line in written]
    assert len(norms) == 2
    for row in norms:
        assert [layer for layer, norm in row.items() if not math.isfinite(norm)] == [name]


@pytest.mark.parametrize("asynchronous", some(["true"], ["false", "true"]))
def test_a_disk_that_is_full_ends_every_rank_with_one_line(cwd: Path, asynchronous: str) -> None:
    """And with the checkpoint before, from which the run resumes when there is space."""
    words = overrides(name="full", engine="fsdp2", checkpoint__asynchronous=asynchronous)
    for rank, (code, _, err) in enumerate(jobs.run(cwd, words, 2, full_disk, 1, 1)):
        assert code == 1 and "Traceback" not in err, err
        (line,) = re.findall(r"^distopt.*: error: .*$", err, re.MULTILINE)
        assert line.startswith("distopt: error: " if rank == 0 else "distopt (rank 1): error: ")
        assert "step_00000008" in line and "rank 1" in line and "No space left on device" in line
    assert (cwd / "runs" / "full" / "checkpoints" / "step_00000004").is_dir()
    assert "resuming after step 4" in train(cwd, 2, name="full", engine="fsdp2", train__resume="auto")[0].out


def test_a_learning_rate_that_is_too_large_ends_the_run(cwd: Path) -> None:
    words = overrides(optimizer="sgd", optimizer__lr="1e30", train__max_skipped_steps="4", train__max_grad_norm="null")
    ended = jobs.run(cwd, words, 2)
    assert [rank.code for rank in ended] == [1, 1]
    assert "stopped at step" in ended[0].err and "Lower optimizer.lr" in ended[0].err
