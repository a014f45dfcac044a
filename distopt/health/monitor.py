"""The monitor of a run's health: norms of every layer in every step, alarms, and what is done about them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from distopt.bounds.health import BOUNDS
from distopt.health.alarms import Alarm
from distopt.health.backup import Rollback, Stateful
from distopt.health.depth import Trend
from distopt.health.diagnosis import Diagnosis, Limits
from distopt.layout import ShardLayout, full_shape, unwrap_optimizer
from distopt.layout.names import bare_parameters
from distopt.optim.observer import StepNorms, observe, stop_observing

_log = logging.getLogger("distopt.health")


class Monitor:
    r"""Watches the steps of an optimizer, on every rank alike and without a collective of its own.

        monitor = distopt.health.Monitor(optimizer, model, action="clip")
        loss.backward()
        distopt.clip_grad_norm_(optimizer, max_norm=1.0)   # the norms are measured here
        optimizer.step()

    For every layer and step it has |g| before clipping, |p|, the trust ratio and |update| = lr * ratio * |direction|
    (`last`). Where trust ratios do not reduce |p| and |direction|, they travel in the all-reduce of the next step's
    clipping: `after_step` is then called one step late, with the number of its own step. Alarms:

        spike of the gradient, of the update   log x > mean + threshold * deviation, by the layer's running statistics
        vanishing, exploding                   exp(-b)^(depth - 1) beyond 1 / depth_factor or depth_factor, in the fit
                                               log |g| = a + b * depth over the equal layers of a model
        dead                                   |g| = 0 in `dead_steps` steps in a row
        non-finite                             inf or nan

    The update is watched without its learning rate, so that a schedule causes no alarm. Only spikes and non-finite
    gradients have an action:

        warn       the alarm alone
        clip       scale the layer's gradient to its bound; for an update, which is known one step late, the layer's
                   next update by bound / value; skip the step if the gradient is not finite
        skip       leave weights and state as they are in this step (for an update, the next one)
        rollback   skip the step, and restore the last copy in host memory, made every `copy_every` healthy steps
        reload     skip the step, and have `reload` restore the last checkpoint

    Statistics continue after a rollback: what came before it does not repeat, if the loop goes on with other batches
    (`rolled_back`). Reads norms back to the host in every step, for which it waits.

    Args:
        optimizer: An optimizer of distopt, also inside of SAM or Accelerate's wrapper; bound to its layout before its
            first step.
        model: Its model, for the names of layers and for copies.
        action: What to do about a spike or a gradient that is not finite: one of those above.
        threshold: Deviations above the mean that are a spike, > 0. A deviation is at least 0.1, a change of 10 %.
        decay: Decay of the running statistics, in [0, 1).
        warmup: Observations of a layer before it can have a spike, >= 1.
        depth_factor: The factor over the whole depth that is vanishing or exploding, > 1.
        dead_steps: Steps without gradient after which a layer is dead, >= 1.
        copy_every: Steps between copies in host memory for `rollback`, >= 1.
        max_rollbacks: Rollbacks or reloads after which the run ends, >= 1.
        others: What else a rollback restores, by `state_dict`: the schedule, a loss scaler.
        reload: For `action="reload"`: restores a checkpoint, and returns the number of its steps; None if there is
            none yet, whereupon the step is skipped. Called on every rank.
        on_alarm: Called with each alarm; by default the logger `distopt.health` warns.
        on_step: Called with the norms of each step, once they are complete.

    Attributes:
        last: The norms of the last complete step; None before.
        alarms: The last 1000 alarms.
        rolled_back: After a rollback the number of steps to which it went; None otherwise. The loop goes on from there
            with other batches, without a step of the schedule, and sets it to None.

    Raises:
        ValueError: For an argument out of its bound, and an optimizer or a layout without norms to watch: DeepSpeed's,
            which hides gradients; ZeRO-1 with all-reduced gradients; `capturable`; optimizers that are not distopt's.
            In a step: if `clip_grad_norm_` was not called before it, and after `max_rollbacks`.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        model: nn.Module,
        *,
        action: str = "warn",
        threshold: float = 6.0,
        decay: float = 0.98,
        warmup: int = 20,
        depth_factor: float = 1000.0,
        dead_steps: int = 10,
        copy_every: int = 50,
        max_rollbacks: int = 10,
        others: Sequence[Stateful] = (),
        reload: Callable[[], int | None] | None = None,
        on_alarm: Callable[[Alarm], None] | None = None,
        on_step: Callable[[StepNorms], None] | None = None,
    ) -> None:
        limits = Limits(threshold, decay, warmup, depth_factor, dead_steps)
        given = {**limits._asdict(), "action": action, "copy_every": copy_every, "max_rollbacks": max_rollbacks}
        for name, value in given.items():
            BOUNDS[name].check(name, value)
        if action == "reload" and reload is None:
            raise ValueError("action='reload' needs reload=, which restores a checkpoint: give it, or 'rollback'")
        self._optimizer, self._model, self._limits, self.action = optimizer, model, limits, action
        self._on_alarm, self._on_step = on_alarm or (lambda alarm: _log.warning("%s", alarm)), on_step
        back = reload if action == "reload" else None
        stateful = unwrap_optimizer(optimizer, lambda inner: hasattr(inner, "init_state"))
        self._rollback = Rollback(model, stateful, others, copy_every, max_rollbacks, back)
        self._diagnosis: Diagnosis | None = None
        self._layout: ShardLayout | None = None  # that of the diagnosis
        self.last: StepNorms | None = None
        self.alarms: deque[Alarm] = deque(maxlen=1000)
        self.rolled_back: int | None = None
        self._next_factors: dict[int, float] = {}
        self._late = False  # the update of the last step had a spike
        self._observer = observe(optimizer, self)

    @property
    def names(self) -> list[str]:
        """The name of each layer, in the order of the norms."""
        return list(self._known().names)

    @property
    def step(self) -> int:
        """The number of steps measured; set it where a run resumes."""
        return self._observer.step

    @step.setter
    def step(self, step: int) -> None:
        self._observer.step = step

    def trends(self) -> list[Trend]:
        """Returns how the gradient changes over depth, of every series of at least six equal layers."""
        found = self._known()
        return found.depth.trends(found.gradient.statistics)

    def flush(self) -> None:
        """Completes the norms of the last step by an all-reduce of their own: at the end, or before a save."""
        self._observer.flush()

    def close(self) -> None:
        """Stops watching."""
        stop_observing(self._optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the running statistics, for JSON. Collective: norms that have not been reduced yet are."""
        self.flush()
        factors = {str(layer): factor for layer, factor in self._next_factors.items()}
        return {"step": self.step, "late": self._late, "factors": factors, **self._known().state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what `state_dict` returned. Statistics of other layers are left out, and start anew."""
        self.step, self._late = state["step"], state["late"]
        self._next_factors = {int(layer): factor for layer, factor in state["factors"].items()}
        self._known().load_state_dict(state)

    def before_step(self, norms: StepNorms) -> Mapping[int, float] | None:
        """Implements `distopt.optim.observer.Watcher`."""
        acute, factors, slow = self._known().of_gradient(norms.step, norms.gradient)
        self._raise(acute + slow)
        late, self._late = self._late, False
        if not (acute or late):
            if self.action == "rollback":
                self._rollback.keep(norms.step - 1)
            return {}
        if self.action == "warn":
            return {}
        if self.action == "clip":
            return None if any(alarm.kind == "non-finite" for alarm in acute) else factors
        if self.action != "skip" and (to := self._rollback.go_back(norms.step)) is not None:
            self._observer.forget()
            self.rolled_back = self.step = to
        return None

    def factors(self) -> Mapping[int, float]:
        """Implements `distopt.optim.observer.Watcher`."""
        factors, self._next_factors = self._next_factors, {}
        return factors

    def after_step(self, norms: StepNorms) -> None:
        """Implements `distopt.optim.observer.Watcher`."""
        self.last = norms
        stepped = norms.trust.isfinite()
        if bool(stepped.any()):  # or the step was skipped
            in_direction = unwrap_optimizer(self._optimizer).ratio_of == "gradient"
            change = norms.direction * (1.0 if in_direction else norms.trust)
            alarms, factors = self._known().of_update(norms.step, change.where(stepped, 0.0))
            self._raise(alarms)
            self._next_factors = factors if self.action == "clip" else {}
            self._late = bool(alarms) and self.action != "clip"
        if self._on_step is not None:
            self._on_step(norms)

    def _raise(self, alarms: Sequence[Alarm]) -> None:
        for alarm in alarms:
            self.alarms.append(alarm)
            self._on_alarm(alarm)

    def _known(self) -> Diagnosis:
        """Returns the diagnosis of the present layers: a new one if there are others than before."""
        layout = unwrap_optimizer(self._optimizer).layout
        if self._diagnosis is None or layout is not self._layout:
            known = {p: name for name, p in bare_parameters(self._model).items()}
            names = [known.get(p, f"parameter {i}") for i, p in enumerate(layout.params)]
            if self._diagnosis is None or names != self._diagnosis.names:
                self._diagnosis = Diagnosis(names, [tuple(full_shape(p)) for p in layout.params], self._limits)
            self._layout = layout
        return self._diagnosis
