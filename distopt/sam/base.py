"""Sharpness-aware minimization: take the gradient at the worst point near the weights."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distopt.kernels import exact
from distopt.layout import ShardLayout, fit, layout_of, local, with_gradient
from distopt.optim.eager import eager_island
from distopt.optim.validate import bounded, check_integer, positive
from distopt.rng import random_state, same_random_numbers
from distopt.sam.checks import check_inner
from distopt.sam.closure import GradientWatch
from distopt.sam.rounding import perturb_, warn_of_rounding
from distopt.sam.wrapper import OptimizerWrapper


class SAM(OptimizerWrapper):
    r"""Sharpness-aware minimization (SAM) around any torch optimizer.

        perturb:  p <- p + rho * g / |g|     the norm over all parameters and ranks; g is the gradient at p
        restore:  p <- p, as it was          g is now the gradient at the perturbed point
        step:     one step of the optimizer with that gradient

    The weights are put back from a copy, bit for bit; the copy is sharded as they are, so that under DDP and
    ZeRO-1 every rank has a whole one. Where a rank's gradients are right in its rows only (ZeRO-1's reduce-scatter) it
    perturbs these and sends them: each pass then costs on the wire what the exchange of whole gradients would. Two ways
    to use it:

        loss.backward(); sam.perturb(); sam.zero_grad(); second_loss.backward(); sam.restore(); sam.step()
        loss = sam.step(closure)     # the closure clears the gradients, runs forward and backward, returns the loss

    With gradient accumulation both passes go over the same micro-batches, so a closure has to run all of them;
    `step(closure)` gives both passes the same random numbers (dropout), of torch, NumPy and Python. Clip after
    `restore`, so that it is the second gradient. Everything else is the optimizer's: `param_groups`, `state`,
    `state_dict`, hooks, so that schedules, clipping and checkpoints see one optimizer.

    A parameter without a gradient in the first pass (an expert that gets no token, a dropped layer) is not perturbed;
    one without a gradient in the second is not stepped, and no state of it changes. In norms and products a gradient
    that is missing counts as 0.

    Weights in bfloat16 are rounded so that the perturbation is right in the mean over elements; computed with in
    bfloat16, float32 weights see it with noise. The first `perturb` measures what is left, and warns where that is not
    enough (docs/sam.md).

    Args:
        optimizer: any torch optimizer, made before. A param group may have a radius of its own, `sam_rho`, >= 0. With 0
            the group is neither perturbed nor part of the norm: `sam_rho=0.0` for all but the norm layers is SAM-ON
            (Mueller et al., Normalization Layers Are All That Sharpness-Aware Minimization Needs, NeurIPS 2023, arXiv
            2306.04226).
        rho: radius of the neighbourhood, > 0, in units of the 2-norm of all weights.
        interval: only every so many steps perturbs, >= 1; the others are the optimizer's. Ask `ascends` before a second
            pass.
        scope: `global`: every rank perturbs by the same averaged gradient. `local`: each by its own (the m-sharpness of
            the paper), with no communication in the first pass: run that under `model.no_sync()`, if it `ascends`. Only
            where every rank holds whole weights.
        model: whose buffers (the statistics of batch norm) the second pass must not move. They cannot be found from
            parameters: without it both passes of `step(closure)` move them, and count two batches a step, without a
            word. None if there are none, and where `distopt.attach`, `SAMTrainerMixin` or `distopt.train` run it,
            which give it their model.

    `compute_dtype` may be set to the dtype that weights are computed with where it is not theirs (mixed precision);
    `distopt.attach`, `SAMTrainerMixin` and `distopt.train` set it.
    Warns once if a step that ascends is taken without `perturb`.
    Raises ValueError for an argument out of bounds; for another SAM as the optimizer; for a param group's `rho`, unless
    it is the optimizer's own (Adadelta); for a closure which adds to gradients of before; where `scope=local` meets
    sharded weights; under DeepSpeed, whose partitions `distopt.engine.DeepSpeed` perturbs.

    Reference: Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
    Generalization, ICLR 2021, arXiv 2010.01412.
    """

    needs_ascent_gradient = True  # whether `perturb` needs the gradient at the weights
    needs_unperturbed_gradient = False  # whether `descent` needs it too
    mixes_gradients_of_steps = (
        False  # whether the direction is made of gradients of several steps, and so of loss scales
    )
    reads_optimizer_state = False  # whether the direction is made of state, which lies as the optimizer steps
    always_descends = False  # whether `descent` changes the gradients of steps that do not ascend too
    _step_supports_amp_scaling = False  # a fused optimizer's own: torch's GradScaler would tell us, and not it, of inf

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        *,
        interval: int = 1,
        scope: str = "global",
        model: nn.Module | None = None,
    ) -> None:
        check_inner(optimizer, SAM)
        super().__init__(optimizer)
        self.rho = positive("rho", rho, "leave SAM out for rho = 0")
        for group in optimizer.param_groups:
            self.radius(group)
        check_integer("interval", interval, 1, "1 perturbs at every step")
        if scope not in ("global", "local"):
            raise ValueError(f"scope must be global or local, got {scope!r}")
        self.interval = interval
        self.scope = scope
        self.model = model
        self._perturbed: _Perturbed | None = None
        self._staged: _Staged | None = None
        self._norms: tuple[tuple[Tensor, ...], Tensor] | None = None
        self._visited = False  # whether `perturb` was called for the step that comes
        self._told = False  # whether a step without it has been warned of
        self._stepped = False  # whether the optimizer has stepped, and so has what state it makes
        self.measured = False  # whether `perturb` has found out what rounding leaves

    @property
    def ascends(self) -> bool:
        """Whether the step that comes perturbs the weights and needs a gradient there."""
        return self._count() % self.interval == 0

    compute_dtype: torch.dtype | None = None
    buffers: tuple[str, ...] = ()  # the names of state of our own

    def ascent(self, layout: ShardLayout, owners: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The direction d and the measure m of the perturbation rho * d / |m|: lists of shards, as `layout` splits."""
        grads = layout.grads(owners)
        return grads, grads

    def descent(self, layout: ShardLayout, owners: list[Tensor], first: dict[Tensor, list[Tensor]] | None) -> None:
        """Makes of the owners' gradients what the step is to take.

        first: the shards of the gradients at the weights, by parameter, if it `needs_unperturbed_gradient`; None where
        the step did
            not ascend. Its parameters and the owners need not be the same.
        """

    def owners(self) -> list[Tensor]:
        """The parameters that are perturbed."""
        groups = [group for group in self.param_groups if self.radius(group) > 0.0]
        return with_gradient(p for group in groups for p in group["params"])

    def radius(self, group: dict[str, Any]) -> float:
        """The radius of a param group: its `sam_rho`, or `rho`.

        Raises ValueError where it is not a number >= 0, and for a `rho` that is meant for SAM.
        """
        if "rho" in group and "rho" not in self.optimizer.defaults:
            raise ValueError(
                f"a param group has rho={group['rho']!r}, which is no option of {type(self.optimizer).__name__}: "
                "SAM's radius for a group is called sam_rho"
            )
        return bounded("sam_rho of a param group", group["sam_rho"], 0.0) if "sam_rho" in group else self.rho

    def loss(self, outputs: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of a model's outputs in the pass that runs."""
        return criterion(outputs)

    @eager_island
    @torch.no_grad()
    def perturb(self) -> Tensor:
        """Moves the weights to the worst point nearby; returns the norm |m|, the same on every rank.

        One all-reduce per mesh axis that shards. If the norm is not finite neither are the perturbed weights: call
        `restore` and skip the step. Does nothing, and returns 0, where this step does not ascend.
        """
        if self._perturbed is not None:
            raise RuntimeError("perturb() was called twice without restore() between")
        layout, owners = self._layout(), self.owners()
        self._perturbed, self._staged, self._norms, self._visited = _Perturbed(layout, owners), None, None, True
        if not self.ascends:
            return torch.zeros((), dtype=torch.float64, device=layout.device)
        try:
            return self._ascend(self._perturbed)
        except BaseException:  # a warning that is an error, for one
            self.abort_pass()
            raise

    def _ascend(self, perturbed: _Perturbed) -> Tensor:
        layout, owners = perturbed.layout, perturbed.owners
        if self.needs_unperturbed_gradient:
            perturbed.first = {p: [g.clone() for g in layout.grads([p])] for p in self._with_gradients()}
        directions, measured = self.ascent(layout, owners)
        weights, layers = layout.weights(owners), layout.layers(owners)
        (norms,) = layout.norms(layers, measured)
        self._norms, total = (layout.params, norms), exact.norm(norms)
        buffers = list(self.model.buffers()) if self.model is not None and self.needs_ascent_gradient else []
        perturbed.copies = [(t, t.clone()) for t in (*(local(p.detach()) for p in owners), *buffers)]
        factors = self._factors(layout, owners, total)
        perturb_(weights, directions, factors)
        layout.sync.publish(owners)
        if not self.measured:
            before = [s for p, (_, copy) in zip(owners, perturbed.copies) for s in layout.split_local(p, copy)]
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
        """Warns, once, if too little is left of a perturbation in the dtype that weights are computed with.

        Every rank has to call it. before, after, moves: shards of these layers, and what was to be added to them.
        """
        self.measured = True  # also where the warning is an error
        self.measured = warn_of_rounding(layout, layers, before, after, moves, self.compute_dtype)

    @eager_island
    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back, bit for bit, and makes of the gradients what the step is to take."""
        done = self._put_back()
        if done is not None:
            self.descent(done.layout, self._with_gradients(), done.first)

    def ascent_norms(self) -> dict[Tensor, Tensor]:
        """The norm of each whole layer of what this step perturbed by; none if it did not.

        One that is not finite is the layer in which the step broke: by the second pass all of them are.
        """
        return {} if self._norms is None else dict(zip(*self._norms))

    @eager_island
    def abort_pass(self) -> None:
        """After a pass that failed: puts the weights back, bit for bit, and makes nothing of the gradients."""
        self._put_back()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """`perturb` and `restore` around a block; if that raises, the weights are as before."""
        self.perturb()
        try:
            yield
        except BaseException:
            self.abort_pass()
            raise
        self.restore()

    @eager_island
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer; with a closure both passes around it, and the loss of the first.

        The closure runs forward and backward over all micro-batches of a step and returns the loss; it is called twice.
        One that computes nothing, as Lightning's in manual optimization, counts as none: both passes were run by hand.

        Skips no step: of a loss that is inf or nan weights become inf or nan, as by torch's optimizers. `distopt.train`
        leaves such a step out, and so does torch's GradScaler: `scaler.step(sam)`, after both passes by hand.

        Raises ValueError for a closure that adds to gradients of before instead of clearing them, since the second pass
        would lack what these are of; RuntimeError between `perturb` and `restore`.
        """
        if self._perturbed is not None:
            raise RuntimeError(
                "step() was called between perturb() and restore(): the weights are perturbed, restore()"
            )
        loss = None if closure is None else self._both_passes(closure)
        stepped = self._with_gradients()
        self._warn_of_no_ascent(stepped)
        result = self.optimizer.step()
        self._keep(stepped)
        self._stepped = self._stepped or bool(stepped)
        self.count_step()
        return result if closure is None else loss

    def _both_passes(self, closure: Callable[[], Any]) -> Any:
        """Runs the closure as often as this step needs it, around the perturbation; returns its first result."""
        params = [p for group in self.param_groups for p in group["params"]]
        start, by_hand = random_state(*dict.fromkeys(p.device for p in params)), self._visited
        with contextlib.nullcontext() if self.needs_ascent_gradient else self.perturbed():
            with GradientWatch(params) as watch, torch.enable_grad():
                loss = closure()
            if watch.added and self.ascends:
                raise ValueError(
                    "step(closure): the closure adds to gradients that were there before it, and SAM's second pass, "
                    "which calls it again, would lack them: let it clear them and run all micro-batches of the step, "
                    "or use perturb() and restore() (in Lightning accumulate_grad_batches=1, or manual optimization)"
                )
        if not watch.changed and (watch.found or loss is None):
            self._visited = by_hand
        elif self.needs_ascent_gradient:
            with self.perturbed():
                if self.ascends:
                    self.zero_grad()
                    with same_random_numbers(start), torch.enable_grad():
                        closure()
        return loss

    def _warn_of_no_ascent(self, stepped: list[Tensor]) -> None:
        if stepped and not self._visited and not self._told and (self.ascends or self.always_descends):
            self._told = True
            warnings.warn(
                f"{type(self).__name__}.step() was called without perturb() and restore(), so this is a plain step of "
                f"{type(self.optimizer).__name__}: run the passes around them, or give step a closure",
                UserWarning,
                stacklevel=3,
            )

    def count_step(self) -> None:
        """Says that a step has been taken; kept in every param group, so that a resumed run goes on in time."""
        self._visited = False
        if self.interval > 1:
            count = self._count() + 1
            for group in self.param_groups:
                group["sam_steps"] = count

    def _count(self) -> int:
        """The steps so far. A group that was added later has none, and checkpoints may lack groups without params."""
        return max((group.get("sam_steps", 0) for group in self.param_groups), default=0)

    def init_state(self) -> None:
        """Makes what checkpoints hold, the optimizer's state and our own, where it is not there yet."""
        if hasattr(self.optimizer, "init_state"):
            self.optimizer.init_state()
        if self.interval > 1:  # torch's checkpoints fill only what is there
            count = self._count()
            for group in self.param_groups:
                group["sam_steps"] = count
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not hasattr(self.optimizer, "init_state"):  # torch's make their state where a parameter has none at all
            params = [p for p in params if self.state.get(p)]
        for name in self.buffers:
            self._make(self._layout(), params, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.radius(param_group)
        super().add_param_group(param_group)

    def _layout(self) -> ShardLayout:
        layout = getattr(self.optimizer, "layout", None)
        if layout is not None and layout.flat:
            raise ValueError("the engine owns weights and gradients: distopt.engine.DeepSpeed runs SAM there")
        if layout is None or not self.reads_optimizer_state:
            layout = layout_of(self.optimizer)
        if self.scope == "local":  # by gradients that no rank has exchanged
            layout = layout.model or layout
            if layout.groups:
                raise ValueError("scope=local needs whole weights on every rank, as under DDP: here they are sharded")
        return layout

    def _factors(self, layout: ShardLayout, owners: list[Tensor], total: Tensor) -> list[Tensor]:
        """rho / |m| of each shard, on the device; 0 where there is nothing to perturb by."""
        rho = {p: self.radius(group) for group in self.param_groups for p in group["params"]}
        factors = {radius: torch.where(total > 0, radius / total, 0.0) for radius in set(rho.values())}
        return [factors[rho[p]] for p in owners for _ in layout.segments[p]]

    def _put_back(self) -> _Perturbed | None:
        done, self._perturbed = self._perturbed, None
        if done is not None and done.copies:
            with torch.no_grad():
                done.layout.sync.wait()
                for tensor, copy in done.copies:
                    tensor.copy_(copy)
        return done

    def _shards(self, layout: ShardLayout, owners: list[Tensor], buffer: str) -> list[Tensor]:
        """Shards of a state buffer of our own, to be read; the optimizer's state dict holds it. Zeros at first."""
        shards = []
        for p in owners:
            held = self.state.get(p, {}).get(buffer)
            value = layout.zeros(p) if held is None else fit(layout, p, held, buffer)
            if held is not None and held is not value:  # a state that was loaded, or made for another layout
                self.state[p][buffer] = value
            shards += layout.split(p, value)
        return shards

    def _stage(self, layout: ShardLayout, owners: list[Tensor], buffer: str, values: list[Tensor]) -> None:
        """Gives a state buffer of our own new values, once the step is taken: one that is left out moves no state."""
        shards = iter(values)
        by_param = {p: [next(shards) for _ in layout.segments[p]] for p in owners}
        self._staged = _Staged(layout, buffer, by_param)

    def _keep(self, stepped: Iterable[Tensor]) -> None:
        """State of our own moves with the parameters that are stepped: torch's optimizers make none of the others'."""
        staged, self._staged = self._staged, None
        if staged is None:
            return
        params = [p for p in stepped if p in staged.values]
        self._make(staged.layout, params, staged.buffer)
        values = [value for p in params for value in staged.values[p]]
        for shard, value in zip(self._shards(staged.layout, params, staged.buffer), values, strict=True):
            shard.copy_(value)

    def _with_gradients(self) -> list[Tensor]:
        return with_gradient(p for group in self.param_groups for p in group["params"])

    def _make(self, layout: ShardLayout, owners: list[Tensor], buffer: str) -> None:
        for p in owners:
            if buffer not in self.state[p]:
                self.state[p][buffer] = layout.zeros(p)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho}, optimizer={self.optimizer!r})"


def paired(
    layout: ShardLayout, params: Sequence[Tensor], first: dict[Tensor, list[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the first pass and those of the second: two lists of shards of the same parameters.

    A gradient that one of the passes did not have is 0; each parameter has one in one of them.
    """
    before: list[Tensor] = []
    after: list[Tensor] = []
    for p in params:
        second = layout.grads([p]) if _has_grad(p) else [torch.zeros_like(g) for g in first[p]]
        before += first[p] if p in first else [torch.zeros_like(g) for g in second]
        after += second
    return before, after


def _has_grad(param: Tensor) -> bool:
    return param.grad is not None


@dataclass
class _Perturbed:
    """What `restore` needs: whose weights moved, the weights (and a model's buffers) as they were, first gradients."""

    layout: ShardLayout
    owners: list[Tensor]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    first: dict[Tensor, list[Tensor]] | None = None


@dataclass
class _Staged:
    """New values for the shards of a state buffer, by parameter, kept until the step is taken."""

    layout: ShardLayout
    buffer: str
    values: dict[Tensor, list[Tensor]]
