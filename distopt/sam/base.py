"""Sharpness-aware minimization: take the gradient at the worst point near the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distopt import exact
from distopt.clip import layout_of
from distopt.layout import FlatLayout, ShardLayout
from distopt.randomness import random_state, set_random_state
from distopt.sam.around import Around
from distopt.sam.checks import positive
from distopt.sam.rounding import perturb_, warn_of_rounding


class SAM(Around):
    r"""Sharpness-aware minimization (SAM) around any torch optimizer.

        perturb:  p <- p + rho * g / |g|     the norm over all parameters and ranks; g is the gradient at p
        restore:  p <- p, as it was          g is now the gradient at the perturbed point
        step:     one step of the optimizer with that gradient

    The weights are put back from a copy, bit for bit; the copy is sharded as they are, so that under DDP and
    ZeRO-1 every rank has a whole one. Where a rank's gradients are right in its rows only (`layout.zero1_scattered`) it
    perturbs these and sends them: each pass then costs on the wire what the exchange of whole gradients would. Two ways
    to use it:

        loss.backward(); sam.perturb(); sam.zero_grad(); second_loss.backward(); sam.restore(); sam.step()
        loss = sam.step(closure)     # the closure clears the gradients, runs forward and backward, returns the loss

    With gradient accumulation both passes go over the same micro-batches; `step(closure)` gives both the same random
    numbers (dropout). Clip after `restore`, so that it is the second gradient. Everything else is the optimizer's:
    `param_groups`, `state`, `state_dict`, hooks, so that schedules, clipping and checkpoints see one optimizer.

    Weights in bfloat16 are rounded so that the perturbation is right in the mean over elements; computed with in
    bfloat16, float32 weights see it with noise. The first `perturb` measures what is left, and warns where that is not
    enough (docs/sam.md).

    Args:
        optimizer: any torch optimizer, made before. A param group may have a `rho` of its own.
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
    Raises ValueError for an argument out of bounds; where `scope=local` meets sharded weights; under DeepSpeed, whose
    partitions `distopt.engine.DeepSpeed` perturbs.

    Reference: Foret, Kleiner, Mobahi, Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
    Generalization, ICLR 2021, arXiv 2010.01412.
    """

    first_pass = True  # whether `perturb` needs the gradient at the weights
    keeps_first = False  # whether `descent` needs it too
    remembers_gradients = False  # whether the direction is made of gradients of several steps, and so of loss scales
    uses_state = False  # whether the direction is made of state, which lies as the optimizer steps
    _step_supports_amp_scaling = False  # a fused optimizer's own: torch's GradScaler would tell us, and not it, of inf

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rho: float = 0.05,
        interval: int = 1,
        scope: str = "global",
        model: nn.Module | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.rho = positive("rho", rho)
        for group in optimizer.param_groups:
            positive("rho of a param group", group.get("rho", rho))
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"interval must be an integer >= 1, got {interval!r}; 1 perturbs at every step")
        if scope not in ("global", "local"):
            raise ValueError(f"scope must be global or local, got {scope!r}")
        self.interval = interval
        self.scope = scope
        self.model = model
        self._perturbed: _Perturbed | None = None
        self._staged: _Staged | None = None
        self._norms: Tensor | None = None
        self.measured = False  # whether `perturb` has found out what rounding leaves

    @property
    def ascends(self) -> bool:
        """Whether the step that comes perturbs the weights and needs a gradient there."""
        return self.param_groups[0].get("sam_steps", 0) % self.interval == 0

    compute_dtype: torch.dtype | None = None
    buffers: tuple[str, ...] = ()  # the names of state of our own

    def ascent(self, layout: ShardLayout, owners: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The direction d and the measure m of the perturbation rho * d / |m|: lists of shards, as `layout` splits."""
        grads = layout.grads(owners)
        return grads, grads

    def descent(self, layout: ShardLayout, owners: list[Tensor], first: list[Tensor]) -> None:
        """Makes of the gradients what the step is to take; `first`: those at the weights, if it `keeps_first`."""

    def owners(self) -> list[Tensor]:
        """The parameters that are perturbed."""
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def loss(self, outputs: Tensor, criterion: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of a model's outputs in the pass that runs."""
        return criterion(outputs)

    @torch.no_grad()
    def perturb(self) -> Tensor:
        """Moves the weights to the worst point nearby; returns the norm |m|, the same on every rank.

        One all-reduce per mesh axis that shards. If the norm is not finite neither are the perturbed weights: call
        `restore` and skip the step. Does nothing, and returns 0, where this step does not ascend.
        """
        if self._perturbed is not None:
            raise RuntimeError("perturb() was called twice without restore() between")
        layout, owners = self._layout(), self.owners()
        self._perturbed, self._staged, self._norms = _Perturbed(layout, owners), None, None
        if not self.ascends:
            return torch.zeros((), dtype=torch.float64, device=layout.device)
        try:
            return self._ascend(self._perturbed)
        except BaseException:  # a warning that is an error, for one
            self.give_up()
            raise

    def _ascend(self, perturbed: _Perturbed) -> Tensor:
        layout, owners = perturbed.layout, perturbed.owners
        if self.keeps_first:
            perturbed.first = [g.clone() for g in layout.grads(owners)]
        directions, measured = self.ascent(layout, owners)
        weights, layers = layout.weights(owners), layout.layers(owners)
        (norms,) = layout.norms(layers, measured)
        self._norms, total = norms, exact.norm(norms)
        buffers = list(self.model.buffers()) if self.model is not None and self.first_pass else []
        touched = layout.touched(owners)
        perturbed.copies = [(t, t.clone()) for t in (*touched, *buffers)]
        factors = self._factors(layout, owners, total)
        perturb_(weights, directions, factors)
        layout.publish(owners)
        if not self.measured:
            before = layout.within(owners, [copy for _, copy in perturbed.copies[: len(touched)]])
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

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the weights back, bit for bit, and makes of the gradients what the step is to take."""
        done = self._put_back()
        if done is not None:
            self.descent(done.layout, [p for p in done.owners if p.grad is not None], done.first)

    def ascent_norms(self) -> dict[Tensor, Tensor]:
        """The norm of each whole layer of what this step perturbed by; none if it did not.

        One that is not finite is the layer in which the step broke: by the second pass all of them are.
        """
        return {} if self._norms is None else dict(zip(self._layout().params, self._norms))

    def give_up(self) -> None:
        """After a pass that failed: puts the weights back, bit for bit, and makes nothing of the gradients."""
        self._put_back()

    @contextlib.contextmanager
    def perturbed(self) -> Iterator[None]:
        """`perturb` and `restore` around a block; if that raises, the weights are as before."""
        self.perturb()
        try:
            yield
        except BaseException:
            self.give_up()
            raise
        self.restore()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer; with a closure both passes around it, and the loss of the first.

        Skips no step: of a loss that is inf or nan weights become inf or nan, as by torch's optimizers. `distopt.train`
        leaves such a step out, and so does torch's GradScaler: `scaler.step(sam)`, after both passes by hand.
        """
        loss = None
        if closure is not None:
            device = self.param_groups[0]["params"][0].device
            random = random_state(device)
            if self.first_pass:
                with torch.enable_grad():
                    loss = closure()
                after = random_state(device)
            with self.perturbed():
                if self.ascends or not self.first_pass:
                    set_random_state(random, device)
                    with torch.enable_grad():
                        second = closure()
            if self.first_pass:
                set_random_state(after, device)
            else:
                loss = second
        result = self.optimizer.step()
        self._keep()
        self.count_step()
        return result if closure is None else loss

    def count_step(self) -> None:
        """Says that a step has been taken; kept in the first param group, so that a resumed run goes on in time."""
        if self.interval > 1:
            self.param_groups[0]["sam_steps"] = self.param_groups[0].get("sam_steps", 0) + 1

    def init_state(self) -> None:
        """Makes what checkpoints hold, the optimizer's state and our own, where it is not there yet."""
        if hasattr(self.optimizer, "init_state"):
            self.optimizer.init_state()
        if self.interval > 1:  # torch's checkpoints fill only what is there
            self.param_groups[0].setdefault("sam_steps", 0)
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not hasattr(self.optimizer, "init_state"):  # torch's make their state where a parameter has none at all
            params = [p for p in params if self.state.get(p)]
        for name in self.buffers:
            self._make(self._layout(), params, name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        positive("rho of a param group", param_group.get("rho", self.rho))
        super().add_param_group(param_group)

    def _layout(self) -> ShardLayout:
        layout = getattr(self.optimizer, "layout", None)
        if isinstance(layout, FlatLayout):
            raise ValueError("DeepSpeed owns weights and gradients: distopt.engine.DeepSpeed runs SAM there")
        if layout is None or not self.uses_state:
            layout = layout_of(self.optimizer)
        if self.scope == "local":  # by gradients that no rank has exchanged
            layout = layout.model or layout
            if layout.groups:
                raise ValueError("scope=local needs whole weights on every rank, as under DDP: here they are sharded")
        return layout

    def _factors(self, layout: ShardLayout, owners: list[Tensor], total: Tensor) -> list[Tensor]:
        """rho / |m| of each shard, on the device; 0 where there is nothing to perturb by."""
        rho = {p: group.get("rho", self.rho) for group in self.param_groups for p in group["params"]}
        factors = {radius: torch.where(total > 0, radius / total, 0.0) for radius in set(rho.values())}
        return [factors[rho[p]] for p in owners for _ in layout.segments[p]]

    def _put_back(self) -> _Perturbed | None:
        done, self._perturbed = self._perturbed, None
        if done is not None and done.copies:
            with torch.no_grad():
                done.layout.wait()
                for tensor, copy in done.copies:
                    tensor.copy_(copy)
        return done

    def _shards(self, layout: ShardLayout, owners: list[Tensor], buffer: str) -> list[Tensor]:
        """Shards of a state buffer of our own, to be read; the optimizer's state dict holds it. Zeros at first."""
        held = [self.state.get(p, {}).get(buffer) for p in owners]
        return [s for p, b in zip(owners, held) for s in layout.split(p, layout.zeros(p) if b is None else b)]

    def _stage(self, layout: ShardLayout, owners: list[Tensor], buffer: str, values: list[Tensor]) -> None:
        """Gives a state buffer of our own new values, once the step is taken: one that is left out moves no state."""
        self._staged = _Staged(layout, owners, buffer, values)

    def _keep(self) -> None:
        staged, self._staged = self._staged, None
        if staged is not None:
            self._make(staged.layout, staged.owners, staged.buffer)
            for shard, value in zip(self._shards(staged.layout, staged.owners, staged.buffer), staged.values):
                shard.copy_(value)

    def _make(self, layout: ShardLayout, owners: list[Tensor], buffer: str) -> None:
        for p in owners:
            if buffer not in self.state[p]:
                self.state[p][buffer] = layout.zeros(p)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rho={self.rho}, optimizer={self.optimizer!r})"


@dataclass
class _Perturbed:
    """What `restore` needs: whose weights moved, the weights (and a model's buffers) as they were, first gradients."""

    layout: ShardLayout
    owners: list[Tensor]
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    first: list[Tensor] = field(default_factory=list)


@dataclass
class _Staged:
    """New values for the shards of a state buffer, kept until the step is taken."""

    layout: ShardLayout
    owners: list[Tensor]
    buffer: str
    values: list[Tensor]
