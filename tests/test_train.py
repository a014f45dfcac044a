"""Training runs: resumed, killed, at several numbers of processes, with gradients that are not finite, with bad input.

Every rank is a process of its own that runs the command line's `main` (`tests.harness.jobs`); faults are injected into
it.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distopt
from tests.harness import jobs
from tests.harness.jobs import metrics, overrides, train

CONF = Path(__file__).parents[1] / "conf"
OPTIMIZERS = sorted(file.stem for file in (CONF / "optimizer").glob("*.yaml"))
# What a resumed run has to give back: masks of dropout.
DROPOUT = {f"model__config__{name}_pdrop": "0.1" for name in ("resid", "embd", "attn")}
TIMES = ("tokens_per_second",)  # the one number that two equal runs do not share


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    jobs.write_text(tmp_path)
    return tmp_path


def rows(run: Path, after: int = -1, losses_only: bool = False) -> list[dict[str, Any]]:
    """A run's metrics after a step, without the times."""
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(run) if row["step"] > after]
    return [row for row in kept if "loss" in row] if losses_only else kept


def steps(run: Path) -> list[int]:
    return [row["step"] for row in metrics(run) if "loss" in row]


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# Faults, called in a rank before it runs


def die_in_forward(call: int, rank: int = 1) -> None:
    """SIGKILL to one rank in the forward pass of a training step, while the others wait for its gradients."""
    from distopt.engine import train_step
    from distopt.job import job as program

    calls = iter(range(1, 1_000_000))

    def fatal(*args: Any) -> torch.Tensor:
        loss = train_step.next_token_loss(*args)
        if next(calls) == call and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    program.update = functools.partial(train_step.update, loss=fatal)


