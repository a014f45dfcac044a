"""The rules in Triton are the rules: by Triton's interpreter on the CPU, in a process of its own, and as compiled."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import distopt
from distopt import kernels
from distopt.kernels import triton_move
from tests.jobs import ROOT
from tests.optimizers import ROWS, Row, distance, every_row, initial, named, pull

# Two pieces and a rest, one piece to the element, shorter ones, one element, none.
SHAPES = ((97, 89), (4096,), (3, 5), (1,), (0, 4))
STEPS = 3
# float32: other orders of the same few operations and of sums; bias corrections are rounded before and not after.
TOLERANCE = 2e-6


def train(row: Row, params: list[Tensor], steps: int = STEPS, **options: Any) -> list[Tensor]:
    params = [p.requires_grad_() for p in params]
    opt = row.make(row.groups(params), **options)
    for step in range(steps):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
    return outcome(opt, params)


def outcome(opt: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    return [p.detach() for p in params] + [opt.state[p][name] for p in params for name in opt.state[p]]


# What the interpreter does: each case is done twice, by the kernels and by the rules.


def plain(row: Row, **options: Any) -> list[Tensor]:
    return train(row, initial(*SHAPES, dtype=torch.float32), **options)


def short_gradients(row: Row) -> list[Tensor]:
    """Gradients of 16 bits for weights of 32, as masters have them."""
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    opt = row.make(row.groups(params))
    for step in range(STEPS):
        for i, p in enumerate(params):
            p.grad_dtype = torch.bfloat16  # type: ignore[attr-defined]
            p.grad = (p.detach() - 2.0 - torch.sin(torch.arange(p.numel()).view(p.shape) + i + 3.0 * step)).bfloat16()
        opt.step()
    return outcome(opt, params)


def capturable(row: Row) -> list[Tensor]:
    """Steps counted where the weights are, and lr a tensor there, which a schedule moves."""
    params = [p.requires_grad_() for p in initial(*SHAPES, dtype=torch.float32)]
    on = bool(triton_move.DEVICES)
    groups = row.groups(params)
    for group in groups:
        lr = group.get("lr", row.kwargs["lr"])
        group["lr"] = torch.tensor(lr) if on else lr
    opt = row.make(groups, capturable=on)
    schedule = distopt.warmup_constant(opt, warmup_steps=2)
    for step in range(STEPS):
        opt.zero_grad()
        pull(params, step).backward()
        opt.step()
        schedule.step()
    return outcome(opt, params)


def unaligned(row: Row) -> list[Tensor]:
    """Views that begin anywhere, as shards do; beside one that does not."""
    flat = initial((9000,), dtype=torch.float32)[0]
    return train(row, [flat[1:4400].view(53, 83), flat[4401:8800], *initial((8, 8), dtype=torch.float32)])


def different_counts(row: Row) -> list[Tensor]:
    params = [p.requires_grad_() for p in initial((9, 5), (5000,), (7, 3), dtype=torch.float32)]
    opt = row.make(row.groups(params))
    for step in range(4):
        opt.zero_grad()
        pull(params, step).backward()
        for p in params[step % 3 :]:
            p.grad = None
        opt.step()
    return outcome(opt, params)


def others_beside(row: Row) -> list[Tensor]:
    """What lies otherwise, or has another dtype, takes the rule in the same step."""
    turned = initial((6, 4), dtype=torch.float32)[0].t()
    return train(row, [*initial((5, 7), (11,), dtype=torch.float32), turned, *initial((4, 4), (3,))])


CASES: dict[str, Callable[[], list[Tensor]]] = {
    **{f"{row.name}-{case.__name__}": lambda row=row, case=case: case(row) for row in ROWS for case in (plain,)},
    **{
        f"{name}-{case.__name__}": lambda name=name, case=case: case(named(name))
        for case in (short_gradients, capturable, unaligned, different_counts, others_beside)
        for name in ("sgd", "nesterov", "adagrad", "rmsprop_centered_momentum", "adamw", "lamb", "lars")
    },
    **{
        f"{name}-{options}": lambda name=name, options=options: plain(named(name), **options)
        for name in ("adamw", "momentum", "nesterov", "adagrad", "rmsprop", "rmsprop_centered_momentum")
        for options in ({"maximize": True}, {"trust_ratio": True})
    },
    "rmsprop-{'momentum': 0.5}": lambda: plain(named("rmsprop"), momentum=0.5),
    "rmsprop-{'centered': True}": lambda: plain(named("rmsprop"), centered=True),
}


def interpreted() -> None:
    """Prints, for each case, the distance of what the kernels do to what the rules do, and how often each was chosen."""
    torch.set_num_threads(1)
    seen: list[str] = []
    launch, fits, rule = triton_move.TritonMove._launch, kernels.fits, kernels.Move.__init__
    triton_move.TritonMove._launch = lambda self, *a: (seen.append("kernel"), launch(self, *a))[1]  # type: ignore
    kernels.Move.__init__ = lambda self, *a: (seen.append("rule"), rule(self, *a))[1]  # type: ignore
    kernels.fits = lambda shards: []  # type: ignore
    found = {}
    for name, case in CASES.items():
        results, chosen = [], []
        for devices in (("cpu",), ()):
            triton_move.DEVICES = devices  # type: ignore
            seen.clear()
            results.append(case())
            chosen.append(sorted(set(seen)))
        found[name] = [distance(*results), *chosen]
    print(json.dumps(found))


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    command = [sys.executable, "-c", "from tests.test_triton import interpreted; interpreted()"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_kernel_is_its_rule(case: str, found: dict[str, Any]) -> None:
    error, with_kernels, without = found[case]
    assert error < TOLERANCE
    assert with_kernels == (["kernel", "rule"] if case.endswith("others_beside") else ["kernel"])
    assert without == ["rule"]
