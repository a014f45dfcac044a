"""The norms of each step by layer, for those who watch a run: they travel in all-reduces that a step has anyway."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from distopt.kernels.norms import squared_norms
from distopt.kernels.update import GradientRatioUpdate, Update
from distopt.layout import ShardLayout, unwrap_optimizer

if TYPE_CHECKING:
    from distopt.optim.base import ShardedOptimizer


@dataclass
class StepNorms:
    """The norms of one step, of every full layer in the order of the layout; float64 of shape [layers] on the host.

    Attributes:
        step: The number of the step, from 1.
        gradient: |g|, before any clipping; 0 for a layer without gradient.
        weight: |p| before the step; nan where the step did not update the layer, like the others below.
        direction: |direction| of the rule, without learning rate and trust ratio.
        trust: The trust ratio; 1 for a rule without.
        update: lr * ratio * |direction|: the norm of the change, before it is rounded to the dtype of the weights.
    """

    step: int
    gradient: Tensor
    weight: Tensor = field(init=False)
    direction: Tensor = field(init=False)
    trust: Tensor = field(init=False)
    update: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.weight, self.direction, self.trust, self.update = torch.full((4, len(self.gradient)), torch.nan).double()


class Watcher(Protocol):
    """Who is told the norms. The same calls with the same values on every rank."""

    def before_step(self, norms: StepNorms) -> Mapping[int, float] | None:
        """Called with the gradient's norms: returns a factor for the gradients of some layers; None: skip the step."""

    def factors(self) -> Mapping[int, float]:
        """Returns a factor for the updates of some layers in the step that begins."""

    def after_step(self, norms: StepNorms) -> None:
        """Called with all norms of a step: at its end, or one step later if they had to wait for an all-reduce."""


class Observer:
    """Collects the norms of an optimizer's steps, without a collective of its own.

    The norms of gradients are those that clipping reduces, those of weights and directions those that trust ratios
    reduce. A layer without a trust ratio has its sums of squares added to the all-reduce of the next step's clipping,
    and so is known one step late, on every layout alike.
    """

    def __init__(self, watcher: Watcher) -> None:
        self.step, self._watcher = 0, watcher
        self._open: StepNorms | None = None  # of the last step, as long as something is missing
        self._layout: ShardLayout | None = None
        self._sums: Tensor | None = None  # this rank's sums of squares that have to travel
        self._known = self._rates = torch.zeros(0)
        self._measured = self.vetoed = False

    def measure(self, layout: ShardLayout, layers: Sequence[int], grads: Sequence[Tensor]) -> Tensor:
        """Returns the norm of the gradient of each layer, as `layout.norms`; in the same all-reduce, what has to
        travel.

        Scales the gradients of layers for which the watcher has a factor. Waits for the device.
        """
        own = layout.local_sums(layers, squared_norms(grads, layout.rows(layers)))
        waiting = self._sums if layout is self._layout else None
        norms = layout.reduced(own if waiting is None else torch.cat([own, waiting])).sqrt_()
        on_host = norms.cpu()
        self._finish(None if waiting is None else on_host[1:])
        self.step += 1
        self._measured = True
        self._open = StepNorms(self.step, on_host[0].clone())
        factors = self._watcher.before_step(self._open)
        self.vetoed = factors is None
        for layer, factor in (factors or {}).items():
            norms[0, layer] *= factor
        for grad, layer in zip(grads, layers):
            if factors and layer in factors:
                grad.mul_(factors[layer])
        return norms[0]

    def vetoes(self, optimizer: ShardedOptimizer) -> bool:
        """Whether the step that begins is to be skipped.

        Raises:
            ValueError: If the gradients of this step were not measured, or cannot be.
        """
        if not self._measured:
            raise ValueError(
                "the gradients of this step were not measured: call distopt.clip_grad_norm_(optimizer, max_norm) "
                "before every step, with max_norm=math.inf to measure without clipping; the other norms travel in its "
                "all-reduce"
            )
        refuse_unobservable(optimizer)
        self._measured = False
        return self.vetoed

    def apply(
        self,
        optimizer: ShardedOptimizer,
        layout: ShardLayout,
        updates: list[Update],
        trusted: list[tuple[Update, Tensor]],
        reduced: Tensor | None,
    ) -> None:
        """Applies the updates, as `ShardedOptimizer.step` does without an observer, and measures them.

        Args:
            optimizer: Its param groups have the learning rates.
            layout: Its layout.
            updates: All updates.
            trusted: Those with a trust ratio, each with the ratios of all layers.
            reduced: The norms of these ratios, of weights and directions (or gradients); 0 for other layers.
        """
        assert self._open is not None
        wanted = self._watcher.factors()
        factor = torch.ones(layout.num_layers, dtype=torch.float64)
        for layer, value in wanted.items():
            factor[layer] = value
        on_device = factor.to(layout.device) if wanted else None
        measured = [update for update in updates if not update.group["trust_ratio"]]
        for update, ratios in trusted:
            if isinstance(update, GradientRatioUpdate):
                measured += update.scaled(ratios)
            else:
                update.apply(ratios if on_device is None else ratios * on_device)
        self._layout, self._sums = layout, None
        for update in measured:
            squares = update.squared_norms()
            update.apply(on_device)
            sums = layout.local_sums(update.layers, *squares)
            self._sums = sums if self._sums is None else self._sums.add_(sums)
        self._open.trust, rates = _trust_and_rates(optimizer, layout, trusted)
        self._rates = rates * factor
        self._known = torch.zeros(2, layout.num_layers, dtype=torch.float64)
        if trusted and reduced is not None and optimizer.ratio_of == "update":
            self._known = reduced.cpu()
        if self._sums is None:
            self._finish(None)

    def flush(self) -> None:
        """Reduces at once what would have to travel: before a save, and at the end. Every rank has to call it."""
        if self._sums is not None and self._layout is not None:
            self._finish(self._layout.reduced(self._sums).sqrt_().cpu())

    def forget(self) -> None:
        """Drops what has not been reduced, after the weights were put back."""
        self._open = self._sums = None

    def _finish(self, arrived: Tensor | None) -> None:
        norms, self._open = self._open, None
        if norms is None:
            return
        if self._rates.numel():
            known = self._known if arrived is None else self._known + arrived
            stepped = self._rates.isfinite()
            norms.weight, norms.direction = known.where(stepped, torch.nan).unbind()
            norms.update = self._rates * norms.direction
        self._sums, self._known, self._rates = None, torch.zeros(0), torch.zeros(0)
        self._watcher.after_step(norms)


