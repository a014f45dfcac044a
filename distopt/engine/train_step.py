"""One training step: gradients over the micro-batches, SAM's second pass, clipping, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from distopt.data.batch import Batch, PassLoss, next_token_loss
from distopt.engine.mezo import MeZO
from distopt.optim.averaging import train_mode
from distopt.rng import random_state
from distopt.sam import SAM
from distopt.sam.two_passes import Pass, two_passes

if TYPE_CHECKING:
    from distopt.engine import Engine

Loss = Callable[[nn.Module, Any, PassLoss], Tensor]  # the mean over a micro-batch


class Update(NamedTuple):
    """The result of a training step.

    Attributes:
        loss: The mean loss over this rank's micro-batches, a scalar tensor.
        grad_norm: The norm of the gradient over all parameters and ranks, before clipping.
        applied: Whether the optimizer has updated the weights.
        grad_norms: As in `distopt.engine.base.Stepped`.
        small_square: This rank's share of |g|^2 of the first micro-batch (`Engine.small_square`), if it was asked for.
    """

    loss: Tensor
    grad_norm: float
    applied: bool
    grad_norms: Callable[[], Mapping[Tensor, Tensor]] = dict
    small_square: Tensor | None = None


def update(
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Tensor | Batch],
    max_grad_norm: float = math.inf,
    loss: Loss = next_token_loss,
    noise: bool = False,
) -> Update:
    """Takes one optimizer step on the mean loss over the micro-batches.

    Both passes of `SAM` run over the same micro-batches with the same random numbers, and the gradient of the second
    pass is clipped. If the gradient norm is inf or nan, which it is on every rank or on none, weights and state do not
    change. An optimizer with modes (schedule-free) stays in train mode. `MeZO` takes forward passes alone, and its
    gradient norm is the size of its slope.

    Args:
        engine: The engine that has built the model.
        model: The model, as the engine has wrapped it.
        optimizer: The optimizer, or SAM around it.
        batches: This rank's micro-batches, each with the same number of sequences.
        max_grad_norm: The norm to which gradients are clipped, > 0.
        loss: Computes the mean loss of a micro-batch.
        noise: Measure the gradient of the first of several micro-batches, for the noise scale; not with SAM.

    Raises:
        ValueError: If the engine cannot run this SAM.
    """
    if isinstance(optimizer, MeZO):
        return forward_only(engine, model, optimizer, batches, loss)
    train_mode(optimizer)
    engine.zero_grad(model, optimizer)
    if isinstance(optimizer, SAM):
        mean = sharpness_aware(engine, model, optimizer, batches, loss)
        return Update(mean, *engine.step(model, optimizer, max_grad_norm))
    small: list[Tensor] = []

    def after(done: int) -> None:
        if noise and done == 1:
            small.append(engine.small_square(model) * len(batches) ** 2)  # each loss is divided by their number

    mean = backward(engine, model, batches, loss, after=after)
    return Update(mean, *engine.step(model, optimizer, max_grad_norm), *small)


def forward_only(
    engine: Engine, model: nn.Module, optimizer: MeZO, batches: Sequence[Tensor | Batch], loss: Loss = next_token_loss
) -> Update:
    """One step of MeZO, whose two passes each run over all micro-batches."""
    device = batches[0].device

    def mean() -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=device)
        for batch in batches:
            with engine.autocast(device):
                total += loss(model, batch, None) / len(batches)
        return total

    found = optimizer.step(mean)
    return Update(torch.tensor(found, device=device), abs(optimizer.slope), math.isfinite(optimizer.slope))


def sharpness_aware(
    engine: Engine,
    model: nn.Module,
    sam: SAM,
    batches: Sequence[Tensor | Batch],
    loss: Loss = next_token_loss,
) -> Tensor:
    """Computes the gradient of SAM's second pass; if a pass raises, the weights are restored.

    Returns:
        This rank's mean loss in the first pass.

    Raises:
        ValueError: If the engine cannot run this SAM.
    """
    engine.check_sam(sam)
    pass_loss = None if type(sam).loss is SAM.loss else sam.loss

    def run_pass(this: Pass) -> Tensor:
        if this.second:
            engine.zero_grad(model, sam)
        return backward(engine, model, batches, loss, pass_loss, this.exchange)

    start = random_state(batches[0].device)
    return two_passes(sam, run_pass, start, perturbed=lambda: engine.perturbed(model, sam))


def backward(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Tensor | Batch],
    loss: Loss = next_token_loss,
    pass_loss: PassLoss = None,
    exchange: bool = True,
    after: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Accumulates the gradient of the mean loss over the micro-batches.

    Args:
        engine: The engine that has built the model.
        model: The model, as the engine has wrapped it.
        batches: This rank's micro-batches, each with the same number of sequences.
        loss: Computes the mean loss of a micro-batch.
        pass_loss: Computes the loss of the outputs where it depends on SAM's pass (`SAM.loss`).
        exchange: Whether gradients are averaged over the ranks.
        after: Called with the number of micro-batches done after each but the last.

    Returns:
        The mean loss over this rank's micro-batches, a float32 scalar tensor.
    """
    total = torch.zeros((), dtype=torch.float32, device=batches[0].device)
    for i, batch in enumerate(batches):
        with engine.sync(model, last=exchange and i == len(batches) - 1):
            with engine.autocast(batch.device):
                share = loss(model, batch, pass_loss) / len(batches)
            engine.backward(model, share)
        total += share.detach()
        if i < len(batches) - 1:
            after(i + 1)
    return total
