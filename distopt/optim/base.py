"""The driver that all optimizers share: param groups, state, and one `step` in three phases."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from distopt import layout as layouts
from distopt.bounds import Bound
from distopt.bounds.optimizer import BOUNDS
from distopt.kernels import dispatch
from distopt.kernels.rules import Rule
from distopt.kernels.shards import Shards
from distopt.kernels.update import Update
from distopt.layout import ShardLayout
from distopt.layout.tensors import Trained
from distopt.optim.binding import LayoutOptimizer
from distopt.optim.clip import Clip, refuse_closure
from distopt.optim.eager import eager_island
from distopt.optim.group_checks import check_before_step, check_new
from distopt.optim.observer import observer_of
from distopt.optim.options import COMMON, OWN, TORCH_OPTIONS, Accepted, check_torch_options
from distopt.optim.ratios import Ratios
from distopt.optim.state import LocalState
from distopt.optim.state_dict import load_state_dict
from distopt.proof import before_step

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT


class ShardedOptimizer(LayoutOptimizer):
    """A `torch.optim.Optimizer` whose update is exactly the unsharded one, however its parameters are sharded.

        directions = rule(params, grads, state)
        p <- p - lr * ratio * direction            ratio = |p| / |direction| of the full layer, or 1

    A step has three phases:

        collect   this rank's shards of weights, gradients and state, from the layout
        norms     one exchange of the norms of all layers with a trust ratio
        apply     the updates, by kernels where there are some, and the exchange of updated shards under ZeRO-1

    A subclass defines its inputs (`rule`) and its math (`directions`), which know neither ranks nor `lr`. State is made
    at the first step, for every trainable parameter of a group, because engines replace parameters after construction
    and all ranks must have the same keys; it is sharded as the layout says, also if it was loaded or made before the
    layout was known. Parameters of 16 bits are updated through float32 masters, which are part of their state
    (`master`) on every layout, unless `master_weights` says otherwise. Options of torch without a meaning here
    (`fused`, `foreach`) are accepted and dropped, those that would change an update are refused.

    Every param group may set the following options, also where a subclass does not name them: `maximize`, ascend
    instead of descend; `trust_ratio`, multiply each layer's direction by |p| / |direction|; `trust_clip`, bounds (low,
    high) of that ratio, or None; `cautious` and `cautious_decay`, as `distopt.kernels.cautious`; `master_weights`, as
    `distopt.optim.masters`; `state_bits`, as `distopt.optim.narrow_state`; `capturable`, count the steps on the GPU, so
    that a CUDA graph may capture `step` (lr may be a tensor there then).

    Args:
        params: Parameters, or param groups as dicts.
        defaults: The options of the rule and their defaults.
        torch_options: Options of torch's that change nothing here.

    Attributes:
        torch_options: By name of an option of torch's that the rule has not: its accepted values, and the remedy.
        bounds: The bound of every option of a param group that is checked.
        group_state: The entries of a param group that are state and no options.
        needs_float32: Why its weights have to be in float32, if only in masters; "" if they need not.
        unobservable: Why the norms of its steps are not those of its directions; "" if they are.
        average: What averages its weights (`distopt.EMA`, `distopt.LAWA`); None for nothing.
        ratio_of: Whose norm the trust ratio compares with the weights': that of the "update", which the ratio then
            multiplies, or that of the "gradient", which it multiplies before the state changes (LARS).
    """

    torch_options: Mapping[str, Accepted] = TORCH_OPTIONS
    bounds: Mapping[str, Bound] = BOUNDS
    group_state: tuple[str, ...] = ()
    needs_float32: str = ""
    unobservable: str = ""
    average: Any = None
    ratio_of: Literal["update", "gradient"] = "update"
    takes_clip = True  # `step` has the arguments `clip` and `consumes_grads`
    _checked: ShardLayout | None = None  # the layout of the last step
    _local: LocalState
    _ratios: Ratios

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **torch_options: Any) -> None:
        own = {name: torch_options.pop(name) for name in OWN if name in torch_options}
        if unknown := torch_options.keys() - self.torch_options.keys():
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}")
        check_torch_options(torch_options, self.torch_options)
        self._init_layout([])
        super().__init__(params, COMMON | defaults | own)

    def rule(self, group: dict[str, Any]) -> Rule:
        """Returns the specification of the rule for the options of a param group: its state, scalars and scales."""
        raise NotImplementedError

    def directions(self, shards: Shards) -> list[Tensor]:
        """Computes the rule: updates the state in place, and returns new tensors, one direction for each parameter.

        Args:
            shards: Plain local tensors; `shards.inputs` has the values of `rule` by name.
        """
        raise NotImplementedError

    def trust_ratio(self, group: dict[str, Any], weight_norm: Tensor, other_norm: Tensor) -> Tensor:
        """Computes the trust ratio of every layer, of norms over all ranks.

        The ratio of a layer with a norm of 0 is 1, whatever this returns, and `trust_clip` comes afterwards.

        Args:
            group: The param group.
            weight_norm: The 2-norms of the weights, float64 of shape [layers].
            other_norm: Those of the directions or of the gradients, as `ratio_of` says.
        """
        return weight_norm / other_norm

    def required(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Returns the names that a loaded state must have, for parameters of the group that have state."""
        return (*(rule := self.rule(group)).buffers, *rule.sums, "step")

    def init_slot(self, layout: ShardLayout, group: dict[str, Any], name: str, param: Tensor) -> Tensor:
        """Returns the initial value of a state buffer of a parameter, laid out as its slot says."""
        slot = self.rule(group).slot(name, param.shape)
        if slot is not None and slot.replicated:
            return torch.zeros(slot.shape, dtype=layouts.wide(param.dtype), device=layout.state_device(param))
        return layout.zeros(param)

    def check(self, group: dict[str, Any]) -> None:
        """Raises ValueError for a combination of options that the rule does not have."""

    @overload
    def step(self, closure: None = None, *, clip: Clip | None = None, consumes_grads: bool = False) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @eager_island
    @torch.no_grad()
    def step(
        self, closure: Callable[[], float] | None = None, *, clip: Clip | None = None, consumes_grads: bool = False
    ) -> float | None:
        """Performs one update.

        Args:
            closure: Clears the gradients, computes the loss, backpropagates and returns the loss.
            clip: The measured gradients, which the update multiplies by `clip.factor`; `.grad` stays as it is.
            consumes_grads: The update may use the memory of the gradients: read none of them afterwards. LAMB is faster
                so on the CPU; weights and state have the same bits.

        Returns:
            The closure's result, or None.

        Raises:
            ValueError: For a closure, which computes new gradients, with a clip of those before; for a clip of another
                optimizer or layout; and for all that a step refuses.
        """
        if closure is not None:
            refuse_closure(clip)
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        if (observer := observer_of(self)) is not None and observer.vetoes(self):
            return loss
        layout, groups = self._begin()
        if clip is not None:
            clip.check(layout)

        shards = self._local.collect(self, layout, groups, clip, consumes_grads)
        stepped = [p for group in groups for p in group.stepped]
        self._ratios.forget(layout, stepped)
        adapt = self._measure(layout, shards)
        updates = self._updates(layout, shards)

        measured = [update for update in updates if dispatch.is_measured(update)]
        ratios = self._ratios.measure(self, layout, measured, clip)

        if observer is not None:
            observer.apply(self, layout, updates, [*zip(measured, ratios)], self._ratios.norms)
        else:
            dispatch.apply(updates, measured, ratios)
        self._local.round_masters(self, layout, stepped)
        layout.sync.publish(stepped)
        adapt()
        return loss

    def _measure(self, layout: ShardLayout, shards: list[Shards]) -> Callable[[], None]:
        """Exchanges what a rule needs of all layers together; returns what is to be done after the update."""
        return lambda: None

    def _updates(self, layout: ShardLayout, shards: list[Shards]) -> list[Update]:
        """Returns the updates of the shards, in the order in which they are applied on every rank."""
        return [update for each in shards for update in dispatch.updates(self.directions, each, self.ratio_of)]

    def trust_ratios(self) -> dict[Tensor, Tensor]:
        """Returns the trust ratio of each layer that this rank has a part of, in the last step, by parameter.

        Float64 0-D tensors on the device of the layout. Where an engine calls `step` several times per training step,
        once for each partition, those of all calls.
        """
        return self._ratios.by_param(self.layout)

    def init_state(self) -> None:
        """Makes the state of every trainable parameter that has none: zeros, as before the first step.

        Lays out existing state as the layout says. Collective: every rank has to call it.
        """
        layout = self.layout
        for i, group in enumerate(self.param_groups):
            self._local.settle(self, layout, i, layout.local_params(i, group["params"]))
        getattr(self.average, "init_buffers", lambda: None)()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError for a hyper-parameter that is out of bounds, mistyped or misspelt."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_new(self, group)
        except ValueError:
            self.param_groups.pop()
            raise
        self._given += [weakref.ref(p) for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, and checked before anything changes; float32 state of 16-bit parameters stays float32.

        Parameters are matched by name where the groups here and there have `param_names`, else by position. Shapes are
        those of full parameters; state that is sharded differently from this optimizer's parameters is laid out again
        at the next step.

        Raises:
            ValueError: For a state of other shapes, with a buffer missing, or of other options, groups or names.
        """
        load_state_dict(self, state_dict)

    def _begin(self) -> tuple[ShardLayout, list[Trained]]:
        """Returns the layout and the trained parameters of each param group, after all checks that need no gradient."""
        check_before_step(self)
        before_step(self)
        groups = [Trained.of(group["params"]) for group in self.param_groups]
        layout = self._layout_for([p for group in groups for p in group.params])
        if layout is not self._checked:  # FSDP2 frees after a backward pass what clipping still sees
            layouts.refuse_foreign(layout.segments)
            self._checked = layout
        return layout, groups

    def _forget_layout(self) -> None:
        self._local = LocalState()
        self.__dict__.setdefault("_ratios", Ratios())
