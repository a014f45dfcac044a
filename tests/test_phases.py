"""Phases: a chain of runs, pretrain, batch grown, SAM, anneal, each from the weights and state of the one before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distopt.checkpoint import load_average
from distopt.job.phases import chain
from distopt.models.export import export
from tests.harness import jobs
from tests.harness.jobs import train
from tests.harness.runs import not_one_line, rows

SAME = {"evaluation__sample_tokens": "0", "evaluation__max_sequences": "8", "evaluation__every": "3"}
SAME |= {"train__micro_batch_size": "2", "checkpoint__every": "3", "schedule__warmup_steps": "0", "average": "ema"}
SAME |= {"average__decay": "0.5", "train__steps": "6"}
# Each phase: its name, what it starts from, and what it changes.
CHAIN: dict[str, dict[str, str]] = {
    "pretrain": {"schedule": "constant", "train__noise_scale": "0.9"},
    "grown": {"train__init": "runs/pretrain", "train__batch_schedule": "{2: 16, 4: 24}", "schedule": "constant"},
    "sam": {"train__init": "runs/grown", "sam": "on", "sam__start": "2", "sam__rho_schedule": "{2: 0.5, 4: 1.0}"},
    "anneal": {
        "train__init": "runs/sam",
        "schedule": "warmup_linear",
        "train__sequence_length": "8",
        "seed": "1",
    },
}


def phase(cwd: Path, name: str, world: int = 1, before: Any = None, *args: Any, **more: str) -> Path:
    words = {**SAME, "name": name, **CHAIN[name], **more}
    train(cwd, world, before, *args, **words)
    return cwd / "runs" / name


def end_after(steps: int) -> None:
    """Every rank dies when so many steps are done."""
    from distopt.job import job as program

    train_step = program.Job.train_step

    def fatal(job: Any, *args: Any) -> Any:
        if job.step == steps:
            os._exit(7)
        return train_step(job, *args)

    program.Job.train_step = fatal


def broken(cwd: Path, name: str, first: tuple[str, int], then: tuple[str, int], **more: str) -> Path:
    """A phase that ends after its third step, and resumes on another engine at another number of processes."""
    words = {**SAME, **CHAIN[name], "name": f"broken_{name}", **more}
    ended = jobs.run(cwd, jobs.overrides(**words, engine=first[0]), first[1], end_after, 3)
    assert [rank.code for rank in ended] == [7] * first[1], ended[0].err
    train(cwd, then[1], **words, engine=then[0], train__resume="auto")
    return cwd / "runs" / f"broken_{name}"


def training_groups(checkpoint: Path) -> list[dict[str, Any]]:
    (file,) = checkpoint.rglob("training.pt")
    return torch.load(file, weights_only=True)["param_groups"]


def numbers(run: Path) -> list[tuple[int, str, float]]:
    """The losses of all steps and evaluations, and the tokens: what a phase that was broken has to repeat."""
    names = ("loss", "validation_loss", "tokens", "lr")
    return [(row["step"], name, row[name]) for row in rows(run) for name in names if name in row]


def agree(run: Path, right: Path) -> None:
    found, expected = numbers(run), numbers(right)
    assert [each[:2] for each in found] == [each[:2] for each in expected]
    # float32: sums in another order at another world size.
    assert [each[2] for each in found] == pytest.approx([each[2] for each in expected], abs=1e-4)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chain at one process, each phase in one go."""
    cwd = tmp_path_factory.mktemp("unbroken")
    jobs.write_text(cwd)
    for name in CHAIN:
        phase(cwd, name)
    return cwd


def test_a_chain_of_phases(unbroken: Path) -> None:
    runs = unbroken / "runs"
    grown = rows(runs / "grown", losses_only=True)
    assert [row["step"] for row in grown] == [1, 2, 3, 4, 5, 6]  # each phase counts from 0
    assert [row["tokens"] for row in grown] == [16 * n for n in (8, 16, 32, 48, 72, 96)]
    starts = chain(runs / "anneal")
    assert [Path(start["checkpoint"]).parts[-3:] for start in starts] == [
        (name, "checkpoints", "step_00000006") for name in ("sam", "grown", "pretrain")
    ]
    assert [start["tokens"] for start in starts] == [16 * (48 + 96 + 48), 16 * (48 + 96), 16 * 48]
    scale = rows(runs / "pretrain", losses_only=True)[-1]
    assert scale["critical_batch_tokens"] == 16 * scale["noise_scale"] > 0
    # The first validation loss of a phase is the last one of the phase before: the weights, and their average.
    ends = {name: [row["validation_loss"] for row in rows(runs / name) if "validation_loss" in row] for name in CHAIN}
    assert ends["grown"][0] == ends["pretrain"][-1] and ends["sam"][0] == ends["grown"][-1]


def test_a_phase_resumes_at_another_world_size_with_the_losses_of_the_unbroken_one(unbroken: Path) -> None:
    """In the middle of its batch schedule; it takes weights, state and average from the phase before."""
    agree(broken(unbroken, "grown", ("zero1", 2), ("ddp", 1)), unbroken / "runs" / "grown")
    assert chain(unbroken / "runs" / "broken_grown") == chain(unbroken / "runs" / "grown")


