"""All three ways of a rule (foreach, C, Triton's interpreter) are as close to float64 as torch's own kernels are.

At hyper-parameters as trainings have them: a float32 `1 - 0.999` is off by 1e-5, and `1 - 0.9999` by 2e-4. At the
edges: a beta of 0, an eps of 0, and a count of ten million steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import distopt
from distopt.kernels import cpu, dispatch, triton
from tests.harness.jobs import ROOT
from tests.harness.optimizers import compiled_rules

STEPS = 20
# Of what torch's own is off by (its fused kernel; foreach for RMSprop, which has none): the rest is the order of a few
# roundings. At least a rounding of float32.
FACTOR, LEAST = 2.0, 1.2e-7

CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "adamw": ("AdamW", {}, 0),
    "adamw, beta2 0.9999": ("AdamW", dict(betas=(0.9, 0.9999)), 0),
    "adam, betas 0.99 0.999, decay": ("Adam", dict(betas=(0.99, 0.999), weight_decay=0.01), 0),
    "adam, beta1 0": ("Adam", dict(betas=(0.0, 0.999)), 0),
    "adam, beta1 0.1": ("Adam", dict(betas=(0.1, 0.5)), 0),
    "adam, betas 0": ("Adam", dict(betas=(0.0, 0.0)), 0),
    "adam, eps 0": ("Adam", dict(eps=0.0), 0),
    "adamw, step 1e7": ("AdamW", dict(betas=(0.9, 0.9999)), 10_000_000),
    "rmsprop": ("RMSprop", {}, 0),
    "rmsprop, alpha 0.999": ("RMSprop", dict(alpha=0.999, momentum=0.9), 0),
    "rmsprop, centered": ("RMSprop", dict(alpha=0.999, centered=True), 0),
    "rmsprop, centered, momentum": ("RMSprop", dict(centered=True, momentum=0.9, weight_decay=0.01), 0),
    "rmsprop, alpha 0": ("RMSprop", dict(alpha=0.0, eps=1e-3), 0),
    "sgd": ("SGD", dict(weight_decay=0.01), 0),
    "momentum": ("SGD", dict(momentum=0.9), 0),
    "momentum 0.999, dampening": ("SGD", dict(momentum=0.999, dampening=0.999), 0),
    "nesterov": ("SGD", dict(momentum=0.9, nesterov=True), 0),
    "adagrad": ("Adagrad", dict(lr_decay=0.05), 0),
    "adagrad, step 1e7": ("Adagrad", dict(lr_decay=0.05), 10_000_000),
}


def trained(cls: type[torch.optim.Optimizer], dtype: torch.dtype, case: str, **options: Any) -> list[Tensor]:
    """Returns the change of the weights, and the state, after some steps from a count on."""
    _, arguments, count = CASES[case]
    numbers = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(1003, dtype=dtype))  # of zeros, so that a weight does not hide its change
    opt = cls([p], lr=0.01, **arguments, **options)  # type: ignore[call-arg]
    for step in range(STEPS):
        p.grad = torch.randn(1003, generator=numbers).to(dtype)
        if step == 1 and count:
            opt.state[p]["step"].fill_(count)
        opt.step()
    return [p.detach(), *(t for name, t in sorted(opt.state[p].items()) if t is not None and t.ndim)]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


def measured(case: str) -> dict[str, list[float]]:
    """Returns the relative errors of weights and state: of torch's kernel, and of each update that can run here."""
    name = CASES[case][0]
    theirs, ours = getattr(torch.optim, name), getattr(distopt, name)
    exact = trained(theirs, torch.float64, case, foreach=False)
    fast = {"foreach": True} if name == "RMSprop" else {"fused": True}
    found = {"torch": errors(trained(theirs, torch.float32, case, **fast), exact)}
    ways = ["triton", "rule"] if os.environ.get("TRITON_INTERPRET") else ["c", "rule"]
    seen: list[str] = []
    for way in ways:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton, "DEVICES", ("cpu",) if way == "triton" else ())
            patch.setattr(dispatch, "fits", cpu.fits if way == "c" else lambda shards: [])
            for name_of_way, cls in (
                ("triton", triton.TritonUpdate),
                ("c", cpu.CompiledUpdate),
                ("rule", dispatch.ForeachUpdate),
            ):
                patch.setattr(cls, "step", lambda self, go=cls.step, name=name_of_way: (seen.append(name), go(self)))  # type: ignore
            found[way] = errors(trained(ours, torch.float32, case), exact)
        assert set(seen) == {way}
        seen.clear()
    return found


def interpreted() -> None:
    torch.set_num_threads(1)
    print(json.dumps({case: measured(case) for case in CASES}))


@pytest.fixture(scope="module")
def by_triton() -> dict[str, dict[str, list[float]]]:
    command = [sys.executable, "-c", "from tests.test_kernel_accuracy import interpreted; interpreted()"]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_every_implementation_is_as_close_as_torchs(case: str, by_triton: dict[str, dict[str, list[float]]]) -> None:
    found = measured(case) | {"triton": by_triton[case]["triton"]}
    bounds = [max(FACTOR * error, LEAST) for error in found.pop("torch")]
    for way, ours in found.items():
        assert all(error <= bound for error, bound in zip(ours, bounds)), (way, ours, bounds)


def test_a_small_beta1_forgets_a_large_gradient() -> None:
    """m + (1 - beta1) (g - m) cancels where the gradient falls: 1.25 for 1.2345 after 1e6."""
    for name in ("c", "rule"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "rule":
                patch.setattr(dispatch, "fits", lambda shards: [])
            p = torch.nn.Parameter(torch.ones(4))
            opt = distopt.Adam([p], lr=0.1, betas=(0.0, 0.9))
            for g in (1e6, 1.2345):
                p.grad = torch.full((4,), g)
                opt.step()
            assert torch.equal(opt.state[p]["exp_avg"], p.grad)


def test_triton_has_the_names_of_the_specification() -> None:
    """In this order too. cpu.c refers to them by name, and a name that a specification lacks is a KeyError."""
    import ast
    import inspect

    from distopt.kernels import triton_rules

    functions = {f.name: f for f in ast.parse(inspect.getsource(triton_rules)).body if isinstance(f, ast.FunctionDef)}
    for kernel, rule in compiled_rules().items():
        unpacked: dict[str, list[str]] = {}
        for node in functions[kernel].body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id in ("h", "s"):
                (names,) = node.targets
                unpacked[node.value.id] = [name.id for name in names.elts]  # type: ignore[attr-defined]
        assert unpacked["h"] == list(rule.scalars), kernel
        assert unpacked.get("s", [])[: len(rule.factors)] == list(rule.factors), kernel
