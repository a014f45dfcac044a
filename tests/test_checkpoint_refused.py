"""What does not fit a checkpoint is refused, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import distopt
from distopt.checkpoint import load_checkpoint, save_checkpoint
from distopt.optim import schedules as schedules
from tests.harness.checkpoints import Net, full, trained


def test_of_another_model(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a", *trained())

    def refused(change: Callable[[nn.Module], None], message: str) -> None:
        model = Net().double()
        change(model)
        before = [full(p) for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, distopt.LAMB(model.parameters(), lr=0.1))
        assert all(np.array_equal(full(p), was) for p, was in zip(model.parameters(), before))

    def widen(model: nn.Module) -> None:
        model.first = nn.Linear(5, 9).double()

    refused(widen, r"first.weight is \[7, 5\] in the checkpoint, \[9, 5\] in the model")
    refused(lambda model: model.float(), "idle is float64 in the checkpoint, float32 in the model")
    refused(lambda model: delattr(model, "norm"), "norm.weight is in the checkpoint, not in the model")
    refused(lambda model: setattr(model, "more", nn.Linear(1, 1)), "more.weight is in the model, not in the checkpoint")


def test_a_damaged_file_of_equal_size_is_named(tmp_path: Path) -> None:
    """It was an UnpicklingError with a traceback."""
    path = save_checkpoint(tmp_path / "a", *trained())
    (file,) = path.glob("*/training.pt")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(
        ValueError, match=r"training.pt is not as it was written: the checkpoint is damaged, take another"
    ):
        load_checkpoint(path, *trained())


def test_of_another_optimizer_or_schedule(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "a", *trained())
    momentum = save_checkpoint(tmp_path / "b", (model := Net()), distopt.SGD(model.parameters(), lr=0.1, momentum=0.9))

    def refused(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            load_checkpoint(path, model, optimizer, **options)

    double = Net().double()
    weights, others = ([p for p in double.parameters() if p.ndim == dims] for dims in (2, 1))
    refused(
        path,
        double,
        distopt.SGD(double.parameters(), lr=0.1),
        r"is of LAMB \(state: exp_avg, exp_avg_sq, step\), this run has SGD \(state: step\)",
    )
    refused(
        momentum,
        model,
        distopt.SGD(model.parameters(), lr=0.1),
        r"is of SGD \(state: momentum_buffer, step\), this run has SGD \(state: step\)",
    )
    refused(path, double, distopt.LAMB(double.parameters(), lr=0.1), "has 2 param groups, the optimizer 1")
    swapped = distopt.LAMB([{"params": weights[:-1]}, {"params": [*others, weights[-1]]}], lr=0.1)
    refused(path, double, swapped, "last.weight is in param group 0 of the checkpoint only")
    fits = distopt.LAMB([{"params": weights}, {"params": others}], lr=0.1)
    constant = torch.optim.lr_scheduler.ConstantLR(fits)
    refused(path, double, fits, "has WarmupLR, this run has ConstantLR", schedule=constant)
    foreign = distopt.LAMB(Net().parameters(), lr=0.1)
    refused(path, double, foreign, r"parameters of the optimizer are not the model's, the first of shape \[2, 3\]")


@pytest.mark.parametrize("extra", [{"path": Path("x")}, {"pair": (1, 2)}, {1: "one"}, {"loss": float("nan")}])
def test_an_extra_that_json_would_change_is_refused(tmp_path: Path, extra: dict) -> None:
    with pytest.raises(ValueError, match="extra must be"):
        save_checkpoint(tmp_path / "a", *trained(steps=0), extra=extra)
    assert not any(tmp_path.iterdir())


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not a checkpoint: choose another name"):
        save_checkpoint(tmp_path, *trained(steps=0))
    assert (tmp_path / "notes.txt").read_text() == "mine"
