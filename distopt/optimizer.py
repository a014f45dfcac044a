"""The driver: state, param groups, and the one `step` that every optimizer shares."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor

from distopt import kernels
from distopt import layout as layouts
from distopt.hyperparameters import check_group
from distopt.layout import FlatLayout, ShardLayout
from distopt.proof import before_step
from distopt.shards import Shards

# What the driver itself asks of a group, for rules that do not name it.
_COMMON = {"maximize": False, "trust_ratio": False, "trust_clip": None, "capturable": False}


class ShardedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update is the unsharded one, however its parameters are cut up.

        directions = rule(params, grads, state)
        p <- p - lr * ratio * direction            ratio = |p| / |direction| of the whole layer, or 1

    A subclass gives the names of its state buffers (`slots`) and its rule (`directions`); neither knows of ranks or of
    `lr`. State is made at the first step, for every trainable parameter of a group, because engines swap parameters
    after construction and all ranks must hold the same keys. Every group may set `maximize`, `trust_ratio`,
    `trust_clip` and `capturable`, also of a subclass that does not name them.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._bound: ShardLayout | None = None
        self._inferred: ShardLayout | None = None
        self._given: list[weakref.ref[Tensor]] = []
        self._counts: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._ratios: list[tuple[list[int], Tensor]] = []  # of the last step, by layer
        super().__init__(params, _COMMON | defaults)

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state buffers that each parameter of the group has, each of the parameter's shape."""
        raise NotImplementedError

    def directions(self, shards: Shards) -> list[Tensor]:
        """The rule: updates the buffers in place and returns new tensors, one direction for each parameter."""
        raise NotImplementedError

    def bind(self, layout: ShardLayout) -> None:
        """Takes the layout from an engine whose parameters do not tell it themselves (ZeRO-1, DeepSpeed).

        Raises ValueError for DeepSpeed's where a group is capturable: its partitions share one step count.
        """
        if isinstance(layout, FlatLayout) and any(group["capturable"] for group in self.param_groups):
            raise ValueError("capturable=True under DeepSpeed, which calls step() once for each partition: give False")
        self._bound = layout

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
            self._inferred = layouts.of(params)
        return self._inferred

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; the closure, if given, clears the gradients, computes the loss, backpropagates and returns it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        before_step(self)
        layout = self.layout
        self._ratios = []
        owners = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        # DeepSpeed's stage 3 steps one group at a time and leaves the others empty: they need no norms.
        numbers = [i for i, group in enumerate(self.param_groups) if group["params"]]
        work = self.rate(layout, [self._shards(layout, i, owners[i]) for i in numbers])
        moves = [move for shards in work for move in kernels.moves(self, shards)]
        for move in moves:
            if not self.trusts(move.group):
                move.step()
        if trusted := [move for move in moves if self.trusts(move.group)]:
            squares = kernels.joined([move.squares() for move in trusted])
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
        """The trust ratio of each layer in the last step, by parameter: of those that this rank holds a part of."""
        params = self.layout.params
        return {params[layer]: ratios[layer] for layers, ratios in self._ratios for layer in layers}

    def trusts(self, group: dict[str, Any]) -> bool:
        """Whether the trust ratio multiplies the group's directions."""
        return group["trust_ratio"]

    def rate(self, layout: ShardLayout, work: list[Shards]) -> list[Shards]:
        """Gives the shards their `rates`; for rules that need norms before their state moves."""
        return work

    def init_state(self) -> None:
        """Makes the state of every trainable parameter that has none: zeros, as before the first step."""
        layout = self.layout
        for i, group in enumerate(self.param_groups):
            self._init_states(layout, group, layout.owners(i, group["params"]))

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        """The first value of one state buffer."""
        return layout.zeros(param)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError for a hyper-parameter out of bounds, mistyped or misspelt."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_group(group, self.defaults)
            self.check(group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._given += [weakref.ref(p) for p in group["params"]]

    def check(self, group: dict[str, Any]) -> None:
        """Refuses, by ValueError, combinations of options that the rule does not have."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but a parameter that has a float32 master keeps it, and its state, in float32."""
        super().load_state_dict(state_dict)
        index = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(index, (p for group in self.param_groups for p in group["params"])):
            saved = state_dict["state"].get(i, {})
            if "master" in saved:  # torch has cast all of it to the parameter's dtype
                self.state[p].update({k: v.to(p.device, copy=True) for k, v in saved.items() if k != "step"})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Also reached from load_state_dict, with groups that a torch.optim optimizer may have saved.
        # What they do not say stays as it is in the groups we have; unpickled, we have none but those.
        groups = self.__dict__.get("param_groups", state["param_groups"])
        for group in state["param_groups"]:
            if group.get("amsgrad"):
                raise ValueError("the state dict has amsgrad=True, which distopt has not: its update would differ")
        super().__setstate__(state)
        given = [weakref.ref(p) for group in self.param_groups for p in group["params"]]
        for name, empty in (("_bound", None), ("_inferred", None), ("_given", given), ("_counts", {}), ("_ratios", [])):
            self.__dict__.setdefault(name, empty)
        for group, own in zip(self.param_groups, groups):
            group["capturable"] = own.get("capturable", False)  # how it runs, which a checkpoint does not say
            if not group["capturable"] and isinstance(group["lr"], Tensor):
                group["lr"] = float(group["lr"])
            for name, value in self.defaults.items():
                group.setdefault(name, own.get(name, value))
            for p, values in ((p, self.state[p]) for p in group["params"] if p in self.state):
                if values.get("momentum_buffer") is not None:
                    values.setdefault("step", torch.tensor(1.0))  # torch.optim.SGD counts no steps
                if "step" in values:  # torch's fused optimizers keep it on the device, where reading it waits
                    device = p.device if group["capturable"] else "cpu"
                    # A copy, since what it was loaded from may be an optimizer's that goes on counting.
                    values["step"] = torch.as_tensor(values["step"]).to(device, torch.float32, copy=True)

    def _shards(self, layout: ShardLayout, number: int, owners: list[Tensor]) -> Shards:
        """This rank's shards of the group's parameters that have a gradient (the owners); counts their step."""
        group = self.param_groups[number]
        self._init_states(layout, group, layouts.trained(group["params"]))
        if any(p.grad.is_sparse for p in owners):  # type: ignore[union-attr]
            raise ValueError("sparse gradients have no sharded update: use nn.Embedding(sparse=False)")
        states = [self.state[p] for p in owners]
        counts = self._count(number, states)
        params = layout.shards(owners, [state.get("master", p) for state, p in zip(states, owners)])
        grads = layout.grads(owners)
        if group["maximize"] and grads:
            grads = list(torch._foreach_neg(grads))
        buffers = {name: layout.shards(owners, [state[name] for state in states]) for name in self.slots(group)}
        steps = [count for p, count in zip(owners, counts) for _ in layout.segments[p]]
        shards = Shards(group, layout.layers(owners), params, grads, buffers, steps)
        held = [i for i, p in enumerate(params) if p.numel()]
        return shards if len(held) == len(params) else shards.part(held)

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
        whole, views = self._counts.get(number, (torch.zeros(0), ()))
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
            if p.dtype.itemsize < 4 and "master" in self.state[p]:
                torch._foreach_copy_(layout.split(p, p), layout.split(p, self.state[p]["master"]))
        layout.publish(owners)

    def _init_states(self, layout: ShardLayout, group: dict[str, Any], params: Iterable[Tensor]) -> None:
        """Makes what the parameters of the group lack of their state."""
        names = self.slots(group)
        for p in params:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), device=p.device if group["capturable"] else "cpu")
            if p.dtype.itemsize < 4 and "master" not in state and (master := layout.master(p)) is not None:
                state["master"] = master
            for name in names:
                if state.get(name) is None:
                    state[name] = self.init_slot(layout, group, name, p)

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
                "distopt.trainer.ShardedTrainerMixin (DeepSpeed at stage 0 in 16 bits steps before it can have one: "
                "use stage 1, or DDP)"
            )
