"""The state that a step works on: made, laid out, counted, and with float32 masters of 16-bit weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt.kernels import dispatch
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.layout import ShardLayout, check_blocks
from distopt.layout.tensors import Trained, same
from distopt.optim.clip import Clip
from distopt.optim.kept import KeptShards
from distopt.optim.masters import BESIDE, Masters, beside, settle_beside
from distopt.optim.narrow_state import columns_of, narrow_of, settle_buffer, tensors_of

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer

Group = dict[str, Any]


class LocalState:
    """The state of an optimizer as the last step left it, so that the next looks only at tensors that were replaced.

    A step compares objects, at the cost of a list; tensors that were put into the state since are laid out again. The
    optimizer is an argument and not kept, lest a cycle keep its memory.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, list[Any]]] = {}  # by param group: what it was laid out for, and the tensors
        self._counts: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._kept: dict[int, KeptShards] = {}  # by param group
        self._masters = Masters()

    def settle(self, optimizer: ShardedOptimizer, layout: ShardLayout, index: int, params: Sequence[Tensor]) -> None:
        """Makes the missing state of parameters of a param group, and lays out the state that came from elsewhere.

        Raises:
            ValueError: For a state buffer of another shape than its parameter.
        """
        group = optimizer.param_groups[index]
        rule = optimizer.rule(group)
        states = [optimizer.state[p] for p in params]
        before, tensors = self._seen.get(index, (None, []))
        names = tensors_of(rule, group)
        form = layout, group["master_weights"], group["state_bits"], [p.dtype for p in params]
        now = [*params, *_tensors(states, names)]
        if form == before and same(now, tensors):
            return
        check_blocks(layout, group)
        for i, (p, state) in enumerate(zip(params, states)):
            if "step" not in state:
                state["step"] = step_count(p, group)
            for name in rule.sums:
                state.setdefault(name, running_sum(0.0))
            for name in rule.names(p.shape):
                settle_buffer(optimizer, layout, group, p, name, f"parameter {i} of {len(params)}")
            settle_beside(layout, group, p, state, f"parameter {i} of {len(params)}")
        self._seen[index] = form, [*params, *_tensors(states, names)]

    def collect(
        self,
        optimizer: ShardedOptimizer,
        layout: ShardLayout,
        groups: Sequence[Trained],
        clip: Clip | None,
        consumes_grads: bool,
    ) -> list[Shards]:
        """Returns this rank's shards of the parameters with a gradient, given by param group, and counts a step."""
        factor = 1.0 if clip is None else clip.factor
        if isinstance(factor, Tensor) and factor.is_cpu:
            factor = factor.item()
        # An engine may step one group at a time and leave the others empty: these need no norms.
        indices = [i for i, group in enumerate(optimizer.param_groups) if group["params"]]
        # All of them before a step is counted, so that a step that is refused changes nothing.
        found = [self.shards(optimizer, layout, i, groups[i], factor) for i in indices]
        return [
            self.counted(optimizer, i, groups[i].stepped, shards, consumes_grads) for i, shards in zip(indices, found)
        ]

    def shards(
        self,
        optimizer: ShardedOptimizer,
        layout: ShardLayout,
        index: int,
        trained: Trained,
        factor: float | Tensor,
    ) -> Shards:
        """Returns this rank's shards of the parameters of a param group with a gradient, before their step counts.

        factor: What the gradients are to be multiplied by.
        """
        group = optimizer.param_groups[index]
        if isinstance(group["lr"], Tensor) and group["lr"].is_cpu:
            group = group | {"lr": group["lr"].item()}  # on a GPU it stays where a graph reads it
        rule = optimizer.rule(group)
        kept, stepped = self._keep(optimizer, layout, index, trained.params, rule), trained.stepped
        if kept.has_masters:
            self.updated(layout, stepped, [optimizer.state[p] for p in stepped], group)
        factor = -factor if group["maximize"] else factor
        shards = kept.shards(group, rule, stepped, layout.grad_shards(stepped, trained.grads), factor)
        if group["capturable"]:
            dispatch.check_capturable(optimizer.directions, shards)
        return shards

    def counted(
        self, optimizer: ShardedOptimizer, index: int, params: Sequence[Tensor], shards: Shards, consumes_grads: bool
    ) -> Shards:
        """Counts a step of these parameters, and returns their shards with the counts."""
        kept = self._kept[index]
        of, states = kept.owners(params), kept.states
        if len(params) != len(states):
            states = [optimizer.state[p] for p in params]
        counts = self._count(index, states, optimizer.param_groups[index]["capturable"])
        sums = {}
        for name, addend in shards.rule.sums.items():
            for state, count in zip(states, counts):
                state[name] = state[name] + addend(count)  # a new tensor, as for the counts
            sums[name] = [float(states[i][name]) for i in of]
        return replace(shards, steps=[counts[i] for i in of], sums=sums, consumes_grads=consumes_grads)

    def _keep(
        self, optimizer: ShardedOptimizer, layout: ShardLayout, index: int, params: list[Tensor], rule: Rule
    ) -> KeptShards:
        """Returns the shards of weights and state of a param group's parameters, with or without a gradient."""
        group = optimizer.param_groups[index]
        states = [optimizer.state[p] for p in params]
        options = tensors_of(rule, group), group["master_weights"], group["state_bits"]
        kept = self._kept.get(index)
        if kept is None or not kept.hold(layout, params, states, options):
            self.settle(optimizer, layout, index, params)
            kinds = {beside(p, group) for p in params if p.dtype.itemsize < 4}
            columns = {name: columns_of(layout, rule, name, params, states) for name in rule.buffers}
            buffers = {name: column for name, (column, _) in columns.items()}
            narrow = None
            if kinds & {"remainder", ""} or group["state_bits"] < 32:
                scales = {name: own for name, (_, own) in columns.items() if own}
                narrow = narrow_of(optimizer, layout, index, params, scales)
            kept = self._kept[index] = KeptShards(layout, params, states, options, kinds, buffers, narrow)
        kept.states = states
        return kept

    def updated(
        self, layout: ShardLayout, params: Sequence[Tensor], states: Iterable[Any], group: Group
    ) -> list[Tensor]:
        """Returns the tensors that a step updates, in the layout of their parameters: these, or their masters."""
        return [self._updated(layout, p, state, group) for p, state in zip(params, states)]

    def round_masters(self, optimizer: ShardedOptimizer, layout: ShardLayout, params: Iterable[Tensor]) -> None:
        """Rounds the masters, if there are any, to their parameters."""
        for p in params if any(kept.has_masters for kept in self._kept.values()) else ():
            if "master" in optimizer.state[p]:
                self._masters.round(layout, p, optimizer.state[p]["master"])

    def _updated(self, layout: ShardLayout, param: Tensor, state: Mapping[str, Any], group: Group) -> Tensor:
        """Returns the tensor that a step updates: the parameter, or its master."""
        if "master" not in state:
            return param
        return self._masters.refresh(layout, param, state["master"], always=group["capturable"])

    def _count(self, index: int, states: list[dict[str, Any]], capturable: bool) -> list[Any]:
        """Counts a step in each of a group's states, and returns the counts: on the device, if capturable.

        On the host the counts become views of one tensor, so that the next step adds to all of them at once.
        """
        steps = [state["step"] for state in states]
        if not steps:
            return []
        if capturable:
            torch._foreach_add_(steps, 1.0)  # in place: a graph counts at each replay
            return steps
        all_counts, views = self._counts.get(index, (steps[0], ()))
        if same(steps, views):
            return all_counts.add_(1.0).tolist()
        # New tensors: an engine that loads state may share one count among partitions.
        all_counts = torch.stack(steps).add_(1.0)
        self._counts[index] = all_counts, all_counts.unbind()
        for state, count in zip(states, self._counts[index][1]):
            state["step"] = count
        return all_counts.tolist()


def step_count(param: Tensor, group: Group, steps: Any = 0.0) -> Tensor:
    """Returns a parameter's step count: a new 0-D float32 tensor, on the host unless the group is capturable.

    torch's fused optimizers keep it on the device, where reading it waits.
    """
    device = param.device if group["capturable"] else torch.device("cpu")
    return torch.as_tensor(steps).detach().to(device, torch.float32, copy=True).reshape(())


def running_sum(value: Any) -> Tensor:
    """Returns a running sum of a rule: a new 0-D float64 tensor on the host."""
    return torch.as_tensor(value).detach().to("cpu", torch.float64, copy=True).reshape(())


def _tensors(states: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[Any]:
    """Returns all tensors of a group's state but the counts, which a step replaces itself."""
    return list(chain.from_iterable(map(state.get, (*names, *BESIDE)) for state in states))