WHERE = {
    "pretrain": (("zero1", 2), ("fsdp2", 1)),
    "grown": (("deepspeed_zero3", 2), ("deepspeed_zero2", 2)),
    "sam": (("deepspeed_zero2", 1), ("zero1", 2)),
    "anneal": (("deepspeed_zero3", 2), ("hsdp", 2)),
}


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_chain_broken_in_every_phase_has_the_losses_of_the_unbroken_one(unbroken: Path) -> None:
    before = None
    for name, (first, then) in WHERE.items():
        init = {} if before is None else {"train__init": f"runs/{before}"}
        # DeepSpeed and FSDP2 show no gradients of the same small batches.
        agree(broken(unbroken, name, first, then, **init, train__noise_scale="null"), unbroken / "runs" / name)
        before = f"broken_{name}"


def test_a_phase_may_have_other_param_groups(unbroken: Path) -> None:
    """SAM of the last block alone, after a phase that perturbed all: state is by parameter, options are the phase's."""
    layers = {"param_groups.overrides": r"{wte|wpe|ln_f|h\\.0\\.: {sam_rho: 0}}", "sam": "on"}
    train(unbroken, 1, **SAME, **layers, name="layers", train__init="runs/sam")
    folders = [unbroken / "runs" / name for name in ("sam", "layers")]
    before, after = ([row["validation_loss"] for row in rows(run) if "validation_loss" in row] for run in folders)
    assert after[0] == before[-1]
    two, four = (training_groups(run / "checkpoints" / "step_00000006") for run in folders)
    assert len(two) == 2 < len(four)
    assert {"sam_rho" in group and group["sam_rho"] == 0 for group in four} == {True, False}
    train(unbroken, 1, **SAME, name="together", train__init="runs/layers")  # and two groups again


# Muon for the matrices, AdamW for the others; 12 sequences, which one, two and three processes divide.
MUON = {"optimizer": "muon", "train__batch_size": "12", "train__noise_scale": "null"}
MUON_GROWN = {"train__batch_schedule": "{2: 24, 4: 36}"}
MUON_WHERE = {
    "pretrain": (("zero1", 2), ("fsdp2", 1)),
    "grown": (("fsdp2", 1), ("zero1", 3)),
    "sam": (("fsdp2", 3), ("deepspeed_zero2", 2)),
    "anneal": (("deepspeed_zero3", 2), ("fsdp2", 3)),
}


@pytest.mark.matrix
@pytest.mark.timeout(900)
def test_a_chain_with_muon_broken_in_every_phase_has_the_losses_of_the_unbroken_one(tmp_path: Path) -> None:
    """Full matrices are at other owners after each break; the momentum that makes them is resharded."""
    jobs.write_text(tmp_path)
    before = None
    for name, (first, then) in MUON_WHERE.items():
        more = MUON | (MUON_GROWN if name == "grown" else {})
        phase(tmp_path, name, **more)
        init = {} if before is None else {"train__init": f"runs/{before}"}
        agree(broken(tmp_path, name, first, then, **more, **init), tmp_path / "runs" / name)
        before = f"broken_{name}"


REFUSED: dict[str, tuple[str, ...]] = {
    "optimizer=lamb": ("train.init=runs/anneal has the state of AdamW, this run has LAMB: train.init_state=false",),
    "model.config.n_embd=32": ("was trained with model.config.n_embd 16, now it is 32: a phase continues the same",),
    "model.config.n_head=1": ("was trained with model.config.n_head 2, now it is 1",),
    "init=gpt2": ("init=gpt2: a phase has its weights from train.init; give init=family",),
    "name=anneal": ("train.init=runs/anneal is a checkpoint of this run itself: give the phase another name",),
    "train.init=runs/nothing": ("train.init=runs/nothing: no such folder; give the folder of a run",),
    "train.batch_schedule={2:12}": ("12 sequences from step 2 on, which is not a multiple of 8",),
    "train.batch_schedule={0:16}": ("train.batch_schedule must be sequences >= 1 by step >= 1",),
    "sam=on sam.start=4 sam.stop=4": ("sam: stop must be > start, got start=4 and stop=4",),
    "sam=on sam.start=1.5": ("sam.start must be a step >= 0, or a fraction in [0.0, 1.0] of train.steps, got 1.5",),
    "train.noise_scale=0.9": ("a step has only one of 8 sequences: give a smaller train.micro_batch_size",),
    "average=ema optimizer=sgd_schedule_free train.init_state=false": ("EMA beside SGDScheduleFree",),
    "evaluation.average=true": (
        "evaluation.average=true, and the run has no average of its weights: give average=ema",
    ),
}


def test_what_makes_no_sense_is_refused(unbroken: Path) -> None:
    assert not_one_line(unbroken, REFUSED, name="refused", train__init="runs/anneal") == {}


def test_the_average_of_a_chain_is_exported(unbroken: Path, tmp_path: Path) -> None:
    run = unbroken / "runs" / "anneal"
    checkpoint = run / "checkpoints" / "step_00000006"
    assert "the average in step_00000006" in export(run, tmp_path / "average", average=True)
    export(run, tmp_path / "weights")
    average, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("average", "weights"))
    right = {name: torch.zeros_like(value) for name, value in average.items()}
    load_average(checkpoint, right)
    assert all(torch.equal(average[name].flatten(), right[name].flatten()) for name in right)
    assert any(not torch.equal(average[name], weights[name]) for name in weights)
