"""The driver: state, param groups, and the one `step` that every optimizer shares."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from distopt import kernels
from distopt import layout as layouts
from distopt.hyperparameters import check_group
from distopt.layout import ShardLayout
from distopt.shards import Shards


class ShardedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose update is the unsharded one, however its parameters are cut up.

        directions = rule(params, grads, state)
        p <- p - lr * ratio * direction            ratio = |p| / |direction| of the whole layer, or 1

    A subclass gives the names of its state buffers (`slots`) and its rule (`directions`); neither knows of ranks or of
    `lr`. State is made at the first step, for every trainable parameter of a group, because engines swap parameters
    after construction and all ranks must hold the same keys. Every group may set `trust_ratio` and `trust_clip`.
    """

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._bound: ShardLayout | None = None
        self._inferred: ShardLayout | None = None
        self._given: list[weakref.ref[Tensor]] = []
        super().__init__(params, defaults)

    def slots(self, group: dict[str, Any]) -> tuple[str, ...]:
        """The names of the state buffers that each parameter of the group has, each of the parameter's shape."""
        raise NotImplementedError

    def directions(self, shards: Shards) -> list[Tensor]:
        """The rule: updates the buffers in place and returns new tensors, one direction for each parameter."""
        raise NotImplementedError

    def bind(self, layout: ShardLayout) -> None:
        """Takes the layout from an engine whose parameters do not tell it themselves (ZeRO-1, DeepSpeed)."""
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
        layout = self.layout
        work = self.rate(layout, [self._shards(layout, group) for group in self.param_groups])
        moves = [move for shards in work for move in kernels.moves(self, shards)]
        for move in moves:
            if not self.trusts(move.group):
                move.step()
        if trusted := [move for move in moves if self.trusts(move.group)]:
            squares = [move.squares() for move in trusted]
            layers = [layer for move in trusted for layer in move.layers]
            weight, update = layout.total(layers, *map(torch.cat, zip(*squares))).sqrt()
            ratios = torch.where((weight > 0) & (update > 0), weight / update, 1.0)
            for move in trusted:
                bounds = move.group["trust_clip"]
                move.apply(ratios if bounds is None else ratios.clamp(*bounds))
        self._publish(layout)
        return loss

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
            for p in layout.owners(i, group["params"]):
                self._init_state(layout, group, p)

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
        for name, empty in (("_bound", None), ("_inferred", None), ("_given", given)):
            self.__dict__.setdefault(name, empty)
        for group, own in zip(self.param_groups, groups):
            for name, value in self.defaults.items():
                group.setdefault(name, own.get(name, value))
        for values in self.state.values():
            if values.get("momentum_buffer") is not None:
                values.setdefault("step", torch.tensor(1.0))  # torch.optim.SGD counts no steps
            if "step" in values:  # torch's fused optimizers keep it on the device, where reading it waits
                values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device="cpu")

    def _shards(self, layout: ShardLayout, group: dict[str, Any]) -> Shards:
        """This rank's shards of the group's parameters that have a gradient; counts their step."""
        names = self.slots(group)
        for p in layouts.trained(group["params"]):
            self._init_state(layout, group, p)
        owners = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in owners):
            raise ValueError("sparse gradients have no sharded update: use nn.Embedding(sparse=False)")
        states = [self.state[p] for p in owners]
        # New tensors: DeepSpeed's stage-3 loading shares one among partitions. Views of one, which is made fast.
        counts = torch.stack([state["step"] for state in states]).add_(1.0) if states else torch.zeros(0)
        for state, count in zip(states, counts.unbind()):
            state["step"] = count
        params = layout.shards(owners, [state.get("master", p.detach()) for state, p in zip(states, owners)])
        grads = layout.grads(owners)
        grads = [g if g.dtype == p.dtype else g.to(p.dtype) for g, p in zip(grads, params)]  # a master is wider
        if group["maximize"] and grads:
            grads = list(torch._foreach_neg(grads))
        buffers = {name: layout.shards(owners, [state[name] for state in states]) for name in names}
        steps = [count for p, count in zip(owners, counts.tolist()) for _ in layout.segments[p]]
        shards = Shards(group, layout.layers(owners), params, grads, buffers, steps)
        held = [i for i, p in enumerate(params) if p.numel()]
        return shards if len(held) == len(params) else shards.part(held)

    def _publish(self, layout: ShardLayout) -> None:
        """Rounds the masters, if there are any, to the parameters, and gives other ranks their copies."""
        owners = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p in owners:
            if "master" in self.state[p]:
                torch._foreach_copy_(layout.split(p, p.detach()), layout.split(p, self.state[p]["master"]))
        layout.publish(owners)

    def _init_state(self, layout: ShardLayout, group: dict[str, Any], param: Tensor) -> None:
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
        if param.dtype.itemsize < 4 and "master" not in state and (master := layout.master(param)) is not None:
            state["master"] = master
        for name in self.slots(group):
            if state.get(name) is None:
                state[name] = self.init_slot(layout, group, name, param)

    def _refuse_unknown(self, params: list[Tensor]) -> None:
        """Plain tensors that were not given at construction come from an engine that must say what they hold."""
        given = {id(p) for ref in self._given if (p := ref()) is not None}
        unknown = [p for p in params if id(p) not in given and not hasattr(p, "placements")]
        if unknown and self._given:
            raise ValueError(
                f"{len(unknown)} parameters (the first of shape {tuple(unknown[0].shape)}) were replaced by plain "
                "tensors after the optimizer was made: which layers they hold is unknown, so a norm of them would be "
                "silently wrong; call optimizer.bind(layout) with the engine's layout, or in a Trainer mix in "
                "distopt.trainer.ShardedTrainerMixin"
            )
