"""The layout of an optimizer's parameters: bound by an engine, or inferred from the parameters."""

from __future__ import annotations

import copy
import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from distopt import layout as layouts
from distopt.layout import ShardLayout
from distopt.layout.tensors import same

if TYPE_CHECKING:
    from typing_extensions import Self


class LayoutOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that knows the layout of its parameters."""

    _bound: ShardLayout | None
    _inferred: ShardLayout | None
    _known: tuple[ShardLayout | None, list[Tensor]] = (
        None,
        [],
    )  # what `layout` answered last, for these
    _given: list[weakref.ref[Tensor]]  # the parameters with which it was made

    def bind(self, layout: ShardLayout) -> None:
        """Sets the layout, for an engine whose parameters do not say it themselves (ZeRO-1, DeepSpeed).

        Existing state is laid out again at the next step.

        Raises:
            ValueError: For a param group with an option that the layout does not support, and if the layout has none of
                the parameters that have state, which would be lost.
        """
        for group in self.param_groups:
            layout.check_group(group)
            layouts.check_blocks(layout, group)
        self._refuse_lost_state(layout)
        if self._bound is not None:
            self._bound.sync.wait()
        self._bound = layout
        self._forget_layout()

    @property
    def layout(self) -> ShardLayout:
        """The layout that was bound, or else the one inferred from the parameters.

        Raises:
            ValueError: If the parameters were replaced by plain tensors without a layout: their norms would be
                silently wrong.
        """
        return self._layout_for(layouts.trained([p for group in self.param_groups for p in group["params"]]))

    def _layout_for(self, params: list[Tensor]) -> ShardLayout:
        """As `layout`, given the trained parameters of all param groups."""
        known, before = self._known
        if known is None or known is not (self._bound or self._inferred) or not same(params, before):
            known = self._layout_of(params)
            self._known = known, params
        known.sync.wait()
        return known

    def _layout_of(self, params: list[Tensor]) -> ShardLayout:
        if self._bound is not None:
            if foreign := [p for p in params if p not in self._bound]:
                raise ValueError(
                    f"{len(foreign)} parameters, the first of shape {tuple(foreign[0].shape)}, are not in the layout "
                    "that was bound: make the optimizer from the same model as the layout, and bind again if it changed"
                )
            return self._bound
        if self._inferred is None or not all(p in self._inferred for p in params):
            if self._given:
                layouts.refuse_replaced(params, {id(p) for ref in self._given if (p := ref()) is not None})
            inferred = layouts.infer_layout(params)
            self._refuse_lost_state(inferred)
            for group in self.param_groups:
                layouts.check_blocks(inferred, group)
            self._inferred = inferred
        return self._inferred

    def __getstate__(self) -> dict[str, Any]:
        """As in torch: a pickled optimizer has no layout, and its state is laid out by the next one that it gets."""
        if self._bound is not None:
            self._bound.check_copyable()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        state = {**state, "defaults": dict(defaults)}
        super().__setstate__(state)
        self.defaults = defaults  # without what torch 2.13 adds to them, which groups added later would have
        self.state = defaultdict(dict, self.state)
        self._init_layout([p for group in self.param_groups for p in group["params"]])

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Returns an optimizer of copied parameters, those of `copy.deepcopy((model, optimizer))`, with its layout.

        As in torch, hooks are not copied, nor a schedule's wrapper of `step`.

        Raises:
            ValueError: If it is bound to partitions that an engine owns.
        """
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        if self._bound is not None:
            self._bound.sync.wait()
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
            new._bound = self._bound.copied(lambda param: copy.deepcopy(param, memo))
        return new

    def _forget_layout(self) -> None:
        """Has the next step look at all of the state, which was replaced or has another layout."""

    def _init_layout(self, params: list[Tensor]) -> None:
        """Starts without a layout, where there is none yet (a copy, or an optimizer that was pickled)."""
        initial: dict[str, Any] = {"_bound": None, "_inferred": None, "_given": [weakref.ref(p) for p in params]}
        self.__dict__.update(initial | self.__dict__)
        self._forget_layout()

    def _refuse_lost_state(self, layout: ShardLayout) -> None:
        """Refuses a layout without any of the parameters that have state: it would start again from zeros, silently."""
        with_state = layouts.trained(p for p, state in self.state.items() if state)  # a frozen one keeps its state
        if with_state and not any(p in layout for p in with_state):
            raise ValueError(
                f"the optimizer has state of {len(with_state)} parameters, none of which is in the layout: the engine "
                "has replaced them; load the state afterwards, or clear optimizer.state to begin with zeros"
            )