def die_in_save(step: int, file: str, rank: int) -> None:
    """Kills a rank when it has written a file of that step's checkpoint, and is about to put it on the disk."""
    sync = os.fsync

    def fatal(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if f"step_{step:08d}" in path and file in path and int(os.environ.get("RANK", "0")) == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(handle)

    os.fsync = fatal


def poison(factors: dict[int, float], folder: str) -> None:
    """Makes the loss of rank 1 not finite in some forward passes, and writes what every step did to this rank."""
    from distopt.engine import train_step
    from distopt.job import job as program

    rank = int(os.environ.get("RANK", "0"))
    count, log = iter(range(1, 1_000_000)), Path(folder) / f"steps-{rank}.jsonl"

    def poisoned(*args: Any) -> torch.Tensor:
        loss = train_step.next_token_loss(*args)
        return loss * factors.get(next(count), 1.0) if rank == 1 else loss

    def watched(engine: Any, model: Any, optimizer: Any, *args: Any) -> Any:
        done = train_step.update(engine, model, optimizer, *args, loss=poisoned)
        with log.open("a") as file:
            file.write(json.dumps([done.applied, digest(optimizer)]) + "\n")
        return done

    program.update = watched


def digest(optimizer: distopt.ShardedOptimizer) -> str:
    """Of this rank's part of the weights, as the optimizer steps them, and of its state, bit for bit."""
    tensors = [*optimizer.layout.segments, *(t for state in optimizer.state.values() for t in state.values())]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return hashlib.blake2b(b"".join(t.detach().contiguous().numpy().tobytes() for t in local)).hexdigest()


def full_disk(rank: int, saves: int) -> None:
    """After so many checkpoints this rank has no space left."""
    from distopt.job import job as program

    if int(os.environ.get("RANK", "0")) != rank:
        return
    save, count = program.Checkpointer.save, iter(range(1, 1000))

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def saved(*args: Any) -> Path:
        if next(count) > saves:
            os.fsync = full
        return save(*args)

    program.Checkpointer.save = saved


def spoil_one_layer(name: str, value: float) -> None:
    """Makes the gradient of one layer not finite, in every step."""
    from distopt.job import job as program

    update = program.update

    def spoiled(engine: Any, model: Any, *args: Any) -> Any:
        parameter = dict(engine.unwrap(model).named_parameters())[name]
        handle = parameter.register_hook(lambda grad: grad * value)
        try:
            return update(engine, model, *args)
        finally:
            handle.remove()

    program.update = spoiled


def count_passes(file: str) -> None:
    """Gives the model a statistic that every forward pass moves, as batch norm does, and writes it after each step."""
    from distopt.job import job as program

    update = program.update

    def count(module: Any, *_: Any) -> None:
        module.passes += int(torch.is_grad_enabled())

    def counted(engine: Any, model: Any, *args: Any) -> Any:
        inner = engine.unwrap(model)
        if not hasattr(inner, "passes"):
            inner.register_buffer("passes", torch.zeros((), dtype=torch.int64), persistent=False)
            inner.register_forward_hook(count)
        done = update(engine, model, *args)
        with Path(file).open("a") as lines:
            lines.write(f"{int(inner.passes)}\n")
        return done

    program.update = counted


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


# What takes longest is for `make matrix`: tests/test_resume.py has every engine, without processes that are killed.
@pytest.mark.parametrize(
    "changes",
    [pytest.param(row, id=name, marks=[pytest.mark.matrix] * ("deepspeed" in name)) for name, row in RESUMED.items()],
)
def test_a_killed_run_goes_on_bit_for_bit(cwd: Path, changes: dict[str, str]) -> None:
    """kill -9 of one rank in the middle of step 7, resumed from the checkpoint of step 4: as if nothing had been."""
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
def test_killed_in_the_middle_of_a_save_in_the_background_it_goes_on_from_the_one_before(cwd: Path) -> None:
    """kill -9 while step 8's checkpoint is being written and training goes on: that of step 4 is whole, what is half
    written does not count. LookSAM under ZeRO-1 with dropout, so that all there is has to come back."""
    same = {**DROPOUT, "engine": "zero1", "optimizer": "lamb", "sam": "looksam", "checkpoint__asynchronous": "true"}
    same |= {"sam__interval": "3", "train__steps": "9"}
    train(cwd, 2, name="unbroken", **same)
    unbroken = cwd / "runs" / "unbroken"
    for rank, file in ((1, ".distcp"), (0, "manifest.json")):
        name = f"killed-{rank}{file}"
        broken = cwd / "runs" / name
        ended = jobs.run(cwd, overrides(name=name, **same), 2, die_in_save, 8, file, rank)
        assert ended[rank].code == -signal.SIGKILL and ended[1 - rank].code not in (0, None)
        assert checkpoints(broken) == ["step_00000004", "step_00000008.tmp"]
        ended = train(cwd, 2, name=name, train__resume="auto", **same)
        said = "step_00000008.tmp: it was not written to its end; resuming from step_00000004"
        assert said in ended[0].out.splitlines()
        assert f"resuming after step 4 from {broken / 'checkpoints' / 'step_00000004'}" in ended[0].out
        assert rows(broken, losses_only=True) == rows(unbroken, losses_only=True)
        assert checkpoints(broken) == checkpoints(unbroken) == ["step_00000008", "step_00000009"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of 8 steps, `done`, with the checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("finished")
    jobs.write_text(folder)
    train(folder, name="done", schedule="constant", schedule__warmup_steps="0", train__steps="8")
    return folder


def copied(finished: Path, cwd: Path) -> Path:
    """The finished run, for a test to spoil."""
    for file in (finished / "runs").rglob("*"):
        if file.is_file():
            target = cwd / "runs" / file.relative_to(finished / "runs")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    return cwd / "runs" / "done"


LONGER = {"name": "done", "schedule": "constant", "schedule__warmup_steps": "0", "train__steps": "10"}


def test_a_half_written_checkpoint_is_passed_over(finished: Path, cwd: Path) -> None:
    """It says which, goes on from the one before, and comes to the same numbers."""
    done = copied(finished, cwd)
    shard = next((done / "checkpoints" / "step_00000008").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (done / "checkpoints" / "step_00000010.tmp").mkdir()  # what a kill in the middle of a save leaves
    before = rows(done, losses_only=True)

    out = train(cwd, train__resume="auto", **LONGER)[0].out
    assert "step_00000010.tmp: it was not written to its end; resuming from step_00000004" in out
    assert re.search(rf"step_00000008: {shard.name} is \d+ bytes, the manifest says \d+; resuming from step_0+4\n", out)
    assert f"resuming after step 4 from {done / 'checkpoints' / 'step_00000004'}" in out
    after = rows(done, losses_only=True)
    assert after[: len(before)] == before and len(after) == 10
    assert checkpoints(done) == ["step_00000008", "step_00000010"]


@pytest.mark.parametrize("engine", ["fsdp2", "hsdp", "deepspeed_zero2"])
def test_another_number_of_processes_and_engine_goes_on(finished: Path, cwd: Path, engine: str) -> None:
    done = copied(finished, cwd)
    train(cwd, train__resume="auto", **LONGER)
    expected = [row["loss"] for row in rows(done, after=8, losses_only=True)]
    done.rename(cwd / "runs" / "one")
    done = copied(finished, cwd)
    train(cwd, 2, train__resume="auto", engine=engine, checkpoint__asynchronous="true", **LONGER)
    assert [row["loss"] for row in rows(done, after=8, losses_only=True)] == pytest.approx(expected, abs=1e-4)


def test_the_configuration_wins_over_the_checkpoint(finished: Path, cwd: Path) -> None:
    """A run that goes on with another learning rate, schedule or length uses it, from its first step on.

    The checkpoint holds the options of the param groups, and they came back in place of those on the command line: the
    remedy for a run that diverged, a lower lr, did nothing and said nothing.
    """
    done = copied(finished, cwd)
    assert {row["lr"] for row in rows(done, losses_only=True)} == {2e-3}
    train(cwd, train__resume="auto", optimizer__lr="9e-4", **{**LONGER, "schedule": "warmup_linear"})
    # A straight line from 9e-4 at the first step to 0 at the tenth, of which these are the last two.
    assert [row["lr"] for row in rows(done, losses_only=True)] == [2e-3] * 8 + [pytest.approx(1e-4), 0.0]


# Folders


def test_an_older_run_is_moved_aside(finished: Path, cwd: Path) -> None:
    done = copied(finished, cwd)
    old = rows(done)
    for number in (1, 2):
        out = train(cwd, **{**LONGER, "train__steps": str(number)})[0].out
        assert f"{done} contained an older run: moved to {done}-{number}" in out
        assert steps(done) == list(range(1, number + 1))
    assert rows(done.with_name("done-1")) == old
    assert checkpoints(done.with_name("done-1")) == ["step_00000004", "step_00000008"]
    assert steps(done.with_name("done-2")) == [1]


def test_a_refused_command_moves_nothing(finished: Path, cwd: Path) -> None:
    """The run was moved aside before the data were looked at, and was not found again by train.resume=auto."""
    done = copied(finished, cwd)
    for word in ("train.sequence_length=65", "trackers=[nope]", "model.config.n_head=3"):
        (ended,) = jobs.run(cwd, [*overrides(**LONGER), word])
        assert ended.code == 1
    assert [path.name for path in done.parent.iterdir()] == ["done"]
    assert len(steps(done)) == 8


def test_another_runs_checkpoint_leaves_the_run_of_this_name_alone(finished: Path, cwd: Path) -> None:
    """Going on from another run's checkpoint is a new run: it wrote into, and pruned, the older run of its own name."""
    done = copied(finished, cwd)
    train(cwd, **{**LONGER, "name": "mine", "train__steps": "3"})
    start = done / "checkpoints" / "step_00000004"
    out = train(cwd, **{**LONGER, "name": "mine", "train__resume": str(start)})[0].out
    assert f"{cwd / 'runs' / 'mine'} contained an older run: moved to {cwd / 'runs' / 'mine-1'}" in out
    assert steps(cwd / "runs" / "mine-1") == [1, 2, 3]
    assert steps(cwd / "runs" / "mine") == [5, 6, 7, 8, 9, 10]
    assert rows(cwd / "runs" / "mine", after=4, losses_only=True)[:4] == rows(done, after=4, losses_only=True)


def test_what_is_no_run_is_left_alone(cwd: Path) -> None:
    """`name=..` once moved the folder aside in which the command was given."""
    thesis = cwd / "runs" / "thesis"
    thesis.mkdir(parents=True)
    (thesis / "chapter1.tex").write_text("In the beginning")
    (ended,) = jobs.run(cwd, overrides(name="thesis", train__steps="1", schedule__warmup_steps="0"))
    assert (ended.code, ended.err.strip().splitlines()[-1]) == (
        1,
        f"distopt: error: {thesis} contains something that is no run: choose another name",
    )
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis"]
    assert (thesis / "chapter1.tex").read_text() == "In the beginning"


# The mathematics


def test_the_loss_does_not_depend_on_the_number_of_processes(cwd: Path) -> None:
    curves = {}
    for world in (1, 2, 4):
        train(cwd, world, name=f"w{world}", engine="fsdp2", optimizer="lamb", train__steps="8")
        curves[world] = rows(cwd / "runs" / f"w{world}")
    for name in ("loss", "validation_loss", "grad_norm"):
        one, two, four = ([row[name] for row in curve if name in row] for curve in curves.values())
        assert two == pytest.approx(one, abs=1e-4) and four == pytest.approx(one, abs=1e-4)
    losses = [row["loss"] for row in curves[1] if "loss" in row]
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.matrix
def test_micro_batches_and_precision_are_the_same_step(cwd: Path) -> None:
    """Accumulated gradients are those of the whole batch; bf16 is near, and is not the same."""
    runs = {
        "whole": {},
        "micro": {"train__micro_batch_size": "1"},
        "zero2": {"engine": "zero2", "train__micro_batch_size": "2"},
        "bf16": {"engine__precision": "bf16"},
        "checkpointing": {"engine": "fsdp2", "engine__activation_checkpointing": "true"},
    }
    losses = {}
    for name, changes in runs.items():
        train(cwd, 2, name=name, train__steps="4", **changes)
        losses[name] = [row["loss"] for row in rows(cwd / "runs" / name, losses_only=True)]
    for name in ("micro", "zero2", "checkpointing"):
        assert losses[name] == pytest.approx(losses["whole"], abs=1e-5)
    assert losses["bf16"] == pytest.approx(losses["whole"], abs=0.05)
    assert losses["bf16"] != losses["whole"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, jobs.Ended]:
    """One command that trains with every optimizer of conf/ in turn, on the text that every machine has."""
    folder = tmp_path_factory.mktemp("sweep")
    changes: dict[str, str | None] = {
        "data": "stdlib",
        "data__path": None,
        "data__validation_fraction": None,
        "train__steps": "20",
        "train__sequence_length": "32",
        "schedule__warmup_steps": "3",
        "evaluation__every": "20",
        "evaluation__max_sequences": "32",
        "evaluation__sample_tokens": "0",
        "checkpoint__every": "20",
        "model__config__n_embd": "32",
    }
    (ended,) = jobs.run(folder, ["-m", *overrides(**changes), f"optimizer={','.join(OPTIMIZERS)}"])
    assert ended.code == 0, ended.err
    return folder, ended


@pytest.mark.parametrize("choice", OPTIMIZERS)
def test_every_optimizer_learns(sweep: tuple[Path, jobs.Ended], choice: str) -> None:
    run = sweep[0] / "runs" / "train" / str(OPTIMIZERS.index(choice))
    before, after = (row["validation_loss"] for row in metrics(run) if "validation_loss" in row)
    assert before == pytest.approx(math.log(256), abs=0.2)  # untrained: all bytes are alike
    assert after < before - 0.25
    assert len(steps(run)) == 20 and metrics(run)[-1]["step"] == 20


def test_a_job_of_a_sweep_says_how_to_go_on_with_itself(sweep: tuple[Path, jobs.Ended]) -> None:
    """Without its folder in the command, every job of a sweep would have gone on in runs/train."""
    folder, ended = sweep
    commands = [shlex.split(command) for command in re.findall("^resume:(.*)$", ended.out, re.MULTILINE)]
    assert len(commands) == len(OPTIMIZERS)
    words = [*commands[-1][commands[-1].index("distopt.train") + 1 :], "train.steps=21"]
    (again,) = jobs.run(folder, words)
    last = folder / "runs" / "train" / str(len(OPTIMIZERS) - 1)
    assert again.code == 0, again.err
    assert f"resuming after step 20 from {last / 'checkpoints' / 'step_00000020'}" in again.out
    assert steps(last) == list(range(1, 22))


def ascii_terminal() -> None:
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]


def test_a_sample_is_shown_on_any_terminal(cwd: Path) -> None:
    """A run ended with an error, after all its steps, where the terminal had no character for what was sampled."""
    changes = {"train__steps": "1", "schedule__warmup_steps": "0", "evaluation__sample_tokens": "4"}
    for before, shown in ((ascii_terminal, r"caf\xe9 \ufffd[2J"), (None, "café \ufffd[2J")):
        (ended,) = train(cwd, 1, before, evaluation__prompt='"café \x1b[2J"', **changes)
        assert f"sample: {shown}" in ended.out and "curves: " in ended.out


# Gradients that are not finite

POISONED: dict[str, tuple[dict[str, str], int]] = {  # and the forward passes of a step
    "fsdp2 lamb": ({"engine": "fsdp2", "optimizer": "lamb"}, 1),
    "ddp sam": ({"engine": "ddp", "sam": "on"}, 2),
    "deepspeed_zero3 adamw": ({"engine": "deepspeed_zero3", "optimizer": "adamw"}, 1),
}


@pytest.mark.parametrize(("changes", "passes"), POISONED.values(), ids=POISONED)
def test_a_step_without_a_finite_gradient_is_skipped_on_every_rank(
    cwd: Path, changes: dict[str, str], passes: int
) -> None:
    """One rank has a loss that is not finite in steps 3 to 6: no rank moves weights or state, and training goes on."""
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


BROKEN: dict[str, tuple[dict[str, str], int]] = {  # and the number of ranks
    "ddp": ({}, 1),
    "zero1 lamb": ({"engine": "zero1", "optimizer": "lamb"}, 2),
    "ddp sam": ({"sam": "on"}, 1),
    "ddp asam local": ({"sam": "asam", "sam__scope": "local"}, 2),
}


@pytest.mark.parametrize(("changes", "world"), BROKEN.values(), ids=BROKEN)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_layer_that_is_not_finite_is_named(cwd: Path, changes: dict[str, str], world: int, value: float) -> None:
    """And no other: clipping by a norm that is nan, and SAM's second pass after a first that broke, make all so."""
    name = "transformer.h.1.mlp.c_fc.weight"
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


@pytest.mark.parametrize("value", [math.nan, math.inf])
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


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_disk_that_is_full_ends_every_rank_with_one_line(cwd: Path, asynchronous: str) -> None:
    """And with the checkpoint before, from which the run goes on when there is space."""
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


# Bad input

REFUSED: dict[str, tuple[str, ...]] = {  # words added to the command: what the one line has to hold
    "optimizer.lr=-1": ("lr must be a number >= 0, got -1",),
    "optimizer.lr=nan": ("lr must be a number >= 0, got nan",),
    "optimizer.lr=abc": ("lr must be a number >= 0, got 'abc'",),
    "optimizer.betas=[0.9,1.0]": ("betas must be two numbers in [0, 1), got [0.9, 1.0]",),
    "optimizer.weight_decay=-1": ("weight_decay must be a number >= 0, got -1",),
    "+optimizer.lrr=1": ("nothing reads optimizer.lrr: did you mean lr?",),
    "sam=on sam.rho=-1": ("rho must be a number > 0, got -1", "leave SAM out"),
    "schedule.warmup_steps=12": ("warmup_steps must be less than total_steps = 12, got 12", "shorten the warmup"),
    "schedule.final_lr_ratio=3": ("schedule.final_lr_ratio must be a number in [0, 1], got 3",),
    "train.steps=0": ("train.steps must be an integer >= 1, got 0",),
    "train.steps=1.5": ("train.steps must be an integer >= 1, got 1.5",),
    "train.batch_size=7": ("train.batch_size=7 is not a multiple of the 2 processes",),
    "train.micro_batch_size=3": ("train.micro_batch_size=3 does not divide the 4 sequences",),
    "train.micro_batch_size=abc": ("train.micro_batch_size must be an integer >= 1 or null, got 'abc'",),
    "train.max_grad_norm=0": ("train.max_grad_norm must be a number > 0 or null, got 0",),
    "train.prove_every=-1": ("train.prove_every must be an integer >= 0 or null, got -1",),
    "train.max_skipped_steps=0": ("train.max_skipped_steps must be an integer >= 1, got 0",),
    "train.timeout_minutes=abc": ("train.timeout_minutes must be a number in [0.1, 525600], got 'abc'",),
    "train.sequence_length=65": ("train.sequence_length=65 is longer than the model's 64 positions", "shorten it"),
    "train.sequence_length=99999": ("train has", "one sequence needs sequence_length + 1 = 100000", "give more text"),
    "train.resume=nowhere": ("train.resume=nowhere: no such folder", "give never, auto"),
    "train.resume=cache": ("cache is not a complete checkpoint", "manifest.json"),
    "evaluation.every=0": ("evaluation.every must be an integer >= 1, got 0",),
    "evaluation.sample_tokens=-1": ("evaluation.sample_tokens must be an integer >= 0, got -1",),
    "evaluation.prompt=5": ("evaluation.prompt must be text, got 5", "quote it"),
    "checkpoint.every=0": ("checkpoint.every must be an integer >= 1, got 0",),
    "checkpoint.keep=0": ("checkpoint.keep must be an integer >= 1, got 0",),
    "seed=-1": ("seed must be an integer >= 0, got -1",),
    "seed=abc": ("seed must be an integer >= 0, got 'abc'",),
    "name=": ("name must be the name of a folder below runs/, got ''",),
    "name=..": ("name must be the name of a folder below runs/, got '..'",),
    "data.path=nowhere.txt": ("nowhere.txt does not exist", "give path="),
    "data.path=empty.txt": ("empty.txt holds no non-empty text file", "give another path"),
    "data.path=latin.txt": ("latin.txt is not UTF-8 at byte 3", "convert it"),
    "data.validation_fraction=2": ("data.validation_fraction must be a number in (0, 1), got 2",),
    "engine.precision=fp16": ("engine.precision must be one of auto, fp32, bf16, got 'fp16'",),
    "engine=hsdp engine.replicas=3": ("engine.replicas=3 does not divide the 2 processes", "choose a divisor of 2"),
    "engine=fsdp2 engine.replicas=0": ("engine.replicas must be an integer >= 1, got 0",),
    "trackers=[tensorbord]": ("trackers: unknown 'tensorbord', choose from", "tensorboard"),
    "trackers=nope": ("trackers: unknown 'nope', choose from",),
    "model.path=cache": ("model.path=cache: no config.json there", "save_pretrained"),
    "model.family=gtp2": ("model.family=gtp2 is no model type of transformers; gpt2 is one",),
    "model.config.n_layer=abc": ("model.config: ", "'n_layer' expected int, got str (value: 'abc')"),
    "model.config.n_head=3": ("`embed_dim` must be divisible by num_heads", "16", "3"),
    "model.config.vocab_size=9": ("the data has 256 tokens, model.config.vocab_size=9 is less: leave it out",),
    "model.family=mixtral model.config={num_hidden_layer:2}": (
        "model.config.num_hidden_layer: MixtralConfig has no such option: did you mean num_hidden_layers?",
    ),
    "model.config.n_iner=64": ("model.config.n_iner: GPT2Config has no such option: did you mean n_inner?",),
    "param_groups.overrides={wqe:{lr:1}}": ("no trainable parameter follows the override 'wqe'",),
    "param_groups.overrides={wte:{lr:-1}}": ("lr must be a number >= 0, got -1",),
    "param_groups.overrides={wte:{learning_rate:1}}": ("has the option 'learning_rate'", "did you mean 'lr'?"),
    "param_groups.overrides={wte:3}": (
        "overrides must be options by pattern, as {wte: {lr: 1e-4}}, or null, got {'wte': 3}",
    ),
    "param_groups.weight_decay=abc": ("weight_decay must be a number >= 0, got 'abc'",),
    "param_groups=null": (
        "param_groups must be options by name, got None; to decay nothing, set optimizer.weight_decay=0",
    ),
    "train.resume=null": ("train.resume must be never, auto, or a checkpoint's folder, got None",),
    "name=null": ("name must be the name of a folder below runs/, got None",),
    "data.path=": ("data.path must be a path or null, got ''",),
    "data.suffixes=5": ("data.suffixes must be endings of names, as [.txt, .md], got 5",),
    "data.validation_fraction=abc": ("data.validation_fraction must be a number in (0, 1), got 'abc'",),
    "data.cache_dir=text.txt": ("rank 0: FileExistsError: ", "text.txt"),
    "engine.activation_checkpointing=maybe": ("engine.activation_checkpointing must be true or false, got 'maybe'",),
    "engine.find_unused_parameters=1": ("engine.find_unused_parameters must be true or false, got 1",),
    "engine=fsdp2 engine.reshard_after_forward=no_": ("engine.reshard_after_forward must be true or false, got 'no_'",),
    "engine=deepspeed_zero1 engine.offload=cpu": ("engine.offload must be true or false, got 'cpu'",),
    "model.seed=abc": ("model.seed must be an integer >= 0, got 'abc'",),
    "model.config.n_head=0": ("model.config.n_head must be an integer >= 1, got 0",),
}


@pytest.fixture(scope="module")
def bad_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refused")
    jobs.write_text(folder)
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes("café au lait ".encode("latin-1") * 100)
    (folder / "cache").mkdir()
    return folder


# One of each stage at which something is refused, and what is about several processes.
ON_EVERY_RANK = (
    "optimizer.lr=-1",
    "sam=on sam.rho=-1",
    "train.batch_size=7",
    "train.micro_batch_size=3",
    "engine=hsdp engine.replicas=3",
    "train.resume=nowhere",
    "data.cache_dir=text.txt",
    "train.sequence_length=99999",
    "model.config.n_head=3",
    "param_groups.overrides={wqe:{lr:1}}",
)


@pytest.mark.parametrize("words", ON_EVERY_RANK)
def test_bad_input_is_one_line_on_every_rank(bad_inputs: Path, words: str) -> None:
    """No rank trains, none hangs, none shows a traceback: each says what is wrong, and ends with 1."""
    for rank, (code, out, err) in enumerate(jobs.run(bad_inputs, [*overrides(), *words.split()], 2)):
        who = "distopt" if rank == 0 else "distopt (rank 1)"
        assert (code, out) == (1, "")
        (line,) = err.strip().splitlines()
        assert line.startswith(f"{who}: error: ")
        assert [part for part in REFUSED[words] if part not in line] == []


def not_one_line(folder: Path, table: dict[str, tuple[str, ...]], **changes: str) -> dict[str, jobs.Ended]:
    """Of a table's commands those that do not end with code 1 and one line, with all that it has to hold."""
    commands = [[*overrides(**changes), *words.split()] for words in table]
    answers = zip(table.items(), jobs.one_after_another(folder, commands), strict=True)
    return {words: ended for (words, expected), ended in answers if not _one_line(ended, expected)}


def _one_line(ended: jobs.Ended, expected: tuple[str, ...]) -> bool:
    lines = ended.err.strip().splitlines()
    said = len(lines) == 1 and lines[0].startswith("distopt: error: ") and all(part in lines[0] for part in expected)
    return said and (ended.code, ended.out) == (1, "")


def test_bad_input_is_one_line(bad_inputs: Path) -> None:
    alone = {words: expected for words, expected in REFUSED.items() if words not in ON_EVERY_RANK}
    assert not_one_line(bad_inputs, alone) == {}


# Said by Hydra, in many lines and without what was meant, or taken by it without a word.
COMMAND_LINE: dict[str, tuple[str, ...]] = {
    "optimizer=adamax": ("optimizer=adamax: there is no such optimizer: did you mean adam", *OPTIMIZERS),
    "engine=ddq": ("engine=ddq: there is no such engine: did you mean ddp?", "Choose from ddp, ", "fsdp2"),
    "experiment=quickstrat": ("there is no such experiment: did you mean quickstart?",),
    "optimiser=lamb": ("there is no optimiser: did you mean optimizer?",),
    "+optimiser=lamb": ("nothing reads optimiser: did you mean optimizer?",),
    "optimizer.lrr=1": ("there is no optimizer.lrr: did you mean lr?", "weight_decay"),
    "train.stepz=1": ("there is no train.stepz: did you mean steps?",),
    "+train.stepz=1": ("nothing reads train.stepz: did you mean steps?",),
    "optimizer lamb": ("'optimizer' is not KEY=VALUE",),
    "data.path=~/book.txt": ("'data.path=~/book.txt' is not KEY=VALUE, or has special characters that need quotes",),
    "optimizer.betas=[0.9": ("'optimizer.betas=[0.9' is not KEY=VALUE",),
    "optimizer=adamw,lamb": ("Ambiguous value for argument 'optimizer=adamw,lamb'", "--multirun"),
    "optimizer=null": ("optimizer=null: optimizer takes the name of one of its choices: adagrad, adam",),
    "sam=true": ("sam=true: sam takes the name of one of its choices: asam", "off, on"),
    "trackers={a:1}": ("Error merging override trackers={a:1}",),
    "optimizer.lr=${nope}": ("optimizer.lr: Interpolation key 'nope' not found",),
    "optimizer=[adamw,lamb]": ("optimizer takes one choice",),
    "hydra.run.dir=/proc/nope": ("No such file or directory: '/proc/nope'",),
}


def test_what_hydra_refuses_is_one_line_too(bad_inputs: Path) -> None:
    assert not_one_line(bad_inputs, COMMAND_LINE) == {}


@pytest.mark.parametrize("words", ["optimizer=adamax", "hydra.run.dir=/proc/nope"])
def test_what_hydra_refuses_is_one_line_on_every_rank(bad_inputs: Path, words: str) -> None:
    for rank, (code, out, err) in enumerate(jobs.run(bad_inputs, [*overrides(), words], 2)):
        assert (code, out) == (1, ""), err
        (line,) = err.strip().splitlines()
        assert line.startswith("distopt: error: " if rank == 0 else "distopt (rank 1): error: ")
        assert [part for part in COMMAND_LINE[words] if part not in line] == []


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
    file = done / "checkpoints" / "step_00000008" / "config.json"
    written = file.read_text()
    file.write_text(written.replace('"transformers_version": "5', '"transformers_version": "4'))
    assert file.read_text() != written
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
    loss = before[-1]["validation_loss"]
    assert f"validation loss: {loss:.4f} -> {loss:.4f} nats" in ended.out and "resume: " in ended.out
    assert rows(done) == before
    assert (done / "curves.png").is_file() and checkpoints(done) == ["step_00000004", "step_00000008"]


def test_only_the_newest_checkpoint_of_a_run_goes_on_in_its_folder(finished: Path) -> None:
    """Newer ones would outlive those of the run that goes on from an older one: they were pruned as soon as written."""
    older = finished / "runs" / "done" / "checkpoints" / "step_00000004"
    (ended,) = jobs.run(finished, overrides(train__resume=str(older), **LONGER))
    assert ended.code == 1
    assert "is not the newest complete checkpoint of its run, step_00000008 is" in ended.err


def test_the_full_traceback_is_there_for_the_asking(bad_inputs: Path) -> None:
    (ended,) = jobs.run(bad_inputs, overrides(optimizer__lr="-1"), 1, ask_for_traceback)
    assert ended.code == 1
    assert "Traceback" in ended.err and "bounds.py" in ended.err


def ask_for_traceback() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"