def _trust_and_rates(
    optimizer: ShardedOptimizer, layout: ShardLayout, trusted: list[tuple[Update, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Returns the trust ratio of every layer, and the factor of its direction; nan for layers without gradient."""
    trust, rates = torch.full((2, layout.num_layers), torch.nan, dtype=torch.float64).unbind()
    # By group, since a rank without elements of a layer has no update for it.
    for group in optimizer.param_groups:
        layers = layout.layers(p for p in group["params"] if p.grad is not None)
        ratios = next((ratios for update, ratios in trusted if update.group["params"] is group["params"]), None)
        trust[layers] = 1.0 if ratios is None else ratios.cpu()[layers]
        in_direction = optimizer.ratio_of == "gradient"
        rates[layers] = float(group["lr"]) * (1.0 if in_direction else trust[layers])
    return trust, rates


def observer_of(optimizer: Any) -> Observer | None:
    """Returns the observer of an optimizer, which may be inside of wrappers; None if nobody watches."""
    inner = unwrap_optimizer(optimizer, lambda found: "_observer" in vars(found))
    return vars(inner).get("_observer")


def vetoed(optimizer: Any) -> bool:
    """Whether a watcher skips the step whose gradients were measured last."""
    observer = observer_of(optimizer)
    return observer is not None and observer.vetoed


def observe(optimizer: Any, watcher: Watcher) -> Observer:
    """Has a watcher told the norms of every step of an optimizer, in the place of an earlier one.

    Raises:
        ValueError: For an optimizer, an option or a layout whose norms cannot be had in this way.
    """
    from distopt.optim.base import ShardedOptimizer

    inner = unwrap_optimizer(optimizer)
    if not isinstance(inner, ShardedOptimizer):
        raise ValueError(
            f"the norms of updates are those of distopt's optimizers, got {type(inner).__name__}: use the one of this "
            "name in distopt, or distopt.grad_norms(optimizer) for the gradients alone"
        )
    refuse_unobservable(inner)
    vars(inner)["_observer"] = Observer(watcher)  # as the proof's watch: in no state dict, and in no copy
    return vars(inner)["_observer"]


def stop_observing(optimizer: Any) -> None:
    """Undoes `observe`."""
    vars(unwrap_optimizer(optimizer)).pop("_observer", None)


def refuse_unobservable(optimizer: ShardedOptimizer) -> None:
    """Raises ValueError for an optimizer whose steps have no all-reduce in which norms can travel."""
    layout = optimizer.layout
    if layout.gradients_hidden:
        raise ValueError(
            "the health of layers is unknown under DeepSpeed, which hides gradients and reduces their norm on its own: "
            "use ZeRO-1 (engine=zero1) or FSDP2 (engine=fsdp2), or watch no health"
        )
    if layout.gradients is not None and layout.gradients.groups != layout.groups:
        raise ValueError(
            "ZeRO-1 with gradients='all_reduce' has full gradients and so reduces no norms, in whose all-reduce those "
            "of updates could travel: bind distopt.layout.zero1_layout(model, gradients='reduce_scatter')"
        )
    if optimizer.unobservable:
        raise ValueError(f"{type(optimizer).__name__}: {optimizer.unobservable}: watch no health (health=off)")
    if any(group["cautious"] for group in optimizer.param_groups):
        raise ValueError(
            "cautious=True: a masked direction is scaled by a mean over its layer that is known after its norm was "
            "measured: give cautious=False, or watch no health"
        )
    if any(group["capturable"] for group in optimizer.param_groups):
        raise ValueError("capturable=True: a CUDA graph cannot report norms to the host: give capturable=False")
