"""The contents of a checkpoint, by parameter names without those of wrappers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from distopt.checkpoint import manifest
from distopt.kernels import rounding
from distopt.kernels.rounding import BESIDE
from distopt.layout import ShardLayout
from distopt.layout.names import bare_parameters
from distopt.layout.range_shard import RangeShard

State = dict[str, dict[str, Any]]


class Contents:
    """The tensors of a model and the state of its optimizer, where each parameter has its own: DDP, ZeRO-1, FSDP2.

    Args:
        model: The model.
        optimizer: Its optimizer; one of distopt has created all of its state.

    Attributes:
        tensors: The local tensors of the model, by name. A checkpoint is compared with their full shapes and dtypes.
        state: The local state buffers, by the names of parameter and buffer; compared likewise.
        masters: The float32 masters that stand for the weights of their parameters, so that a checkpoint has float32
            weights wherever they are trained in float32: those that ZeRO-1 shards, also as weights and remainders.
        groups: The param groups, with names in place of parameters.

    Raises:
        ValueError: For a model or an optimizer that would be saved wrongly, or could not be loaded.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        self.model, self.optimizer = model, optimizer
        # First, because it reshards the model where a forward pass has left FSDP2's unsharded parameters in place.
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
        # Without param_names, which are the same names: loading would replace ours by the checkpoint's.
        self.groups: list[dict[str, Any]] = [
            {key: value for key, value in group.items() if key != "param_names"} for group in named["param_groups"]
        ]
        self.state: State = {name: buffers for name, buffers in named["state"].items() if buffers}
        self.masters = _sharded_masters(model, optimizer)
        self._with_remainder = {p for p in self.masters if "remainder" in optimizer.state[p]}
        for name, p in bare_parameters(model, remove_duplicate=False).items():
            if p in self.masters:
                self.tensors[name] = self.masters[p]
                if name in self.state:  # by a copy: it may be the optimizer's own
                    self.state[name] = {key: value for key, value in self.state[name].items() if key not in BESIDE}

    def saved(self) -> dict[str, Any]:
        """The tensors to write, on every rank."""
        return {"model": self.tensors, "optimizer": {"state": self.state}}

    def to_fill(self, like: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The tensors into which to read a checkpoint whose state is described by `like`."""
        names = [name for group in self.groups for name in group["params"]]
        params = dict(zip(names, _params(self.optimizer)))
        state = {name: _empty(params[name], self.state.get(name, {}), buffers) for name, buffers in like.items()}
        return {"model": self.tensors, "optimizer": {"state": state}}

    def fill(self, read: Mapping[str, Any], groups: list[dict[str, Any]] | None) -> None:
        """Loads the tensors that were read, and the checkpoint's param groups, into the model and the optimizer.

        Without groups, None, the optimizer keeps its own, and its state.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        masters = {id(master) for master in self.masters.values()}  # they were filled in place
        weights = {name: value for name, value in read["model"].items() if id(value) not in masters}
        set_model_state_dict(self.model, weights, options=StateDictOptions(strict=not masters))
        if groups is not None:
            self._fill_state(read, groups)
        self._round_masters()

    def _fill_state(self, read: Mapping[str, Any], groups: list[dict[str, Any]]) -> None:
        # Not by set_optimizer_state_dict, which steps an optimizer that has not stepped yet, loads nothing where there
        # are gradients, and drops the state of frozen parameters.
        index = {name: i for i, name in enumerate(name for group in self.groups for name in group["params"])}
        numbered = {index[name]: buffers for name, buffers in read["optimizer"]["state"].items()}
        # The groups have the same parameters, perhaps in another order; ours counts, since they are filled by position.
        groups = [
            {
                **{key: value for key, value in saved.items() if key != "param_names"},
                "params": list(map(index.get, own)),
            }
            for saved, own in zip(groups, (group["params"] for group in self.groups))
        ]
        self.optimizer.load_state_dict({"state": numbered, "param_groups": groups})

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Gives the model the weights of masters that were filled, and the optimizer these masters."""
        if not self.masters:
            return
        layout: ShardLayout = self.optimizer.layout  # type: ignore[attr-defined]
        for p, master in self.masters.items():
            (weights,), state = layout.split(p, p.detach()), self.optimizer.state.get(p)
            if p in self._with_remainder:
                high, low = rounding.split(master.to_local())
                weights.copy_(high)
                beside = {"remainder": RangeShard(low, master.shape, master.placements[0], master.device_mesh)}
            else:
                weights.copy_(master.to_local())
                beside = {"master": master}
            if state:
                state.update(beside)
        layout.publish(list(self.masters))
        layout.sync.wait()


def _sharded_masters(model: nn.Module, optimizer: Optimizer) -> dict[Tensor, RangeShard]:
    """Returns the masters of the parameters of a model whose weights ZeRO-1 keeps in 16 bits."""
    found: dict[Tensor, RangeShard] = {}
    for p in model.parameters():
        state = optimizer.state.get(p, {})
        if isinstance(master := state.get("master"), RangeShard):
            found[p] = master
        elif isinstance(remainder := state.get("remainder"), RangeShard):
            found[p] = _joined(optimizer.layout, p, remainder)  # type: ignore[attr-defined]
    return found


def _joined(layout: ShardLayout, param: Tensor, remainder: RangeShard) -> RangeShard:
    """Returns the float32 values of this rank's weights, in new memory."""
    (weights,) = layout.split(param, param.detach())
    values = rounding.join(weights, remainder.to_local())
    return RangeShard(values, remainder.shape, remainder.placements[0], remainder.device_mesh)


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


def _empty(param: Tensor, own: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors that DCP fills with the state of a parameter: the optimizer's own tensors where they fit."""
    ours = manifest.described(own)
    state: dict[str, Any] = {}
    for name, description in like.items():
        if description is None:
            state[name] = None
        elif name != "step" and ours.get(name) == description:
            state[name] = own[name]
        elif name != "step" and description[0] == list(param.shape):
            state[name] = torch.zeros_like(param, dtype=getattr(torch, description[1]), requires_grad=False)
        else:  # on the CPU, where torch keeps step counts; a new tensor, since some optimizers share one
            state[name] = torch.zeros(description[0], dtype=getattr(torch, description[1]))
    return state
