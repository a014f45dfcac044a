"""The perturbation of weights around an optimizer: what the members of the SAM family share before the step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from distopt.bounds import SCOPE
from distopt.kernels import exact
from distopt.layout import ShardLayout, layout_of, local_parts, with_gradient
from distopt.optim.eager import eager_island
from distopt.sam.perturbation import Perturbation
from distopt.sam.radius import RadiusOptimizer
from distopt.sam.rho_schedule import RhoSchedule
from distopt.sam.rounding import perturb_, warn_of_rounding
from distopt.sam.state_buffers import StateBuffers

Scope = Literal["global", "local"]


class PerturbingOptimizer(RadiusOptimizer):
    """An optimizer whose weights `perturb` moves and `restore` brings back. The arguments are those of `SAM`.

    A member of the family overrides `ascent`, `descent`, `perturbed_params` or `loss`, and says by class attributes
    what these need.
    """

    needs_ascent_gradient = True  # whether `perturb` needs the gradient at the weights
    needs_unperturbed_gradient = False  # whether `descent` needs it too
    mixes_gradients_of_steps = False  # whether the direction mixes gradients of several steps, and so loss scales
    reads_optimizer_state = False  # whether the direction depends on state, which has the optimizer's layout
    always_descends = False  # whether `descent` also changes the gradients of steps that do not ascend
    buffers: tuple[str, ...] = ()  # the names of the state buffers that this member adds
    compute_dtype: torch.dtype | None = None
    _step_supports_amp_scaling = False  # a fused optimizer has True, and GradScaler would leave overflows to it

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float,
        *,
        interval: int = 1,
        scope: Scope = "global",
        model: nn.Module | None = None,
        start: int = 0,
        stop: int | None = None,
        rho_schedule: Mapping[int, float] | None = None,
    ) -> None:
        super().__init__(optimizer, rho, interval, RhoSchedule(start, stop, rho_schedule))
        SCOPE.check("scope", scope)
        self.scope = scope
        self.model = model
        self.measured = False  # whether `perturb` has measured what rounding leaves
        self._state_buffers = StateBuffers(optimizer)
        self._perturbation: Perturbation | None = None
        self._norms: tuple[tuple[Tensor, ...], Tensor] | None = None
        self._perturb_called = False  # for the current step

    def ascent(self, layout: ShardLayout, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the direction d and the measure m of the perturbation rho * d / |m|, as lists of shards."""
        grads = layout.grads(params)
        return grads, grads

    def descent(
        self, layout: ShardLayout, params: list[Tensor], unperturbed: dict[Tensor, list[Tensor]] | None
    ) -> None:
        """Changes the gradients in place to those that the optimizer steps with.

        Args:
            layout: How the parameters are sharded.
            params: The parameters with a gradient.
            unperturbed: Shards of the gradients at the weights, by parameter, if the class
                `needs_unperturbed_gradient`; its parameters may differ from `params`. None if the step did not ascend.
        """

    def perturbed_params(self) -> list[Tensor]:
        """Returns the parameters to perturb."""
        groups = [group for group in self.param_groups if self.radius(group) > 0.0]
        return with_gradient(p for group in groups for p in group["params"])

    def rounding(self, params: list[Tensor]) -> float:
        """Returns the share of |g| up to which |m| is nothing but rounding; 0 where m is no difference of gradients."""
        return 0.0

    def loss(self, outputs: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the loss of a model's outputs in the current pass."""
        return criterion(outputs)

    @eager_island
    @torch.no_grad()
    def perturb(self) -> Tensor:
        """Moves the weights to the worst point nearby.

        Takes one all-reduce per mesh axis that shards. Does nothing if the step does not ascend.

        Returns:
            The norm |m|, the same on every rank; 0 if the step does not ascend. If it is not finite, neither are the
            perturbed weights: call `restore` and skip the step.

        Raises:
            RuntimeError: If the weights are perturbed already.
        """
        if self._perturbation is not None:
            raise RuntimeError("perturb() was called twice without restore() between")
        layout, params = self._layout(), self.perturbed_params()
        self._state_buffers.discard()
        self._perturbation, self._norms, self._perturb_called = Perturbation(layout, params), None, True
        if not self.ascends:
            return torch.zeros((), dtype=torch.float64, device=layout.device)
        try:
            return self._ascend(self._perturbation)
        except BaseException:  # a warning that is an error, for one
            self.abort_pass()
            raise

    def _ascend(self, perturbation: Perturbation) -> Tensor:
        layout, params, backup = perturbation.layout, perturbation.params, perturbation.backup
        if self.needs_unperturbed_gradient:
            perturbation.unperturbed = {p: [g.clone() for g in layout.grads([p])] for p in self._with_gradients()}
        directions, measured = self.ascent(layout, params)
        weights, layers = layout.shards(params, params), layout.layers(params)
        least = self.rounding(params)
        norms, *of_gradients = layout.norms(layers, measured, *([layout.grads(params)] if least else []))
        self._norms, total = (layout.params, norms), exact.norm(norms)
        if of_gradients:
            total = torch.where(total <= least * exact.norm(of_gradients[0]), 0.0, total)
        backup.add(local_parts(params))
        backup.add(local_parts(self.buffers_of_model()))
        factors = self._factors(layout, params, total)
        perturb_(weights, directions, factors)
        layout.sync.publish(params)
        if not self.measured:
            before = [shard for p, copy in zip(params, backup.copies) for shard in layout.split_local(p, copy)]
            moves = (d.float() * factor.float() for d, factor in zip(directions, factors))
            self.measure(layout, layers, before, weights, moves)
        return total

    def measure(
        self,
        layout: ShardLayout,
        layers: list[int],
        before: list[Tensor],
        after: list[Tensor],
        moves: Iterable[Tensor],
    ) -> None:
        """Warns, once, if too little is left of a perturbation in the compute dtype. Collective.

        Args:
            layout: How the parameters are sharded.
            layers: The indices of the layers of the shards.
            before: Shards of the weights.
            after: Shards of the perturbed weights.
            moves: The perturbation before rounding, as shards.
        """
        self.measured = True  # also where the warning is an error
        self.measured = warn_of_rounding(layout, layers, before, after, moves, self.compute_dtype)

    @eager_island
    @torch.no_grad()
    def restore(self) -> None:
        """Restores the weights, bit for bit, and changes the gradients to those that the optimizer steps with."""
        done = self._put_back()
        descends = type(self).descent is not PerturbingOptimizer.descent  # else no gradient has to be looked for
        if done is not None and descends and self._factor() > 0.0:
            self.descent(done.layout, self._with_gradients(), done.unperturbed)

    def ascent_norms(self) -> dict[Tensor, Tensor]:
        """Returns the global norm of the measure of each parameter; empty if the step did not perturb.

        A norm that is not finite names the parameter where the step broke: by the second pass all gradients are broken.
        """
        return {} if self._norms is None else dict(zip(*self._norms))

    @eager_island
    def abort_pass(self) -> None:
        """Restores the weights, bit for bit, after a pass that failed. Leaves the gradients as they are."""
        self._put_back()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """Perturbs on entry and restores on exit. If the block raises, the weights are restored."""
        self.perturb()
        try:
            yield
        except BaseException:
            self.abort_pass()
            raise
        self.restore()

    def buffers_of_model(self) -> list[Tensor]:
        """Returns the buffers that a second pass would change as the first has."""
        return list(self.model.buffers()) if self.model is not None and self.needs_ascent_gradient else []

    def _layout(self) -> ShardLayout:
        layout = getattr(self.optimizer, "layout", None)
        if layout is not None and layout.flat:
            raise ValueError("the engine owns weights and gradients: distopt.engine.DeepSpeed runs SAM there")
        if layout is None or not self.reads_optimizer_state:
            layout = layout_of(self.optimizer)
        if self.scope == "local":  # no rank has exchanged its gradient
            layout = layout.model or layout
            if layout.groups:
                raise ValueError("scope=local needs full weights on every rank, as under DDP: here they are sharded")
        return layout

    def _factors(self, layout: ShardLayout, params: list[Tensor], total: Tensor) -> list[Tensor]:
        """Returns rho / |m| for each shard, on the device; 0 where the norm is 0."""
        of_group = [self.radius_now(group) for group in self.param_groups]
        factors = {radius: torch.where(total > 0, radius / total, 0.0) for radius in of_group}
        if len(factors) == 1:
            return [*factors.values()] * len(layout.layers(params))
        rho = {p: radius for group, radius in zip(self.param_groups, of_group) for p in group["params"]}
        return [factors[rho[p]] for p in params for _ in layout.segments[p]]

    def _put_back(self) -> Perturbation | None:
        """Ends the perturbation, if there is one, and returns it."""
        done, self._perturbation = self._perturbation, None
        if done is not None and done.backup.copies:
            with torch.no_grad():
                done.layout.sync.wait()
                done.backup.restore()
        return done

    def _with_gradients(self) -> list[Tensor]:
        return with_gradient(p for group in self.param_groups for p in group["params"])
