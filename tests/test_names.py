"""A parameter has one name, whatever wraps the model: in groups, checkpoints and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import distopt
from distopt.checkpoint.contents import Contents
from distopt.job.diagnostics import by_layer
from distopt.layout.names import bare_name, bare_parameters
from tests.harness.distributed import run


def made() -> nn.Module:
    """A model with a part that has the name by which DDP calls what it wraps."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    inner.add_module("module", nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(4, 4), inner, nn.Linear(4, 2))


def wrapped(inner: bool = True, compiled: bool = True) -> Any:
    model: Any = made()
    if inner:
        model[1] = checkpoint_wrapper(model[1])
    return torch.compile(model, backend="eager") if compiled else model


@pytest.mark.parametrize(("inner", "compiled"), [(False, False), (True, False), (False, True), (True, True)])
def test_names_are_those_without_wrappers(inner: bool, compiled: bool) -> None:
    model = wrapped(inner, compiled)
    names = [name for name, _ in made().named_parameters()]
    assert [*bare_parameters(model)] == names
    assert [bare_name(model, name) for name, _ in model.named_parameters()] == names
    assert "1.module.weight" in names


def named_everywhere(model: nn.Module) -> Any:
    """The shapes by group, the names that a report has, and those of a checkpoint."""
    groups = distopt.param_groups(model, overrides={r"^1\.": {"lr": 0.5}})
    optimizer = distopt.LAMB(groups)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    contents = Contents(model, optimizer)
    return (
        [[tuple(p.shape) for p in group["params"]] for group in groups],
        {what: [*layers] for what, layers in by_layer(model, optimizer).items()},
        [{*contents.tensors}, {*contents.state}, *(group["params"] for group in contents.groups)],
    )


def test_groups_reports_and_checkpoints_have_the_same_names() -> None:
    """An anchored pattern found nothing in a compiled model, and a report had other names than the run before."""
    assert named_everywhere(wrapped()) == named_everywhere(made())


def under_ddp(folder: Path) -> list[Any]:
    model = DistributedDataParallel(wrapped())
    assert [*bare_parameters(model)] == [name for name, _ in made().named_parameters()]
    distopt.save_checkpoint(folder / "checkpoint", model, distopt.LAMB(distopt.param_groups(model)))
    plain = made()
    for p in plain.parameters():
        p.data.zero_()
    distopt.load_checkpoint(folder / "checkpoint", plain, distopt.LAMB(distopt.param_groups(plain)))
    return [p.tolist() for p in plain.parameters()]


def test_a_wrapped_model_saves_what_a_plain_one_loads(tmp_path: Path) -> None:
    for weights in run(2, under_ddp, tmp_path):
        assert weights == [p.tolist() for p in made().parameters()]
