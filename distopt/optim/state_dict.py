"""Reads a state dict into the state and the param groups of an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from distopt.layout import check_shape, wide
from distopt.optim.masters import BESIDE, check_beside
from distopt.optim.narrow_state import check_bits, check_buffer, every_tensor_of, lacks
from distopt.optim.options import check_torch_options, drop_torch_options
from distopt.optim.state import Group, running_sum, step_count
from distopt.optim.validate import check_values

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer


_OWN = ("capturable", "master_weights", "state_bits")  # options of this optimizer, whatever a state dict says


def load_state_dict(optimizer: ShardedOptimizer, state_dict: Mapping[str, Any]) -> None:
    """Loads a state dict, which `read_state_dict` checks before anything changes, between the hooks of torch."""
    state_dict = dict(state_dict)
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        state_dict = result if (result := pre_hook(optimizer, state_dict)) is not None else state_dict
    # Not torch's (2.13), which casts all state to the parameter's dtype, and notices a missing buffer in the step.
    optimizer.__setstate__(read_state_dict(optimizer, state_dict))
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def read_state_dict(optimizer: ShardedOptimizer, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the state and the param groups that a state dict gives an optimizer, which is not changed.

    Parameters are matched by name where the groups of both have `param_names`, else by position, as in torch. Options
    that the state dict lacks keep their values, and so do those that say how a step runs and what its numbers are
    stored in (`capturable`, `master_weights`, `state_bits`). Floating-point buffers are cast to the dtype of state
    (float32 or wider); they are laid out, and rounded where they are to have fewer bits, at the next step.

    Args:
        optimizer: The optimizer whose param groups and parameters the result has.
        state_dict: In the format of torch's optimizers, with full tensors or DTensors.

    Raises:
        ValueError: For other param groups, names or shapes, a missing buffer, and an option that is refused.
    """
    groups = [copy.deepcopy(group) for group in state_dict["param_groups"]]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{len(groups)}, the optimizer {len(optimizer.param_groups)}"
        )
    params: dict[Any, Tensor] = {}
    labels: dict[Any, str] = {}
    group_of: dict[Any, Group] = {}
    for i, (group, own) in enumerate(zip(groups, optimizer.param_groups)):
        for key, at in zip(group["params"], _positions(i, group, own)):
            params[key], group_of[key] = own["params"][at], group
            labels[key] = own["param_names"][at] if "param_names" in own else f"parameter {at} of param group {i}"
        _complete(optimizer, group, own)
    state: dict[Any, Any] = {}
    for key, values in state_dict["state"].items():
        if key in params:
            state[params[key]] = _read(optimizer, group_of[key], params[key], labels[key], values)
        else:
            state[key] = values
    return {"state": state, "param_groups": groups}


def _positions(number: int, saved: Group, own: Group) -> list[int]:
    """Returns the position in the optimizer's param group of each parameter of the saved one."""
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
    """Returns the name of a parameter without the prefixes of DDP and torch.compile."""
    return ".".join(part for part in name.split(".") if part not in ("module", "_orig_mod"))


def _complete(optimizer: ShardedOptimizer, group: Group, own: Group) -> None:
    """Makes a saved param group one of the optimizer's; raises ValueError for options that are refused."""
    check_torch_options(group, optimizer.torch_options)
    drop_torch_options(group, optimizer.torch_options)
    group["params"] = own["params"]
    kept = {name: own[name] for name in ("param_names", *_OWN) if name in own}
    group |= {name: own.get(name, value) for name, value in optimizer.defaults.items() if name not in group} | kept
    if isinstance(group["lr"], Tensor) and group["params"]:
        group["lr"] = group["lr"].to(group["params"][0].device if group["capturable"] else "cpu")
    check_values(group, optimizer.bounds)
    optimizer.check(group)
    check_beside(optimizer, group)
    check_bits(optimizer, group)


def _read(
    optimizer: ShardedOptimizer, group: Group, param: Tensor, label: str, values: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the state of one parameter: complete, or empty."""
    rule = optimizer.rule(group)
    buffers = rule.names(param.shape)
    parts = every_tensor_of(rule)[len(rule.buffers) :]  # codes are no numbers, and scales float32 for any parameter
    kept = ("step", "remainder", *parts)
    read = {name: value if name in rule.sums else _cast(param, name, value, kept) for name, value in values.items()}
    if param.dtype == wide(param.dtype):
        for name in BESIDE:
            read.pop(name, None)  # of a run with 16-bit weights: here the weights themselves are updated
    for name in (*buffers, *parts) if read else ():
        if name in read and read.get(name) is None:
            read.pop(name, None)
    if read:
        others = set(rule.buffers).difference(buffers)
        if lacking := [name for name in optimizer.required(group) if name not in others and lacks(read, name)]:
            raise ValueError(
                f"the state of {label} lacks {', '.join(lacking)} (it has {', '.join(sorted(read))}): load the "
                f"state of a {type(optimizer).__name__} with these options, or none for this parameter"
            )
        for name in buffers:
            if not lacks(read, name):
                check_buffer(rule, param, read, name, label)
        for name in BESIDE:
            if name in read:
                check_shape(param, read[name], f"{name} of {label}", rule.slot(name, param.shape))
        for name in rule.sums:
            read[name] = running_sum(read[name])
        # torch.optim.SGD counts no steps; all of its state is of the steps after the first.
        read["step"] = step_count(param, group, read.get("step", 1.0 if buffers and buffers[0] in read else 0.0))
    return read


def _cast(param: Tensor, name: str, value: Any, kept: tuple[str, ...]) -> Any:
    """Returns a tensor of the state on the parameter's device, in the dtype of state, but for those that are kept."""
    if not isinstance(value, Tensor) or name == "step":
        return value
    if name in kept:
        return value.to(param.device)
    return value.to(param.device, wide(param.dtype)) if value.is_floating_point() else value.to(param.device)
