"""The moments in an optimizer's state, found in the state itself and not guessed from the names of its options."""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import Tensor

from distopt.kernels.blocks import CODES

FIRST = ("momentum_buffer", "exp_avg")
SECOND = ("exp_avg_sq", "square_avg", "sum")


_CODED = "this SAM reads the moments, which are codes of blocks: give state_bits=32 or 16, or use another SAM"


def state_names(optimizer: torch.optim.Optimizer) -> list[set[str]]:
    """Returns the names of the state buffers of each rule of an optimizer; none where only its state has them.

    An optimizer of distopt declares them by param group. One of torch takes a trial step, with the options of each
    group, on a parameter of four zeros.

    Raises:
        ValueError: For moments that are stored in 8 or 4 bits.
    """
    if hasattr(optimizer, "rule"):
        if bits := [group["state_bits"] for group in optimizer.param_groups if group["state_bits"] < 16]:
            raise ValueError(f"state_bits={bits[0]}: {_CODED}")
        return [set(optimizer.rule(group).buffers) for group in optimizer.param_groups]
    if type(optimizer).__module__.split(".")[:2] != ["torch", "optim"]:
        return []  # it may wrap others, and restrict its parameters
    names = _names_after_a_step(optimizer)
    return [] if names is None else [names]


def moment_of(state: dict[str, Any], names: tuple[str, ...], param: Tensor) -> Tensor | None:
    """Returns the first buffer with one of these names in a parameter's state, if it has the parameter's shape."""
    if any(name + CODES in state for name in names):
        raise ValueError(f"the moments were stored in fewer bits since: {_CODED}")
    found = (state[name] for name in names if isinstance(state.get(name), Tensor))
    return next((moment for moment in found if moment.shape == param.shape), None)


def _names_after_a_step(optimizer: torch.optim.Optimizer) -> set[str] | None:
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # a schedule's wrapper, which steps the original
    twin._optimizer_step_pre_hooks = OrderedDict()
    twin._optimizer_step_post_hooks = OrderedDict()
    scratch = [torch.zeros(2, 2) for _ in optimizer.param_groups]
    for p in scratch:
        p.grad = torch.zeros_like(p)
    options = {"lr": 0.0, "capturable": False, "fused": None, "differentiable": False}
    twin.state = defaultdict(dict)
    twin.param_groups = [
        {**group, **{k: v for k, v in options.items() if k in group}, "params": [p]}
        for group, p in zip(optimizer.param_groups, scratch)
    ]
    if isinstance(optimizer, torch.optim.Adagrad):  # its state exists before the first step
        return {name for state in optimizer.state.values() for name in state}
    try:
        with torch.no_grad():
            inspect.unwrap(type(optimizer).step)(twin)  # without hooks
    except (TypeError, RuntimeError):  # LBFGS needs a closure, SparseAdam sparse gradients
        return None
    return {name for state in twin.state.values() for name, value in state.items() if value is not None}
