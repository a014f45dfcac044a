"""The state of an optimizer: what a state dict may bring, and how it is laid out."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.layout import ShardLayout, check_shape, fit, wide
from distopt.optim.torch_options import check_torch_options, drop_torch_options
from distopt.optim.validate import check_values

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer

Group = dict[str, Any]


def read_state_dict(optimizer: ShardedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The state and the param groups that a state dict brings to an optimizer, which is left as it is.

    Parameters are matched by name where the groups of both have `param_names`, else by position, as in torch. Options
    that the state dict does not have keep their values, and so does `capturable`, which says how a step runs. Floating
    buffers are cast to what state is kept in (float32 or wider); their layout comes with the next step.

    Raises ValueError for other param groups, names or shapes, a missing buffer, and an option that is refused.
    """
    groups = [copy.deepcopy(group) for group in state_dict["param_groups"]]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(groups)}, the optimizer {len(optimizer.param_groups)}"
        )
    params: dict[Any, Tensor] = {}
    labels: dict[Any, str] = {}
    owners: dict[Any, Group] = {}
    for i, (group, own) in enumerate(zip(groups, optimizer.param_groups)):
        for key, at in zip(group["params"], _positions(i, group, own)):
            params[key], owners[key] = own["params"][at], group
            labels[key] = own["param_names"][at] if "param_names" in own else f"parameter {at} of param group {i}"
        _complete(optimizer, group, own)
    state: dict[Any, Any] = {}
    for key, values in state_dict["state"].items():
        if key in params:
            state[params[key]] = _read(optimizer, owners[key], params[key], labels[key], values)
        else:
            state[key] = values
    return {"state": state, "param_groups": groups}


def _positions(number: int, saved: Group, own: Group) -> list[int]:
    """Where in the optimizer's param group each parameter of the saved one stands."""
    if len(saved["params"]) != len(own["params"]):
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of optimizer's group: group "
            f"{number} has {len(saved['params'])} parameters, the optimizer's {len(own['params'])}"
        )
    if "param_names" not in saved or "param_names" not in own:
        return list(range(len(own["params"])))
    at = {_bare(name): i for i, name in enumerate(own["param_names"])}
    names = [_bare(name) for name in saved["param_names"]]
    if differ := sorted(at.keys() ^ set(names)):
        where = "optimizer" if differ[0] in at else "state dict"
        raise ValueError(
            f"{differ[0]} is in param group {number} of the {where} only: make the groups of the same parameters, or "
            "delete param_names from the state dict's groups to match parameters by position"
        )
    return [at[name] for name in names]


def _bare(name: str) -> str:
    """The name of a parameter without that of DDP or torch.compile around the model."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _complete(optimizer: ShardedOptimizer, group: Group, own: Group) -> None:
    """Makes a saved param group one of the optimizer's; raises ValueError for options that it cannot have."""
    check_torch_options(group, optimizer.torch_options)
    drop_torch_options(group, optimizer.torch_options)
    group["params"] = own["params"]
    kept = {name: own[name] for name in ("param_names", "capturable") if name in own}
    group |= {name: own.get(name, value) for name, value in optimizer.defaults.items() if name not in group} | kept
    if isinstance(group["lr"], Tensor) and group["params"]:
        group["lr"] = group["lr"].to(group["params"][0].device if group["capturable"] else "cpu")
    check_values(group)
    optimizer.check(group)


def _read(
    optimizer: ShardedOptimizer, group: Group, param: Tensor, label: str, values: Mapping[str, Any]
) -> dict[str, Any]:
    """One parameter's state, of which nothing is missing if there is anything."""
    slots = optimizer.slots(group)
    read = {name: _cast(param, name, value) for name, value in values.items()}
    if param.dtype == wide(param.dtype):
        read.pop("master", None)  # of a run with 16-bit weights: here the weights are what is stepped
    for name in slots if read else ():
        if read.get(name) is None:
            read.pop(name, None)
    if read:
        if lacking := [name for name in optimizer.required(group) if name not in read]:
            raise ValueError(
                f"the state of {label} lacks {', '.join(lacking)} (it has {', '.join(sorted(read))}): load the "
                f"state of a {type(optimizer).__name__} with these options, or none for this parameter"
            )
        for name in (*slots, "master"):
            if name in read:
                check_shape(param, read[name], f"{name} of {label}")
        # torch.optim.SGD counts no steps; all of its state is of the steps after the first.
        read["step"] = count(param, group, read.get("step", 1.0 if slots and slots[0] in read else 0.0))
    return read


def _cast(param: Tensor, name: str, value: Any) -> Any:
    if not isinstance(value, Tensor) or name == "step":
        return value
    return value.to(param.device, wide(param.dtype)) if value.is_floating_point() else value.to(param.device)


def count(param: Tensor, group: Group, steps: Any = 0.0) -> Tensor:
    """A parameter's count of steps: a new 0-D float32 tensor, on the host unless the group is capturable.

    torch's fused optimizers keep it on the device, where reading it waits.
    """
    device = param.device if group["capturable"] else torch.device("cpu")
    return torch.as_tensor(steps).detach().to(device, torch.float32, copy=True).reshape(())


class Settled:
    """The state of one param group as a step has found it, so that the next looks only at what was exchanged.

    A step compares objects, at the cost of a list; tensors that were put into the state since then are laid out anew.
    """

    def __init__(self) -> None:
        self._layout: ShardLayout | None = None
        self._held: list[Any] = []

    def settle(self, optimizer: ShardedOptimizer, layout: ShardLayout, group: Group, params: Sequence[Tensor]) -> None:
        """Makes what the parameters lack of their state, and lays out what is there as the layout says.

        Raises ValueError for a state buffer of another shape than its parameter.
        """
        names = optimizer.slots(group)
        states = [optimizer.state[p] for p in params]
        low = [p for p in params if p.dtype.itemsize < 4]
        held = [*params, *_held(optimizer, states, names, low)]
        if layout is self._layout and len(held) == len(self._held) and all(map(operator.is_, held, self._held)):
            return
        for i, (p, state) in enumerate(zip(params, states)):
            if "step" not in state:
                state["step"] = count(p, group)
            for name in names:
                value = state.get(name)
                label = f"{name} of parameter {i} of {len(params)}"
                made = optimizer.init_slot(layout, group, name, p) if value is None else fit(layout, p, value, label)
                state[name] = made
            if p.dtype == wide(p.dtype):
                state.pop("master", None)
            elif (master := state.get("master")) is None:
                state["master"] = layout.master(p)
            else:
                state["master"] = fit(layout, p, master, f"master of parameter {i} of {len(params)}")
        self._layout, self._held = layout, [*params, *_held(optimizer, states, names, low)]


def _held(
    optimizer: ShardedOptimizer, states: Iterable[Mapping[str, Any]], names: Sequence[str], low: Iterable[Tensor]
) -> list[Any]:
    """All tensors of a group's state but the counts, which a step exchanges itself."""
    masters = (optimizer.state[p].get("master") for p in low)
    return [*chain.from_iterable(map(state.get, names) for state in states), *masters]
