"""One training step: gradients over the micro-batches, SAM's second pass, clipping, the update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """What a step did: this rank's mean loss, the global gradient norm before clipping, whether weights moved."""

    loss: Tensor
    grad_norm: float
    applied: bool


def update(
    engine: Engine,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Tensor | Batch],
    max_grad_norm: float = math.inf,
    loss: Loss = next_token_loss,
) -> Update:
    """One optimizer step on the mean loss of this rank's micro-batches, of as many sequences each.

    With `SAM` both passes run over the same micro-batches with the same random numbers, and the gradient of the second
    is the one that is clipped. A gradient norm that is inf or nan, which all ranks see alike, leaves weights and state
    as they are. An optimizer with modes (schedule-free) is in train mode from here on. `MeZO` takes forward passes
    alone, and its gradient norm is the size of its slope.
    """
    if isinstance(optimizer, MeZO):
        return forward_only(engine, model, optimizer, batches, loss)
    train_mode(optimizer)
    engine.zero_grad(model, optimizer)
    if isinstance(optimizer, SAM):
        mean = sharpness_aware(engine, model, optimizer, batches, loss)
    else:
        mean = backward(engine, model, batches, loss)
    return Update(mean, *engine.step(model, optimizer, max_grad_norm))


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
    """Computes the gradients that SAM steps with. If a pass raises, the weights are restored.

    Returns:
        This rank's mean loss in the first pass.

    Raises:
        ValueError: If the engine cannot run this SAM.
    """
    engine.check_sam(sam)

    def run_pass(this: Pass) -> Tensor:
        if this.second:
            engine.zero_grad(model, sam)
        return backward(engine, model, batches, loss, sam.loss, this.exchange)

    start = random_state(batches[0].device)
    return two_passes(sam, run_pass, start, perturbed=lambda: engine.perturbed(model, sam))


def backward(
    engine: Engine,
    model: nn.Module,
    batches: Sequence[Tensor | Batch],
    loss: Loss = next_token_loss,
    pass_loss: PassLoss = None,
    exchange: bool = True,
) -> Tensor:
    """Adds the gradient of the mean loss over the micro-batches; returns this rank's loss.

    pass_loss: how the loss of the outputs is computed where that depends on the pass (`SAM.loss`).
    exchange: average the gradient over the ranks.
    """
    total = torch.zeros((), dtype=torch.float32, device=batches[0].device)
    for i, batch in enumerate(batches):
        with engine.sync(model, last=exchange and i == len(batches) - 1):
            with engine.autocast(batch.device):
                share = loss(model, batch, pass_loss) / len(batches)
            engine.backward(model, share)
        total += share.detach()
    return total
