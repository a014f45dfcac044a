"""The driver: state, param groups, and the one `step` that every optimizer shares."""

from __future__ import annotations

import copy
import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor

from distopt import layout as layouts
from distopt.kernels import dispatch
from distopt.kernels.shards import Shards
from distopt.layout import FlatLayout, ShardLayout
from distopt.optim.eager import eager_island
from distopt.optim.masters import Masters
from distopt.optim.state import Settled, read_state_dict
from distopt.optim.torch_options import TORCH_OPTIONS, Accepted, check_torch_options, drop_torch_options
from distopt.optim.validate import check_group, check_values
from distopt.proof import before_step

# What the driver itself asks of a group, for rules that do not name it.
_COMMON = {"maximize": False, "trust_ratio": False, "trust_clip": None, "capturable": False}


class ShardedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update is the unsharded one, however its parameters are cut up.

        directions = rule(params, grads, state)
        p <- p - lr * ratio * direction            ratio = |p| / |direction| of the whole layer, or 1

    A subclass gives the names of its state buffers (`slots`) and its rule (`directions`); neither knows of ranks or of
    `lr`. State is made at the first step, for every trainable parameter of a group, because engines swap parameters
    after construction and all ranks must hold the same keys; it is sharded as the layout says, also where it was loaded
    or made before the layout was known. Parameters of 16 bits are stepped by float32 masters, which are part of their
    state (`master`) on every layout. Every group may set `maximize`, `trust_ratio`, `trust_clip` and `capturable`, also
    of a subclass that does not name them. Options of torch that have no meaning here (`fused`, `foreach`) are taken and
    dropped, those that would change an update are refused; `torch_options` says which, and a rule that has one of them
    leaves it out there.
    """

    torch_options: Mapping[str, Accepted] = TORCH_OPTIONS
    _checked: ShardLayout | None = None  # the layout of the last step

    def __init__(self, params: Any, defaults: dict[str, Any], **torch_options: Any) -> None:
        if unknown := torch_options.keys() - self.torch_options.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}")
        check_torch_options(torch_options, self.torch_options)
        self._bound: ShardLayout | None = None
        self._inferred: ShardLayout | None = None
        self._given: list[weakref.ref[Tensor]] = []
        self._ratios: list[tuple[list[int], Tensor]] = []  # of the last step, by layer
        self._forget()
        super().__init__(params, _COMMON | defaults)

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state buffers that each parameter of the group has, each of the parameter's shape."""
        raise NotImplementedError

    def directions(self, shards: Shards) -> list[Tensor]:
        """The rule: updates the buffers in place and returns new tensors, one direction for each parameter."""
        raise NotImplementedError

    def bind(self, layout: ShardLayout) -> None:
        """Takes the layout from an engine whose parameters do not tell it themselves (ZeRO-1, DeepSpeed).

        State that is there already is laid out anew at the next step.
        Raises ValueError for DeepSpeed's where a group is capturable: its partitions share one step count; and where
        all state is of parameters that are not in the layout, since it would be lost.
        """
        if isinstance(layout, FlatLayout) and any(group["capturable"] for group in self.param_groups):
            raise ValueError("capturable=True under DeepSpeed, which calls step() once for each partition: give False")
        self._refuse_lost_state(layout)
        if self._bound is not None:
            self._bound.wait()
        self._bound = layout
        self._forget()

    @property
    def layout(self) -> ShardLayout:
        """Where the layers lie: what `bind` was given, else what the parameters tell.

        Raises ValueError where the parameters were replaced by plain tensors that nobody described: a norm of those
        would be silently wrong.
        """
        params = layouts.trained(p for group in self.param_groups for p in group["params"])
        if self._bound is not None:
            if foreign := [p for p in params if p not in self._bound]:
                raise ValueError(
                    f"{len(foreign)} parameters, the first of shape {tuple(foreign[0].shape)}, are not in the layout "
                    "that was bound: make the optimizer from the same model as the layout, and bind again if it changed"
                )
            self._bound.wait()
            return self._bound
        if self._inferred is None or not all(p in self._inferred for p in params):
            self._refuse_unknown(params)
            inferred = layouts.infer_layout(params)
            self._refuse_lost_state(inferred)
            self._inferred = inferred
        return self._inferred

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @eager_island
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; the closure, if given, clears the gradients, computes the loss, backpropagates and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        before_step(self)
        for group in self.param_groups:
            check_values(group)
            check_torch_options(group, self.torch_options)
        layout = self.layout
        if layout is not self._checked:  # what FSDP2 frees after a backward pass was still there for clipping
            layouts.refuse_foreign(layout.segments)
            self._checked = layout
        owners = [layouts.with_gradient(group["params"]) for group in self.param_groups]
        self._forget_ratios(layout, [p for held in owners for p in held])
        # DeepSpeed's stage 3 steps one group at a time and leaves the others empty: they need no norms.
        numbers = [i for i, group in enumerate(self.param_groups) if group["params"]]
        # All of them before a step is counted, so that one that is refused moves nothing.
        found = [self._shards(layout, i, owners[i]) for i in numbers]
        work = self.rate(layout, [self._counted(layout, i, owners[i], shards) for i, shards in zip(numbers, found)])
        moves = [move for shards in work for move in dispatch.updates(self, shards)]
        for move in moves:
            if not self.trusts(move.group):
                move.step()
        if trusted := [move for move in moves if self.trusts(move.group)]:
            squares = dispatch.joined([move.squares() for move in trusted])
            layers = [layer for move in trusted for layer in move.layers]
            weight, update = layout.total(layers, *squares).sqrt()
            ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
            for move in trusted:
                bounds = move.group["trust_clip"]
                factors = ratios if bounds is None else ratios.clamp(*bounds)
                move.apply(factors)
                self._ratios.append((move.layers, factors))
        self._publish(layout, [p for held in owners for p in held])
        return loss

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """The trust ratio of each layer in the last step, by parameter: of those that this rank holds a part of.

        Under DeepSpeed, which makes a step of several calls, those of all calls.
        """
        params = self.layout.params
        return {params[layer]: ratios[layer] for layers, ratios in self._ratios for layer in layers}

    def _forget_ratios(self, layout: ShardLayout, owners: list[Tensor]) -> None:
        """Drops the ratios of the last step; where a step has several calls, those of the layers of this call."""
        stepped = set(layout.layers(owners))
        kept = [] if layout.gradients_stay else self._ratios
        self._ratios = [(layers, factors) for layers, factors in kept if stepped.isdisjoint(layers)]

    def trusts(self, group: dict[str, Any]) -> bool:
        """Whether the trust ratio multiplies the group's directions."""
        return group["trust_ratio"]

    def rate(self, layout: ShardLayout, work: list[Shards]) -> list[Shards]:
        """Gives the shards their `rates`; for rules that need norms before their state moves."""
        return work

    def init_state(self) -> None:
        """Makes the state of every trainable parameter that has none: zeros, as before the first step.

        Lays out what is there as the layout says: every rank has to call it.
        """
        layout = self.layout
        for i, group in enumerate(self.param_groups):
            self._settle(layout, i, layout.local_params(i, group["params"]))

    def required(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of what a loaded state has to have, for parameters of the group that have any."""
        return (*self.slots(group), "step")

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        """The first value of one state buffer."""
        return layout.zeros(param)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError for a hyper-parameter out of bounds, mistyped or misspelt."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_torch_options(group, self.torch_options)
            drop_torch_options(group, self.torch_options)
            check_group(group, self.defaults)
            self.check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._given += [weakref.ref(p) for p in group["params"]]

    def check(self, group: dict[str, Any]) -> None:
        """Refuses, by ValueError, combinations of options that the rule does not have."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, and checked before anything changes; float32 state of 16-bit parameters stays float32.

        Parameters are matched by name where the groups here and there have `param_names`, else by position. Shapes are
        those of whole parameters: what is sharded otherwise than this optimizer's parameters is laid out anew at the
        next step.

        Raises ValueError for a state of other shapes, with a buffer missing, or of other options, groups or names.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = result if (result := pre_hook(self, state_dict)) is not None else state_dict
        # Not by torch's (2.13), which casts all state to the parameter's dtype, and finds out in the step what lacks.
        self.__setstate__(read_state_dict(self, state_dict))
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """As in torch: what is pickled has no layout, and its state is laid out by the one it is given afterwards."""
        if isinstance(self._bound, FlatLayout):
            self._bound.moved(lambda param: param)  # says why not
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        state = {**state, "defaults": dict(defaults)}
        super().__setstate__(state)
        self.defaults = defaults  # without what torch 2.13 adds to them, which groups added later would have
        self.state = defaultdict(dict, self.state)
        given = [weakref.ref(p) for group in self.param_groups for p in group["params"]]
        for name, empty in (("_bound", None), ("_inferred", None), ("_given", given), ("_ratios", [])):
            self.__dict__.setdefault(name, empty)
        self._forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedOptimizer:
        """An optimizer of copies of the parameters, those of `copy.deepcopy((model, optimizer))`; with its layout.

        As in torch, hooks are not copied, nor is what a schedule has made of `step`.
        Raises ValueError for one that is bound to DeepSpeed's partitions.
        """
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if self._bound is not None:
            self._bound.wait()
        # torch 2.13 fails to copy a DTensor that has a gradient; plain parameters are copied without theirs.
        grads = [(p, p.grad) for group in self.param_groups for p in group["params"] if hasattr(p, "placements")]
        try:
            for p, _ in grads:
                p.grad = None
            new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        finally:
            for p, grad in grads:
                p.grad = grad
        if self._bound is not None:
            new._bound = self._bound.moved(lambda param: copy.deepcopy(param, memo))
        return new

    def _shards(self, layout: ShardLayout, number: int, owners: list[Tensor]) -> Shards:
        """This rank's shards of the group's parameters that have a gradient (the owners), before their step counts."""
        group = self.param_groups[number]
        if isinstance(group["lr"], Tensor) and group["lr"].is_cpu:
            group = group | {"lr": group["lr"].item()}  # on a GPU it stays where a graph reads it
        self._settle(layout, number, layouts.trained(group["params"]))
        grads = layout.grads(owners)
        if group["maximize"] and grads:
            grads = list(torch._foreach_neg(grads))
        states = [self.state[p] for p in owners]
        params = layout.shards(owners, [self._stepped(layout, p, state, group) for p, state in zip(owners, states)])
        buffers = {name: layout.shards(owners, [state[name] for state in states]) for name in self.slots(group)}
        layers = layout.layers(owners)
        shards = Shards(group, layers, params, grads, buffers, [0.0] * len(params), layout.rows(layers))
        if group["capturable"]:
            dispatch.check_capturable(self, shards)
        return shards

    def _stepped(self, layout: ShardLayout, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """What a step moves: the parameter, or its master."""
        if param.dtype.itemsize >= 4:
            return param
        return self._masters.refresh(layout, param, state["master"], always=group["capturable"])

    def _counted(self, layout: ShardLayout, number: int, owners: list[Tensor], shards: Shards) -> Shards:
        """The shards that are not empty, with the counts of their parameters' steps, this one included."""
        counts = self._count(number, [self.state[p] for p in owners])
        steps = [count for p, count in zip(owners, counts) for _ in layout.segments[p]]
        held = [i for i, p in enumerate(shards.params) if p.numel()]
        shards = replace(shards, steps=steps)
        return shards if len(held) == len(shards.params) else shards.part(held)

    def _count(self, number: int, states: list[dict[str, Any]]) -> list[Any]:
        """Counts a step of each of the group's states, and returns how many there are: on the device, if capturable.

        On the host the counts become views of one tensor, so that the next step adds to all of them at once.
        """
        steps = [state["step"] for state in states]
        if not steps:
            return []
        if self.param_groups[number]["capturable"]:
            torch._foreach_add_(steps, 1.0)  # in place: a graph counts at each replay
            return steps
        whole, views = self._counts.get(number, (steps[0], ()))
        if len(steps) == len(views) and all(map(operator.is_, steps, views)):
            return whole.add_(1.0).tolist()
        # New tensors: DeepSpeed's stage-3 loading shares one among partitions.
        whole = torch.stack(steps).add_(1.0)
        self._counts[number] = whole, whole.unbind()
        for state, count in zip(states, self._counts[number][1]):
            state["step"] = count
        return whole.tolist()

    def _publish(self, layout: ShardLayout, owners: list[Tensor]) -> None:
        """Rounds the masters, if there are any, to the parameters, and gives other ranks their copies."""
        for p in owners:
            if p.dtype.itemsize < 4:
                self._masters.publish(layout, p, self.state[p]["master"])
        layout.publish(owners)

    def _settle(self, layout: ShardLayout, number: int, params: list[Tensor]) -> None:
        """Makes what the parameters of a group lack of their state, and lays out what came from elsewhere."""
        settled = self._settled.setdefault(number, Settled())
        settled.settle(self, layout, self.param_groups[number], params)

    def _forget(self) -> None:
        """Of a state that was exchanged: the next step looks at all of it."""
        self._counts: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._settled: dict[int, Settled] = {}
        self._masters = Masters()

    def _check_capture(self) -> None:
        """A graph would repeat the step count of its capture for ever."""
        if all(group["capturable"] for group in self.param_groups) or not torch.cuda.is_available():
            return
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"a CUDA graph captures {type(self).__name__}.step(), which counts its steps on the host: make the "
                "optimizer with capturable=True (and with lr a tensor on the device, if a schedule is to move it)"
            )

    def _refuse_unknown(self, params: list[Tensor]) -> None:
        """Plain tensors that were not given at construction come from an engine that must say what they hold."""
        given = {id(p) for ref in self._given if (p := ref()) is not None}
        unknown = [p for p in params if id(p) not in given and not hasattr(p, "placements")]
        if unknown and self._given:
            raise ValueError(
                f"{len(unknown)} parameters (the first of shape {tuple(unknown[0].shape)}) were replaced by plain "
                "tensors after the optimizer was made: which layers they hold is unknown, so a norm of them would be "
                "silently wrong; call optimizer.bind(layout) with the engine's layout, or in a Trainer mix in "
                "distopt.integrations.transformers.ShardedTrainerMixin (DeepSpeed at stage 0 in 16 "
                "bits steps before it can have one: use stage 1, or DDP)"
            )

    def _refuse_lost_state(self, layout: ShardLayout) -> None:
        """State whose parameters an engine has replaced, all of them, would be begun anew without a word."""
        held = layouts.trained(p for p, state in self.state.items() if state)  # a frozen one keeps its state
        if held and not any(p in layout for p in held):
            raise ValueError(
                f"the optimizer has state of {len(held)} parameters, none of which is in the layout: the engine has "
                "replaced them; load the state afterwards, or clear optimizer.state to begin with zeros"
            )
