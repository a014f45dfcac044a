"""What a checkpoint holds of a model and its optimizer, by the names that the parameters have without a wrapper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.checkpoint import manifest

State = dict[str, dict[str, Any]]


class Contents:
    """A model's tensors and its optimizer's state where every parameter has its own: DDP, ZeRO-1, FSDP2.

    optimizer: with all the state that it will have, if it is distopt's.
    tensors, state: by name, as this rank has them; their shapes and dtypes are what a checkpoint is compared with.
    groups: the param groups, with names for their params.
    Raises ValueError for what would be saved wrongly, or could not be loaded.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        self.model, self.optimizer = model, optimizer
        # First, because it puts the shards back where a forward pass has left FSDP2's whole parameters in the model.
        self.tensors: dict[str, Any] = get_model_state_dict(model)
        _check_support(model, optimizer)
        # torch 2.13 (checkpoint/state_dict.py, _init_optim_state) takes a step with an optimizer whose state is empty.
        bare = [p for p in _params(optimizer) if p not in optimizer.state]
        optimizer.state.update({p: {} for p in bare})
        try:
            named: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
        finally:
            for p in bare:
                del optimizer.state[p]
        # Without param_names, which are the same names: loading would put the checkpoint's in the place of ours.
        self.groups: list[dict[str, Any]] = [
            {key: value for key, value in group.items() if key != "param_names"} for group in named["param_groups"]
        ]
        self.state: State = {name: buffers for name, buffers in named["state"].items() if buffers}

    def saved(self) -> dict[str, Any]:
        """What is to be written, by every rank."""
        return {"model": self.tensors, "optimizer": {"state": self.state}}

    def to_fill(self, like: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """What a checkpoint, whose state is described by `like`, is to be read into."""
        names = [name for group in self.groups for name in group["params"]]
        params = dict(zip(names, _params(self.optimizer)))
        state = {name: _empty(params[name], self.state.get(name, {}), buffers) for name, buffers in like.items()}
        return {"model": self.tensors, "optimizer": {"state": state}}

    def fill(self, read: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        """Puts what was read, and the checkpoint's param groups, into the model and the optimizer."""
        from torch.distributed.checkpoint.state_dict import set_model_state_dict

        set_model_state_dict(self.model, read["model"])
        # Not by set_optimizer_state_dict, which takes a step where the optimizer has none behind it, or loads nothing
        # where there are gradients, and drops the state of frozen parameters.
        index = {name: i for i, name in enumerate(name for group in self.groups for name in group["params"])}
        numbered = {index[name]: buffers for name, buffers in read["optimizer"]["state"].items()}
        # The groups hold the same parameters, perhaps in another order: in ours, since they are filled by position.
        groups = [
            {
                **{key: value for key, value in saved.items() if key != "param_names"},
                "params": list(map(index.get, own)),
            }
            for saved, own in zip(groups, (group["params"] for group in self.groups))
        ]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})


def _check_support(model: nn.Module, optimizer: Optimizer) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("the model is wrapped in FullyShardedDataParallel (FSDP1): use fully_shard (FSDP2)")
    own = set(model.parameters())
    if unknown := [p for p in _params(optimizer) if p not in own]:
        raise ValueError(
            f"{len(unknown)} parameters of the optimizer are not the model's, the first of shape "
            f"{list(unknown[0].shape)}: make the optimizer from the model's parameters after the model is wrapped"
        )
    for name, value in (item for state in optimizer.state.values() for item in state.items()):
        if isinstance(value, (dict, list, tuple)):
            raise ValueError(
                f"the state {name} of {type(optimizer).__name__} is a {type(value).__name__}, not a tensor"
            )


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _empty(param: Tensor, held: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """What DCP is to fill with the state of a parameter: the tensors that the optimizer holds, where they fit."""
    ours = manifest.described(held)
    state: dict[str, Any] = {}
    for name, description in like.items():
        if description is None:
            state[name] = None
        elif name != "step" and ours.get(name) == description:
            state[name] = held[name]
        elif name != "step" and description[0] == list(param.shape):
            state[name] = torch.zeros_like(param, dtype=getattr(torch, description[1]), requires_grad=False)
        else:  # on the CPU, where torch keeps a step; a tensor of its own, since some optimizers share one
            state[name] = torch.zeros(description[0], dtype=getattr(torch, description[1]))
    return state
