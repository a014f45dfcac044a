"""MeZO: fine-tuning by forward passes only, in the memory of inference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distopt import collective, counter
from distopt.bounds import integer, number
from distopt.layout import local
from distopt.layout.fsdp2 import reshard
from distopt.layout.places import global_indices, own_place
from distopt.rng import random_state, same_random_numbers

if TYPE_CHECKING:
    from torch.optim.optimizer import ParamsT

CHUNK = 2**18  # elements of noise at once
NOISE_BYTES = 92  # of memory for each of them


class MeZO(torch.optim.Optimizer):
    r"""MeZO: gradient descent along one random direction, whose slope is the difference of two losses.

        z = N(0, 1) for each weight, a hash of (seed, step, name of the parameter, index of the element)
        slope = (loss(p + eps z) - loss(p - eps z)) / (2 eps)            the mean over the ranks
        p <- p - lr * (slope * z + weight_decay * p)

    As Algorithm 1 of the paper, which draws z again from a seed and stores nothing: so does this. There a generator has
    to run over all weights in one order; here every shard draws its own part, the same at every number of ranks, and
    a step sends two numbers for each rank. There are no gradients, no state, and nothing to clip.

    Weights are moved in place, up, down and back. What three roundings leave is not restored: a weight whose update is
    0 may change by 3 halves of a unit in the last place of |p| + eps |z|, in float32 2e-7 of it. 16-bit weights, in
    which that would be as large as the step, are refused. The paper's code decays neither biases nor norms; for that
    give param groups.

    Args:
        params: Parameters, param groups, or the model's `named_parameters()`. Without names the positions stand for
            them, so that the order matters.
        lr: Learning rate, >= 0. The paper's range from 1e-7 to 1e-5 for language models; a slope along z is as large as
            the gradient, and z as long as the root of the number of weights.
        eps: The distance of the two points in units of z, > 0.
        weight_decay: Decoupled decay of the weights, >= 0.
        seed: Of the noise, >= 0, the same on every rank.
        model: Needed for FSDP2, which keeps full copies of some parameters after a forward pass; they are dropped.

    Attributes:
        slope: That of the last step (by the first group's eps), NaN before it. The mean of its square over z is the
            square of the gradient's norm.

    Raises:
        ValueError: A value outside of its bound, 16-bit weights, and weights that are sharded otherwise than by rows.

    Reference: Malladi et al., Fine-Tuning Language Models with Just Forward Passes, NeurIPS 2023, arXiv 2305.17333.
    """

    group_state = ("steps",)  # which no configuration sets

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-6,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        *,
        model: nn.Module | None = None,
    ) -> None:
        self._model = model
        self.slope = math.nan
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay, "seed": seed, "steps": 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ValueError for an option that is out of bounds, and for weights as described above."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> float:  # type: ignore[override]
        """Performs one update; every rank has to call it.

        Args:
            closure: Computes the loss of this rank's batch, and returns it. It is called twice, without gradients and
                with the same random numbers.

        Returns:
            The mean over the ranks, and over both points, of the loss. If it is not finite the weights stay.

        Raises:
            ValueError: For gradients, which it does not use, and without a closure.
        """
        if closure is None:
            raise ValueError(
                "MeZO.step needs a closure that returns the loss of a forward pass; the Trainer and others that train "
                "by gradients cannot run it: use distopt.train"
            )
        params = [p for group in self.param_groups for p in group["params"]]
        if any(p.grad is not None for p in params):
            raise ValueError("MeZO has no use for gradients, and there are some: leave out backward(), or clear them")
        for group in self.param_groups:
            self._check(group)
        start = random_state(*dict.fromkeys(p.device for p in params))
        self._move(lambda group: group["eps"])
        at = 1.0
        try:
            up = float(closure())
            self._move(lambda group: -2.0 * group["eps"])
            at = -1.0
            with same_random_numbers(start):
                down = float(closure())
        finally:
            self._move(lambda group: -at * group["eps"])
        losses = collective.on_all(lambda: (up, down))
        up, down = (math.fsum(column) / len(losses) for column in zip(*losses))
        self.slope = (up - down) / (2.0 * self.param_groups[0]["eps"])
        if math.isfinite(up) and math.isfinite(down):
            for group in self.param_groups:
                weights = [local(p) for p in group["params"] if p.requires_grad]
                torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
            self._move(lambda group: -group["lr"] * (up - down) / (2.0 * group["eps"]))
        for group in self.param_groups:
            group["steps"] += 1
        return 0.5 * (up + down)

    def _move(self, factor: Callable[[dict[str, Any]], float]) -> None:
        """p <- p + factor * z, of this step's z."""
        if self._model is not None:
            reshard(self._model)  # full copies of the last forward pass, which would be stale
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
            for name, p in zip(names, group["params"]):
                if p.requires_grad:
                    _add_noise(p, counter.key(f"{group['seed']}:{group['steps']}:{name}"), factor(group))

    def _check(self, group: dict[str, Any]) -> None:
        number(0.0).check("lr", group["lr"])
        number(0.0, above=True).check("eps", group["eps"])
        number(0.0).check("weight_decay", group["weight_decay"])
        integer(0).check("seed", group["seed"])
        for p in group["params"]:
            if p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"MeZO moves weights by eps, which {p.dtype} rounds away: give it float32 weights")
            placements = getattr(p, "placements", ())
            shards = [placement for placement in placements if not placement.is_replicate()]
            if shards and (len(shards) > 1 or not shards[0].is_shard(0)):
                raise ValueError(f"MeZO knows weights that are sharded by rows, got {placements}: use FSDP2 or DDP")
            if placements and self._model is None:
                raise ValueError("MeZO on DTensors needs model=, whose full copies FSDP2 keeps after a forward pass")


def _add_noise(param: Tensor, key: int, factor: float) -> None:
    """p <- p + factor * z, with the z of each element of the full parameter."""
    part = local(param.detach())
    flat = part.reshape(-1)
    for start, index in global_indices(own_place(param), param.shape, part.device, CHUNK):
        flat[start : start + len(index)].add_(counter.normals(key, index).float().to(part.dtype), alpha=factor)
    if not part.is_contiguous():
        part.copy_(flat.view(part.shape))
