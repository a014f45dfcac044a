"""Training runs that are killed and resumed, and checkpoints of something else."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.harness import jobs
from tests.harness.cells import some
from tests.harness.checkpoints import sealed
from tests.harness.faults import die_in_forward, die_in_save
from tests.harness.jobs import overrides, train
from tests.harness.runs import DROPOUT, LONGER, checkpoints, copied, not_one_line, rows, steps

# Resuming

RESUMED: dict[str, dict[str, str]] = {
    "ddp adamw": {"engine": "ddp"},
    "fsdp2 lamb sam micro-batches": {
        "engine": "fsdp2",
        "optimizer": "lamb",
        "sam": "on",
        "train__micro_batch_size": "2",
    },
    "deepspeed_zero3 lamb": {"engine": "deepspeed_zero3", "optimizer": "lamb", "checkpoint__asynchronous": "true"},
}


# The others are for `make matrix`: tests/test_resume.py has every engine, without processes that are killed.
@pytest.mark.parametrize("case", some(["fsdp2 lamb sam micro-batches"], RESUMED))
def test_a_killed_run_resumes_bit_for_bit(cwd: Path, case: str) -> None:
    """kill -9 of one rank in the middle of step 7, resumed from the checkpoint of step 4: as if nothing had been."""
    changes = RESUMED[case]
    same = {**DROPOUT, **changes, "train__steps": "9"}
    train(cwd, 2, name="unbroken", **same)
    passes = 4 if "sam" in changes else 1  # forward passes a step: two micro-batches, twice
    ended = jobs.run(cwd, overrides(name="broken", **same), 2, die_in_forward, 6 * passes + 1)
    # The rank that is left waits for gradients that never come: it has to end by itself, and not well.
    assert ended[1].code == -signal.SIGKILL and ended[0].code not in (0, None)
    broken, unbroken = cwd / "runs" / "broken", cwd / "runs" / "unbroken"
    assert checkpoints(broken) == ["step_00000004"]
    assert steps(broken) == [1, 2, 3, 4, 5, 6]

    ended = train(cwd, 2, name="broken", train__resume="auto", **same)
    assert f"resuming after step 4 from {broken / 'checkpoints' / 'step_00000004'}" in ended[0].out
    assert rows(broken, after=4) == rows(unbroken, after=4)
    assert rows(broken, losses_only=True) == rows(unbroken, losses_only=True)
    assert steps(broken) == list(range(1, 10))
    assert checkpoints(broken) == checkpoints(unbroken) == ["step_00000008", "step_00000009"]


@pytest.mark.matrix
def test_killed_in_the_middle_of_a_save_in_the_background_it_resumes_from_the_one_before(cwd: Path) -> None:
    """kill -9 while step 8's checkpoint is being written and training continues: it is incomplete and does not count,
    that of step 4 does. LookSAM under ZeRO-1 with dropout, so that all there is has to come back."""
    same = {**DROPOUT, "engine": "zero1", "optimizer": "lamb", "sam": "looksam", "checkpoint__asynchronous": "true"}
    same |= {"sam__interval": "3", "train__steps": "9"}
    train(cwd, 2, name="unbroken", **same)
    unbroken = cwd / "runs" / "unbroken"
    for rank, file in ((1, ".bin"), (0, "manifest.json.new")):
        name = f"killed-{rank}{file}"
        broken = cwd / "runs" / name
        ended = jobs.run(cwd, overrides(name=name, **same), 2, die_in_save, 8, file, rank)
        assert ended[rank].code == -signal.SIGKILL and ended[1 - rank].code not in (0, None)
        left = checkpoints(broken)  # rank 0 takes away what it has begun, if it lives for long enough
        assert left == ["step_00000004", "step_00000008"] or (left == ["step_00000004"] and rank == 1)
        ended = train(cwd, 2, name=name, train__resume="auto", **same)
        said = "step_00000008: it has no manifest.json, so it was not written to its end; resuming from step_00000004"
        assert (said in ended[0].out.splitlines()) == (len(left) == 2)
        assert f"resuming after step 4 from {broken / 'checkpoints' / 'step_00000004'}" in ended[0].out
        assert rows(broken, losses_only=True) == rows(unbroken, losses_only=True)
        assert checkpoints(broken) == checkpoints(unbroken) == ["step_00000008", "step_00000009"]


def test_a_half_written_checkpoint_is_passed_over(finished: Path, cwd: Path) -> None:
    """It says which, resumes from the one before, and comes to the same numbers."""
    done = copied(finished, cwd)
    shard = next((done / "checkpoints" / "step_00000008").glob("*/shard-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (done / "checkpoints" / "step_00000010" / "01234567").mkdir(
        parents=True
    )  # what a kill in the middle of a save leaves
    before = rows(done, losses_only=True)

    out = train(cwd, train__resume="auto", **LONGER)[0].out
    said = "step_00000010: it has no manifest.json, so it was not written to its end; resuming from step_00000004"
    assert said in out
    assert re.search(rf"step_00000008: {shard.name} is \d+ bytes, the manifest says \d+; resuming from step_0+4\n", out)
    assert f"resuming after step 4 from {done / 'checkpoints' / 'step_00000004'}" in out
    after = rows(done, losses_only=True)
    assert after[: len(before)] == before and len(after) == 10
    assert checkpoints(done) == ["step_00000008", "step_00000010"]


@pytest.mark.parametrize("engine", some(["fsdp2"], ["fsdp2", "hsdp", "deepspeed_zero2"]))
def test_a_run_resumes_on_another_engine_and_number_of_processes(finished: Path, cwd: Path, engine: str) -> None:
    done = copied(finished, cwd)
    train(cwd, train__resume="auto", **LONGER)
    expected = [row["loss"] for row in rows(done, after=8, losses_only=True)]
    done.rename(cwd / "runs" / "one")
    done = copied(finished, cwd)
    train(cwd, 2, train__resume="auto", engine=engine, checkpoint__asynchronous="true", **LONGER)
    assert [row["loss"] for row in rows(done, after=8, losses_only=True)] == pytest.approx(expected, abs=1e-4)


def test_the_configuration_wins_over_the_checkpoint(finished: Path, cwd: Path) -> None:
    """A run that resumes with another learning rate, schedule or length uses it, from its first step on.

    The checkpoint holds the options of the param groups, and they came back in place of those on the command line: the
    remedy for a run that diverged, a lower lr, did nothing and said nothing.
    """
    done = copied(finished, cwd)
    assert {row["lr"] for row in rows(done, losses_only=True)} == {2e-3}
    train(cwd, train__resume="auto", optimizer__lr="9e-4", **{**LONGER, "schedule": "warmup_linear"})
    # A straight line from 9e-4 at the first step to 0 at the tenth, of which these are the last two.
    assert [row["lr"] for row in rows(done, losses_only=True)] == [2e-3] * 8 + [pytest.approx(1e-4), 0.0]


# Bad input

MISMATCHED: dict[str, tuple[str, ...]] = {
    "model.config.n_embd=32": ("was trained with model.config.n_embd 16, now it is 32: start a new run",),
    "model.config.n_layer=3": ("was trained with model.config.n_layer 2, now it is 3",),
    "model.config.n_head=4": ("was trained with model.config.n_head 2, now it is 4: start a new run",),
    "+model.config.layer_norm_epsilon=1e-6": (
        "was trained with model.config.layer_norm_epsilon 1e-05, now it is 1e-06",
    ),
    "+model.config.activation_function=relu": ("model.config.activation_function gelu_new, now it is relu",),
    "optimizer=lamb": ("the checkpoint is of AdamW", "this run has LAMB"),
    "train.steps=7": ("is already at step 8 of 7: raise train.steps",),
    "train.batch_size=4": ("was trained with batch_size 8, now it is 4",),
    "seed=1": ("was trained with seed 0, now it is 1",),
    "data.validation_fraction=0.2": ("was trained with data",),
}


def test_a_checkpoint_of_something_else_is_refused(finished: Path) -> None:
    before = rows(finished / "runs" / "done")
    saying = {words: ("step_00000008", *expected) for words, expected in MISMATCHED.items()}
    assert not_one_line(finished, saying, train__resume="auto", **LONGER) == {}
    assert rows(finished / "runs" / "done") == before


def test_what_the_model_does_not_compute_with_may_change(finished: Path, cwd: Path) -> None:
    """Dropout, the tokens of generation, and what another version of transformers has written into config.json."""
    done = copied(finished, cwd)

    def change(_: dict[str, Any], files: Path) -> None:
        written = (files / "config.json").read_text()
        (files / "config.json").write_text(written.replace('"transformers_version": "5', '"transformers_version": "4'))
        assert (files / "config.json").read_text() != written

    sealed(done / "checkpoints" / "step_00000008", change)
    words = {f"model__config__{name}_pdrop": "0.2" for name in ("resid", "embd", "attn")}
    (ended,) = jobs.run(cwd, [*overrides(train__resume="auto", **LONGER, **words), "+model.config.eos_token_id=10"])
    assert ended.code == 0, ended.err
    assert steps(done) == list(range(1, 11))


def test_a_run_that_ended_after_its_last_checkpoint_is_ended(finished: Path, cwd: Path) -> None:
    """It was refused for having nothing left to do, and a sweep that was interrupted there could never be finished."""
    done = copied(finished, cwd)
    (done / "curves.png").unlink()
    before = rows(done)
    (ended,) = jobs.run(cwd, overrides(train__resume="auto", **{**LONGER, "train__steps": "8"}))
    assert ended.code == 0, ended.err
    first, loss = before[0]["validation_loss"], before[-1]["validation_loss"]
    assert f"validation loss: {first:.4f} -> {loss:.4f} nats" in ended.out and "resume: " in ended.out
    assert rows(done) == before
    assert (done / "curves.png").is_file() and checkpoints(done) == ["step_00000004", "step_00000008"]


def test_only_the_newest_checkpoint_of_a_run_resumes_in_its_folder(finished: Path) -> None:
    """Newer ones would outlive those of the run that resumes from an older one: they were pruned as soon as written."""
    older = finished / "runs" / "done" / "checkpoints" / "step_00000004"
    (ended,) = jobs.run(finished, overrides(train__resume=str(older), **LONGER))
    assert ended.code == 1
    assert "is not the newest complete checkpoint of its run, step_00000008 is" in ended.err
